"""Who is let in: what a request carries is held against the keys before the rest of it is read."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from biggan.errors import UserError
from serving.keys import Key, Keys
from serving.problems import ProblemError, problem_response


def _secret(headers: Headers) -> str | None:
    """The secret that a request carries; a scheme that is not ours leaves X-API-Key to count."""
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and bearer.strip():
        return bearer.strip()
    return headers.get("X-API-Key")


SECURITY = {
    "HTTPBearer": {"type": "http", "scheme": "bearer"},
    "APIKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
"""How a request carries its key, as OpenAPI has it."""


class RequireKey:
    """The dependency of routes that need a key, which they find in `request.state.key`.

    Without `keys` the endpoint is open, and the key is None.
    """

    def __init__(self, keys: Keys | None) -> None:
        self.keys = keys

    async def __call__(self, request: Request) -> Key | None:
        """The key of a request."""
        if not hasattr(request.state, "key"):  # Behind no door.
            request.state.key = self.admit(request.headers)
        found: Key | None = request.state.key
        return found

    def admit(self, headers: Headers) -> Key | None:
        """The key that `headers` carry, as `Keys.authenticate` has it; None if all are let in."""
        return None if self.keys is None else self.keys.authenticate(_secret(headers))


class Door:
    """Refuses strangers before what they send is read: FastAPI reads it ahead of dependencies."""

    def __init__(
        self, app: ASGIApp, guard: RequireKey, closed: str = "/v1/", open_to_all: Sequence[str] = ()
    ) -> None:
        """Paths under `closed` need a key.

        Without keys all paths but those `open_to_all` need a client on this very machine.
        """
        self.app, self.guard, self.closed, self.open_to_all = app, guard, closed, open_to_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                if scope["path"].startswith(self.closed):
                    scope.setdefault("state", {})["key"] = self.guard.admit(headers)
                if self.guard.keys is None and scope["path"] not in self.open_to_all:
                    _check_nearness((scope.get("client") or ("", 0))[0], headers.get("Host", ""))
            except ProblemError as e:
                refusal = problem_response(e.status, e.detail, e.errors, e.headers)
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _check_nearness(client: str, host: str) -> None:
    """Raise `ProblemError` 403 for who is not of this machine, where there are no keys.

    It may have been made to listen elsewhere after all, as by a file for `serve deploy`. And
    another site's page, in a browser of this machine, may have had its name lead here (DNS
    rebinding): the browser then tells that name.
    """
    if not _is_loopback(client):
        raise ProblemError(403, "this endpoint is open to its own machine alone")
    name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
    if not _is_loopback(name):
        raise ProblemError(403, f"this endpoint is open as localhost alone, not as {host[:100]}")


def check_exposure(host: str, no_auth: bool) -> None:
    """Raise `UserError` if an endpoint without keys would listen where other machines reach it."""
    if no_auth and not _is_loopback(host):
        raise UserError(
            f"--no-auth --host {host}: whoever reaches this machine could use the endpoint; leave"
            " --no-auth out and make a key (`make api-key NAME`), or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    # Any other name may lead elsewhere tomorrow, or on another machine of the cluster.
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
