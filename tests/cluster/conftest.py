"""What the tests share: one cluster of three hosts, and the S3 API that all of it is stored in."""

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from cluster.hosts import DIES_WITH_US, GATEWAY, Network, missing
from cluster.on_prem import OnPrem, until
from conftest import free_port


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with Network(tmp_path_factory.mktemp("hosts")) as network:
        yield network


@pytest.fixture(scope="session")
def exports(network):
    """An S3 API that all hosts reach: the environment that leads to it, also set here."""
    port = free_port()
    url = f"http://{GATEWAY}:{port}"
    moto = Path(sys.executable).with_name("moto_server")
    server = subprocess.Popen(
        [*DIES_WITH_US, moto, "-H", GATEWAY, "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: requests.put(f"{url}/bucket", timeout=5).ok)
    exports = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        # What pyarrow would send by default, moto takes for content.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "BIGGAN_STORAGE": "s3://bucket/biggan?scheme=http&region=us-east-1"
        f"&endpoint_override={quote(url, safe='')}",
    }
    os.environ.update(exports)
    yield exports
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def on_prem(network, exports, tmp_path_factory):
    """The cluster, up."""
    head, *workers = [network.host(name) for name in ("head", "one", "two")]
    cluster = OnPrem(tmp_path_factory.mktemp("operator"), head, workers)
    cluster.describe(network.key, exports)
    cluster.ray("get-auth-token --generate")
    cluster.up()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def digits(on_prem):
    """The digits prepared by a submitted job; what it printed."""
    return on_prem.submit("jobs/prepare.py --source digits")
