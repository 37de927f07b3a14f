"""Drains this machine's Ray node when its cloud says that the machine is about to be taken.

Ray moves work off a node that drains, and Ray Train saves first; but it does not listen to the
cloud. `python -m biggan.preemption` does, beside `ray start`, on machines of AWS and Google Cloud.
In Kubernetes it is not needed: there a notice becomes the pod's SIGTERM, on which `ray start
--block` drains its node by itself.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime

import ray
import requests
import tyro
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

logger = logging.getLogger("biggan.preemption")

ATTEMPTS = 3
"""To find a metadata service, which on a machine that has just booted may need a moment."""


@dataclass(frozen=True)
class Notice:
    """The machine goes."""

    reason: str
    seconds: int
    """Left until then."""


class Cloud(ABC):
    """A cloud's metadata service."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.session = requests.Session()
        self.session.trust_env = False  # The service is on this machine's own link: no proxy.

    @abstractmethod
    def is_here(self) -> bool:
        """Whether this machine is of this cloud."""

    @abstractmethod
    def notice(self) -> Notice | None:
        """What the cloud says of the machine's end; None while it says nothing."""

    def request(self, method: str, path: str, header: str, value: str) -> requests.Response:
        """One request, with the header that this cloud demands."""
        headers = {header: value}
        return self.session.request(method, self.url + path, headers=headers, timeout=2)


class AWS(Cloud):
    """EC2's service, version 2, which answers only with a token that a PUT has asked for.

    Spot machines get a notice two minutes ahead.
    """

    header = "X-aws-ec2-metadata-token"
    token = ""
    advised = False

    def is_here(self) -> bool:
        """Whether a token is given here."""
        answer = self.request("PUT", "/latest/api/token", f"{self.header}-ttl-seconds", "21600")
        self.token = answer.text if answer.ok else ""
        return answer.ok

    def notice(self) -> Notice | None:
        """A spot machine's end."""
        action = self._get("/latest/meta-data/spot/instance-action")
        if action is not None:
            said = action.json()
            left = datetime.fromisoformat(said["time"]) - datetime.now(UTC)
            reason = f"AWS: spot {said['action']} at {said['time']}"
            return Notice(reason, max(1, int(left.total_seconds())))
        if not self.advised and self._get("/latest/meta-data/events/recommendations/rebalance"):
            self.advised = True  # It may never come to a notice: nothing is drained.
            logger.info("AWS advises to leave this machine: a notice is more likely than usual")
        return None

    def _get(self, path: str) -> requests.Response | None:
        """What is there; None if there is nothing."""
        answer = self.request("GET", path, self.header, self.token)
        if answer.status_code == 401 and self.is_here():  # The token's time is over.
            answer = self.request("GET", path, self.header, self.token)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        return answer


class GoogleCloud(Cloud):
    """Compute Engine's service. Spot machines get a notice half a minute ahead."""

    def is_here(self) -> bool:
        """Whether Google answers."""
        answer = self.request("GET", "/computeMetadata/v1/", "Metadata-Flavor", "Google")
        return answer.headers.get("Metadata-Flavor") == "Google"

    def notice(self) -> Notice | None:
        """A spot machine's end, or that of any machine with GPUs for maintenance."""
        if self._get("preempted") == "TRUE":
            return Notice("Google Cloud: preempted", 30)
        if self._get("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":
            return Notice("Google Cloud: ends for host maintenance", 60)
        return None

    def _get(self, name: str) -> str:
        path = f"/computeMetadata/v1/instance/{name}"
        answer = self.request("GET", path, "Metadata-Flavor", "Google")
        answer.raise_for_status()
        return answer.text.strip()


def find_cloud(url: str) -> Cloud | None:
    """The cloud whose metadata service answers at this URL; None if none does."""
    for cloud in (AWS(url), GoogleCloud(url)):
        try:
            if cloud.is_here():
                return cloud
        except requests.RequestException:
            continue
    return None


def drain(address: str, ip: str, notice: Notice) -> bool:
    """Ask the cluster at `address` to drain what it has at this IP; False if it could not be done.

    As `ray drain-node` by hand, which asks for the node's id.
    """
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=10)
    except ray.exceptions.RayError as error:
        logger.error("the cluster at %s does not answer: %s", address, error)
        return False
    here = [
        node_id.hex()
        for node_id, node in nodes.items()
        if node.node_manager_address == ip and node.state == GcsNodeInfo.ALIVE
    ]
    if not here:
        logger.error("the cluster at %s has no node at %s: give --node-ip", address, ip)
    drained = [_drain_node(address, node, notice) for node in here]
    return bool(drained) and all(drained)


def _drain_node(address: str, node: str, notice: Notice) -> bool:
    options = {
        "--address": address,
        "--node-id": node,
        "--reason": "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message": notice.reason,
        "--deadline-remaining-seconds": str(notice.seconds),
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    for option in options.items():
        command.extend(option)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        logger.error("draining node %s failed: %s", node, done.stderr.strip())
    else:
        logger.info("draining node %s: %s, in %d s", node, notice.reason, notice.seconds)
    return done.returncode == 0


@dataclass(frozen=True)
class Listen:
    """Drain this machine's Ray node once AWS or Google Cloud say that they take the machine away.

    Training then saves, and work moves to other machines. SIGTERM counts as a notice.
    Where there is no metadata service, says so and ends with status 0.
    """

    address: str = os.environ.get("RAY_ADDRESS", "")
    """HOST:PORT of the cluster's head, as for `ray start --address`; by default $RAY_ADDRESS."""
    node_ip: str = ""
    """IP of this machine's node; by default as `ray start` finds it."""
    metadata: str = "http://169.254.169.254"
    """URL of the metadata service, the same in both clouds."""
    interval: float = 2.0
    """Seconds between two looks."""
    grace: int = 30
    """Seconds that SIGTERM is taken to leave."""


def main() -> int:
    """Listen until SIGTERM."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, stream=sys.stdout)
    command = tyro.cli(Listen)
    if ":" not in command.address:
        print(
            f"error: --address {command.address!r}: must be HOST:PORT of the cluster's head; give"
            " it, or set RAY_ADDRESS",
            file=sys.stderr,
        )
        return 2
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ip = command.node_ip or ray.util.get_node_ip_address()
    for _ in range(ATTEMPTS):
        cloud = find_cloud(command.metadata)
        if cloud or stop.wait(command.interval):
            break
    if cloud is None and not stop.is_set():
        print(f"no metadata service at {command.metadata}: no cloud whose notice could be heard")
        return 0
    logger.info("listening to %s for the end of %s", type(cloud).__name__, ip)
    drained = ""
    while not stop.wait(command.interval):
        notice = _look(cloud)
        if notice and notice.reason != drained and drain(command.address, ip, notice):
            drained = notice.reason
    return 0 if drain(command.address, ip, Notice("SIGTERM", command.grace)) else 1


def _look(cloud: Cloud | None) -> Notice | None:
    try:
        return cloud.notice() if cloud else None
    except (requests.RequestException, ValueError, KeyError) as error:
        logger.warning("the metadata service: %s", error)
        return None


if __name__ == "__main__":
    sys.exit(main())
