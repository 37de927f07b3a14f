"""The cluster of clusters/on-prem.yaml on hosts of this machine, as its operator sees it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml
from cluster.hosts import DIES_WITH_US, Host
from conftest import ROOT, free_port

from biggan.storage import StorageError

RAY = Path(sys.executable).with_name("ray")
PATIENCE = 600
"""Seconds that what is bound to come may take, on two cores that everything shares."""


def until(ready: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What `ready()` gives once that is true; what it asks may be away meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if answer := ready():
                return answer
        except (OSError, StorageError):  # Those of `requests` are OSErrors, too.
            pass
        time.sleep(1)
    raise TimeoutError(f"not within {seconds} s")


@dataclass
class OnPrem:
    """A head, workers, and the operator's machine, which reaches the dashboard by a tunnel."""

    home: Path
    head: Host
    workers: list[Host]
    port: int = field(default_factory=free_port)
    _tunnel: subprocess.Popen[bytes] | None = None

    @property
    def dashboard(self) -> str:
        """Where the tunnel to the dashboard begins."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def hosts(self) -> list[Host]:
        """All of them."""
        return [self.head, *self.workers]

    @property
    def file(self) -> Path:
        """The cluster's file."""
        return self.home / "on-prem.yaml"

    @property
    def token(self) -> str:
        """What `ray get-auth-token --generate` left."""
        return (self.home / ".ray/auth_token").read_text()

    def describe(self, key: Path, exports: dict[str, str]) -> None:
        """Write clusters/on-prem.yaml with these hosts' addresses, key, sizes and storage.

        They share this machine's packages, so that nothing is to be installed.
        """
        text = (ROOT / "clusters/on-prem.yaml").read_text().replace("10.0.0.11", self.head.address)
        cluster = yaml.safe_load(text)
        cluster["provider"]["worker_ips"] = [worker.address for worker in self.workers]
        cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
        environment, *others, _install = cluster["setup_commands"]
        lines = "".join(f"export {name}='{value}'\n" for name, value in exports.items())
        environment = environment.replace("export BIGGAN_STORAGE=/mnt/biggan\n", lines)
        cluster["setup_commands"] = [environment, *others, f"ln -sfn {sys.prefix} ~/venv"]
        for kind, cpus in ("head", 1), ("worker", 3):
            small = f" --num-cpus={cpus} --object-store-memory=200000000"
            cluster[f"{kind}_start_ray_commands"][-1] += small
        self.file.write_text(yaml.safe_dump(cluster))

    def ray(self, command: str, *more: str, status: int | None = 0, **environment: str) -> str:
        """Run `ray ...` on the operator's machine, in the working tree; what was printed."""
        basic = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "RAY_AUTH_MODE": "token",
            "RAY_UP_enable_autoscaler_v2": "0",
            "RAY_API_SERVER_ADDRESS": self.dashboard,
        }
        done = subprocess.run(
            [RAY, *command.split(), *more],
            cwd=ROOT,
            env=basic | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert status in (done.returncode, None), done.stdout
        return done.stdout

    def up(self) -> None:
        """`ray up`, and wait until all hosts have joined."""
        self.ray(f"up {self.file} --yes --no-config-cache")
        self.close()
        tunnel = self.head.ssh("-N", "-L", f"{self.port}:127.0.0.1:8265")
        self._tunnel = subprocess.Popen([*DIES_WITH_US, *tunnel])
        self.wait_for(*self.hosts)

    def close(self) -> None:
        """Leave the dashboard."""
        if self._tunnel:
            self._tunnel.kill()
            self._tunnel.wait()

    def wait_for(self, *hosts: Host) -> None:
        """Wait until the cluster is these hosts."""
        until(lambda: set(self.alive().values()) == {host.address for host in hosts})

    def alive(self) -> dict[str, str]:
        """Addresses of the nodes that Ray holds alive, by their ids."""
        return {node["node_id"]: node["node_ip"] for node in self.state("nodes", state="ALIVE")}

    def state(self, kind: str, **filters: str) -> list[dict[str, Any]]:
        """What Ray says of its nodes, actors, ..."""
        query = [("detail", "1")]
        for key, value in filters.items():
            query += [("filter_keys", key), ("filter_predicates", "="), ("filter_values", value)]
        rows: list[dict[str, Any]] = self._get(f"v0/{kind}", query)["data"]["result"]["result"]
        return rows

    def _get(self, path: str, query: list[tuple[str, str]] | None = None) -> Any:
        bearer = {"Authorization": f"Bearer {self.token}"}
        url = f"{self.dashboard}/api/{path}"
        answer = requests.get(url, params=query, headers=bearer, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def submit(self, command: str, *flags: str, status: int = 0, **environment: str) -> str:
        """Submit a command as the README has it; what was printed."""
        submitted = "job submit --working-dir . --runtime-env jobs/runtime_env.yaml"
        python = ["--", "python", *command.split()]
        return self.ray(submitted, *flags, *python, status=status, **environment)

    def status(self, job: str) -> str:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        return str(self._get(f"jobs/{job}")["status"])

    def log(self, job: str) -> str:
        """What a job has printed so far."""
        return str(self._get(f"jobs/{job}/logs")["logs"])
