"""Who is let in, over HTTP, and where an endpoint that lets in everybody may listen."""

import re
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

import pytest
import requests
import uvicorn
from conftest import free_port
from fastapi import Body, Depends, FastAPI

from biggan.errors import UserError
from serving.door import Door, RequireKey, check_exposure
from serving.keys import Key, Keys, KeyStore, Limits
from serving.limits import SECOND, Meter, Refusal
from serving.problems import install

NOON = int(datetime(2024, 2, 28, 12, tzinfo=UTC).timestamp()) * SECOND


@contextmanager
def served(api):
    """The address of an application that runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(api, port=free_port(), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.config.port}"
    server.should_exit = True
    thread.join()


@dataclass(frozen=True)
class Endpoint:
    url: str
    secrets: dict[str, str]
    made: list[int]
    """Images of each request that came as far as the route."""

    def post(self, path="/v1/generate", body=1, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return requests.post(self.url + path, json=body, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("http"))
    store = KeyStore(root)
    limits = {
        "alice": Limits(),
        "slow": Limits(rate=1),
        "poor": Limits(quota=3),
        "pets": Limits(models=("pets",)),
        "gone": Limits(),
    }
    secrets = {name: store.make(name, given) for name, given in limits.items()}
    store.revoke("gone")
    keys, meter, made = Keys(root), Meter(root, clock=lambda: NOON), []
    guard = RequireKey(keys)
    api = FastAPI()
    install(api)
    api.add_middleware(Door, guard=guard)

    async def generate(key: Annotated[Key, Depends(guard)], n: Annotated[int, Body(ge=1)]):
        key.check_model("digits@best")
        made.append(n)
        answer = meter.take(key, n)
        if isinstance(answer, Refusal):
            raise answer.problem()
        return {"key": key.name, "left": answer.left}

    api.post("/v1/generate")(generate)
    api.post("/generate")(generate)  # Behind no door.

    @api.post("/open")
    async def opened(key: Annotated[Key | None, Depends(RequireKey(None))]):
        return key

    with served(api) as url:
        yield Endpoint(url, secrets, made)


def problem(response):
    assert response.headers["Content-Type"] == "application/problem+json"
    told = response.json()
    assert told["status"] == response.status_code
    return told["detail"]


@pytest.mark.parametrize("path", ["/v1/generate", "/generate"])
def test_both_headers_carry_a_key(endpoint, path):
    alice = endpoint.secrets["alice"]
    for headers in (
        {"Authorization": f"Bearer {alice}"},
        {"authorization": f"bearer   {alice} "},
        {"X_API_Key": alice},
        {"Authorization": "Basic eDp5", "X_API_Key": alice},  # For a web proxy on the way.
        {"Authorization": f"Bearer {alice}", "X_API_Key": "x"},
    ):
        response = endpoint.post(path, **headers)
        assert (response.status_code, response.json()) == (200, {"key": "alice", "left": None})


@pytest.mark.parametrize("path", ["/v1/generate", "/generate"])
def test_strangers_are_kept_out(endpoint, path):
    alice, before = endpoint.secrets["alice"], len(endpoint.made)
    for headers in (
        {},
        {"Authorization": alice},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {alice}"},
        {"Authorization": "Bearer x"},
        {"Authorization": f"Bearer {alice}0"},
        {"Authorization": "Bearer x", "X_API_Key": alice},
        {"X_API_Key": f"Bearer {alice}"},
        {"X_API_Key": "\xff"},
    ):
        response = endpoint.post(path, **headers)
        assert response.status_code == 401, headers
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert "API key" in problem(response)
    for name, detail in (
        ("gone", "this API key is revoked"),
        ("pets", "this API key may not use model digits"),
    ):
        response = endpoint.post(path, X_API_Key=endpoint.secrets[name])
        assert (response.status_code, problem(response)) == (403, detail)
    assert len(endpoint.made) == before


def test_the_door_reads_nothing_of_a_stranger(endpoint):
    """Nor does it say what is wrong with it: the dependency alone would tell of broken JSON."""
    for path, status in (("/v1/generate", 401), ("/generate", 422)):
        headers = {"Content-Type": "application/json"}
        response = requests.post(endpoint.url + path, data=b"{", headers=headers, timeout=30)
        assert response.status_code == status
    with socket.create_connection(urlsplit(endpoint.url).netloc.split(":"), timeout=30) as line:
        line.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 401")


def test_too_much_is_told_with_the_time_to_wait(endpoint):
    slow, poor = endpoint.secrets["slow"], endpoint.secrets["poor"]
    assert endpoint.post(X_API_Key=slow, body=64).status_code == 200
    response = endpoint.post(X_API_Key=slow, body=1)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "60")
    assert problem(response) == "this API key may have 1 images a minute: try again in 60 s"
    assert endpoint.post(X_API_Key=poor, body=2).json() == {"key": "poor", "left": 1}
    response = endpoint.post(X_API_Key=poor, body=2)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "43200")
    assert "3 images a day (UTC), 1 of which are left: try again in" in problem(response)
    response = endpoint.post(X_API_Key=poor, body=4)
    assert (response.status_code, "Retry-After" in response.headers) == (403, False)
    assert "3 images a day, not 4" in problem(response)


def test_open_mode_asks_for_nothing(endpoint):
    assert endpoint.post("/open").json() is None


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "::ffff:127.0.0.1", "localhost", "LOCALHOST"]
)
def test_an_open_endpoint_may_listen_on_loopback(host):
    check_exposure(host, no_auth=True)


@pytest.mark.parametrize(
    "host",
    [
        *("0.0.0.0", "::", "", "0", "*", "10.0.0.1", "192.168.1.7", "8.8.8.8", "::ffff:10.0.0.1"),
        *("fe80::1", "2001:db8::1", "::ffff:0.0.0.0", "example.com", "127.0.0.1.example.com"),
        *("localhost.example.com", "1270.0.1", " "),
    ],
)
def test_an_open_endpoint_may_not_listen_elsewhere(host):
    mend = r"leave --no-auth out and make a key \(`make api-key NAME`\), or listen on 127\.0\.0\.1"
    with pytest.raises(UserError, match=rf"--host {re.escape(host)}: .*{mend}"):
        check_exposure(host, no_auth=True)
    check_exposure(host, no_auth=False)
