"""What integration tests share: one endpoint."""

import subprocess
import sys

import pytest
from conftest import ROOT, free_port
from ray import serve


@pytest.fixture(scope="session")
def endpoint(tiny_model):
    """`python -m serving` on the shared cluster, serving `tiny@best`; gives its URL."""
    port = free_port()
    command = [sys.executable, "-m", "serving", "--model", "tiny@best", "--port", str(port)]
    done = subprocess.run([*command, "--detach"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    url = f"http://127.0.0.1:{port}"
    assert f"serving tiny@v1 at {url}" in done.stdout
    yield url
    serve.shutdown()
