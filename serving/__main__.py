"""Serve models on this machine or cluster: `python -m serving --models digits@best`."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import Annotated

import requests
import tyro

from biggan.cluster import connect
from biggan.commands import parse, run_command
from biggan.errors import UserError
from biggan.models import find_model, model_name
from biggan.storage import storage_root
from serving import ingress
from serving.config import EndpointConfig
from serving.door import check_exposure

NAME = "biggan"


@dataclass(frozen=True)
class Serve:
    """Serve models of the store over HTTP, until interrupted.

    Aliases are followed: promoting a new best changes what is served, without a dropped request.
    Clients need an API key (`make api-key NAME`), unless --no-auth opens it to this machine alone.

    python -m serving --models digits@best --no-auth

    python -m serving --models digits faces@best --host 0.0.0.0

    python -m serving --models digits --canary digits@best 95 digits@candidate 5
    """

    endpoint: Annotated[
        EndpointConfig,
        tyro.conf.arg(name=""),
        tyro.conf.FlagCreatePairsOff,  # Or there would be a --no-no-auth.
    ] = field(default_factory=EndpointConfig)
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on."""
    detach: bool = False
    """Return once the endpoint is up, and leave it running on the cluster."""


def main() -> None:
    """Serve what the command line describes."""
    command = parse(Serve, prog="python -m serving")
    root = storage_root(command.endpoint.storage)
    check_exposure(command.host, command.endpoint.no_auth)
    if not 1 <= command.port <= 65535:
        raise UserError(f"--port {command.port}: must be 1 to 65535; leave it out for 8000")
    versions = [find_model(reference, root) for reference in _named(command.endpoint)]
    # Serve takes these in when it is imported, and Ray when it is started, if it is started here.
    os.environ.update(ingress.environment(str(command.port)) | os.environ)
    from ray import serve

    from serving.app import build

    connect()
    url = f"http://{command.host}:{command.port}"
    if serve.status().proxies:
        if not _listens(command.host, command.port):
            raise UserError(
                f"Serve runs on this cluster already, and not at {url}: use the address that it was"
                " started with, or end it with `serve shutdown`"
            )
    elif _taken(command.host, command.port):
        raise UserError(f"--port {command.port}: something else listens at {url}; give another")
    serve.start(
        http_options={"host": command.host, "port": command.port},
        logging_config={"log_level": "WARNING"},
    )
    # Replicas have working directories of their own: give them the root's full path.
    config = command.endpoint.model_copy(update={"storage": root})
    serve.run(build(config), name=NAME, route_prefix="/")
    served = ", ".join(dict.fromkeys(model_name(folder) for folder in versions))
    print(f"serving {served} at {url}; a page to look at: {url}/, its API: {url}/docs")
    key = "" if command.endpoint.no_auth else " -H 'Authorization: Bearer KEY'"
    print(
        f"try: curl -s {url}/v1/generate -H 'Content-Type: application/json'{key}"
        """ -d '{"class": 0, "n": 16}' -o samples.png""",
        flush=True,
    )
    if not command.detach:
        _wait()
        serve.delete(NAME)
        print("stopped serving")


def _named(endpoint: EndpointConfig) -> list[str]:
    """Every NAME@ALIAS that must be in the store for the endpoint to begin."""
    return [*endpoint.models, *endpoint.canary]


def _listens(host: str, port: int) -> bool:
    """Whether a proxy of Serve answers at this address of this machine."""
    with requests.Session() as session:
        session.trust_env = False  # No way through a web proxy.
        try:
            own = "127.0.0.1" if host == "0.0.0.0" else host
            return session.get(f"http://{own}:{port}/-/healthz", timeout=5).ok
        except requests.RequestException:
            return False


def _taken(host: str, port: int) -> bool:
    """Whether another program has this address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _wait() -> None:
    """Wait until interrupted, or asked to end as service managers ask."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    run_command(main)
