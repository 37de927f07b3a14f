"""The listener hears a cloud's notice (from a server on loopback) and drains a real node."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from conftest import free_port

from biggan.preemption import AWS, GoogleCloud, Notice, find_cloud

RAY = Path(sys.executable).with_name("ray")
TOKEN = "AQAE-token"


class Metadata(BaseHTTPRequestHandler):
    """What both services do: refuse who does not greet them as they ask, else answer or 404."""

    answers: dict[str, str] = {}  # noqa: RUF012
    cloud = ""
    token = TOKEN

    def do_PUT(self):
        ttl = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        if self.cloud == "aws" and self.path == "/latest/api/token" and ttl:
            return self.answer(200, self.token)
        return self.answer(404, "")

    def do_GET(self):
        if self.cloud == "aws" and self.headers["X-aws-ec2-metadata-token"] != self.token:
            return self.answer(401, "")
        if self.cloud == "google" and self.headers["Metadata-Flavor"] != "Google":
            return self.answer(403, "")
        found = self.answers.get(self.path)
        return self.answer(404 if found is None else 200, found or "")

    def answer(self, status, text):
        self.send_response(status)
        if self.cloud == "google":
            self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    """A metadata service; the class is given, whose attributes say what it answers."""

    class Own(Metadata):
        answers: dict[str, str] = {}  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Own.url = f"http://127.0.0.1:{server.server_port}"
    yield Own
    server.shutdown()
    server.server_close()


def aws_notice(metadata, seconds=120):
    ends = datetime.now(UTC) + timedelta(seconds=seconds)
    said = {"action": "terminate", "time": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
    metadata.answers["/latest/meta-data/spot/instance-action"] = json.dumps(said)


def test_aws_gives_notice_to_who_holds_a_token(metadata):
    metadata.cloud = "aws"
    cloud = find_cloud(metadata.url)
    assert isinstance(cloud, AWS)
    assert cloud.notice() is None
    metadata.answers["/latest/meta-data/events/recommendations/rebalance"] = "{}"
    assert cloud.notice() is None
    assert cloud.advised
    aws_notice(metadata)
    metadata.token = "another"  # The old one's time is over.
    notice = cloud.notice()
    assert notice.reason.startswith("AWS: spot terminate at 2")
    assert 115 <= notice.seconds <= 120


@pytest.mark.parametrize(
    "name, said, notice",
    [
        ("preempted", "TRUE", Notice("Google Cloud: preempted", 30)),
        (
            "maintenance-event",
            "TERMINATE_ON_HOST_MAINTENANCE",
            Notice("Google Cloud: ends for host maintenance", 60),
        ),
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", None),
    ],
)
def test_google_gives_notice(metadata, name, said, notice):
    metadata.cloud = "google"
    instance = "/computeMetadata/v1/instance"
    metadata.answers |= {f"{instance}/preempted": "FALSE", f"{instance}/maintenance-event": "NONE"}
    cloud = find_cloud(metadata.url)
    assert isinstance(cloud, GoogleCloud)
    assert cloud.notice() is None
    metadata.answers[f"{instance}/{name}"] = said
    assert cloud.notice() == notice


def test_where_there_is_no_cloud_the_listener_says_so_and_ends():
    url = f"http://127.0.0.1:{free_port()}"
    assert find_cloud(url) is None
    done = listen("127.0.0.1:1", url)
    said, _ = done.communicate(timeout=60)
    assert said == f"no metadata service at {url}: no cloud whose notice could be heard\n"
    assert done.returncode == 0


def test_an_address_that_is_none_is_refused(metadata):
    done = listen("head", metadata.url)
    said, _ = done.communicate(timeout=60)
    assert "--address 'head': must be HOST:PORT" in said
    assert done.returncode == 2


def listen(address, url, ip="127.0.0.1"):
    """The listener, as a cluster file starts it."""
    command = [sys.executable, "-m", "biggan.preemption", "--address", address]
    return subprocess.Popen(
        [*command, "--metadata", url, "--interval", "0.2", "--node-ip", ip],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def node(cluster, request):
    """A second machine of the cluster, at work: its IP and node id."""
    ip = request.param

    @ray.remote(resources={ip: 1})
    class Busy:  # Keeps its node from leaving as soon as it drains.
        def work(self):
            pass

    options = f"""--address={cluster.address} --node-ip-address={ip} --num-cpus=1 --block
        --object-store-memory=80000000 --dashboard-agent-listen-port={free_port()}
        --resources={json.dumps({ip: 1}, separators=(",", ":"))}"""
    started = subprocess.Popen(
        [RAY, "start", *options.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"},
    )
    try:
        node_id = until(lambda: alive(ip), 120)
        actor = Busy.remote()
        ray.get(actor.work.remote())
        yield ip, node_id
    finally:
        started.terminate()
        started.wait(timeout=60)


def alive(ip):
    """Id of the node at this IP, once it is up."""
    nodes = [node for node in ray.nodes() if node["NodeManagerAddress"] == ip and node["Alive"]]
    return nodes[0]["NodeID"] if nodes else ""


def until(true, seconds=30):
    """What `true` gives as soon as it does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = true()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


def time_left(node_id):
    """Seconds until the deadline of a draining node; 0 if it does not drain."""
    deadline = ray._private.state.state.get_draining_nodes().get(node_id)
    return deadline / 1000 - time.time() if deadline else 0


@pytest.mark.parametrize("node", ["127.0.0.3"], indirect=True)
def test_a_notice_drains_the_node_within_seconds(node, cluster, metadata):
    ip, node_id = node
    metadata.cloud = "aws"
    listener = listen(cluster.address, metadata.url, ip)
    try:
        assert f"listening to AWS for the end of {ip}" in listener.stdout.readline()
        assert not time_left(node_id)
        aws_notice(metadata)
        assert 90 < until(lambda: time_left(node_id)) <= 121
        said = listener.stdout.readline()
        assert f"draining node {node_id}: AWS: spot terminate at" in said
        assert listener.poll() is None  # It goes on.
    finally:
        listener.kill()
        listener.communicate()


@pytest.mark.parametrize("node", ["127.0.0.4"], indirect=True)
def test_sigterm_drains_the_node(node, cluster, metadata):
    ip, node_id = node
    metadata.cloud = "google"
    listener = listen(cluster.address, metadata.url, ip)
    assert f"listening to GoogleCloud for the end of {ip}" in listener.stdout.readline()
    listener.send_signal(signal.SIGTERM)
    assert 5 < until(lambda: time_left(node_id)) <= 31
    said, _ = listener.communicate(timeout=60)
    assert f"draining node {node_id}: SIGTERM" in said
    assert listener.returncode == 0
