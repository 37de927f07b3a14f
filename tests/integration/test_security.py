"""Who has no token, or another, is refused: jobs, requests to the dashboard, nodes."""

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import ray
import requests
from conftest import ROOT

RAY = Path(sys.executable).with_name("ray")
STRANGERS = {
    "with another token": {"RAY_AUTH_TOKEN": "0" * 64},
    "that asks for no authentication": {"RAY_AUTH_MODE": "disabled"},
}
stranger = pytest.mark.parametrize("environment", STRANGERS.values(), ids=list(STRANGERS))
REFUSALS = ("InvalidAuthToken", "401", "403")


@stranger
def test_a_job_is_refused(cluster, environment):
    command = [RAY, "job", "submit", "--address", cluster.dashboard, "--", "touch", "was-here"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 1
    assert any(refusal in done.stdout + done.stderr for refusal in REFUSALS)


@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {'0' * 64}"}])
@pytest.mark.parametrize("path", ["/api/version", "/api/jobs/", "/nodes?view=summary"])
def test_a_request_to_the_dashboard_is_refused(cluster, path, headers):
    answer = requests.get(cluster.dashboard + path, headers=headers, timeout=10)
    assert answer.status_code in (401, 403)


def test_a_job_by_http_is_refused(cluster):
    job = {"entrypoint": "touch was-here"}
    answer = requests.post(f"{cluster.dashboard}/api/jobs/", json=job, timeout=10)
    assert answer.status_code in (401, 403)


def test_who_has_the_token_is_answered(cluster):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    mine = {"Authorization": f"Bearer {token}"}
    answer = requests.get(f"{cluster.dashboard}/api/version", headers=mine, timeout=10)
    assert answer.json()["ray_version"] == ray.__version__


@stranger
def test_a_node_is_refused(cluster, environment):
    before = {node["NodeID"] for node in ray.nodes()}
    command = [RAY, "start", f"--address={cluster.address}", "--num-cpus=1", "--block"]
    node = subprocess.Popen(
        [*command, "--node-ip-address=127.0.0.9"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert any("InvalidAuthToken" in line for line in node.stdout)
    finally:
        node.kill()
        node.wait()
    assert {node["NodeID"] for node in ray.nodes()} == before


def test_the_dashboard_listens_on_loopback_alone(cluster):
    here = ray.util.get_node_ip_address()
    if here.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((here, urlsplit(cluster.dashboard).port), timeout=5)


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_token_makes_one_that_only_its_owner_reads_and_keeps_it(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    bin_folder = Path(sys.executable).parent
    command = ["make", "--old-file=install", "token", f"BIN={bin_folder}"]

    def make():
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    said, path = make(), tmp_path / ".ray/auth_token"
    token = path.read_text()
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert str(path) in said
    assert token not in said + make()
    assert path.read_text() == token
