"""A Ray cluster of several nodes on this machine, each of which can be killed and replaced.

Every node is a `ray start --block` of its own, with all the processes that it starts.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from conftest import ROOT, free_port

RAY = Path(sys.executable).with_name("ray")


def environment(**changes: str) -> dict[str, str]:
    """What nodes and commands run with: notices heeded, and at once; keys to an S3 API."""
    always = {
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    env = os.environ | always | changes
    env.pop("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", None)
    return env


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that came of it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all that came of it, and wait until they are gone."""
    processes = tree(pid)
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=20)


@dataclass
class Machines:
    """The nodes, by name, and the commands that were begun there."""

    folder: Path
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    commands: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start_head(self) -> None:
        """The head, on which no work is done."""
        self._start(
            "head",
            f"""--head --num-cpus=0 --port={self.port} --include-dashboard=true
            --dashboard-port={self.dashboard} --ray-client-server-port={free_port()}
            --temp-dir={self.folder}/ray""",
        )
        self._wait_for_another(set())

    def start_node(self, name: str, cpus: int = 1) -> None:
        """A node with room for `cpus` workers."""
        before = self._alive()
        self._start(name, f"--address={self.address} --num-cpus={cpus}")
        self._wait_for_another(before)

    def _start(self, name: str, options: str) -> None:
        always = f"""--block --disable-usage-stats --node-ip-address=127.0.0.1
            --object-store-memory=100000000 --dashboard-agent-listen-port={free_port()}"""
        with (self.folder / f"{name}.log").open("a") as log:
            self.nodes[name] = subprocess.Popen(
                [RAY, "start", *options.split(), *always.split()],
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )

    def _alive(self) -> set[str]:
        """The nodes that the head takes for alive; for a while, also one that was killed."""
        done = self.ray("list", "nodes", "--filter", "state=ALIVE", "--format", "json")
        return set(re.findall(r'"node_id": "(\w+)"', done.stdout)) if not done.returncode else set()

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = environment(RAY_ADDRESS=f"http://127.0.0.1:{self.dashboard}")
        return subprocess.run([RAY, *arguments], env=env, capture_output=True, text=True)

    def _wait_for_another(self, before: set[str]) -> None:
        deadline = time.monotonic() + 120
        while not self._alive() - before:
            assert time.monotonic() < deadline, "a node did not come up"
            time.sleep(1)

    def kill(self, name: str) -> None:
        """The sudden death of a node."""
        kill_tree(self.nodes.pop(name).pid)

    def terminate(self, name: str) -> None:
        """SIGTERM to a node, as a machine gets it that is shut down."""
        self.nodes[name].send_signal(signal.SIGTERM)

    def workers(self) -> list[psutil.Process]:
        """The workers of Ray Train on the nodes."""
        processes = [p for node in self.nodes.values() for p in tree(node.pid)]
        named = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in process.name():
                    named.append(process)
        return named

    def begin(self, *command: str, **env: str) -> Command:
        """Run a command of jobs/, as a process of its own, on this cluster."""
        name, *rest = command
        log = self.folder / f"{name}-{len(self.commands)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, f"jobs/{name}.py", *rest],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env=environment(RAY_ADDRESS=self.address, **env),
                start_new_session=True,
            )
        self.commands.append(process)
        return Command(process, log)

    def restart(self) -> None:
        """Bring up again what has been killed: the head, and two nodes."""
        for name in [name for name in self.nodes if name != "head"]:
            self.kill(name)
        if "head" not in self.nodes:
            self.start_head()
        self.start_node("a")
        self.start_node("b")

    def close(self) -> None:
        """End all that was begun."""
        for process in [*self.commands, *self.nodes.values()]:
            kill_tree(process.pid)


@dataclass
class Command:
    """A command that runs, and what it has said."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, status: int = 0, timeout: float = 240) -> str:
        """Its output once it has ended; asserts its exit status."""
        try:
            ended = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"goes on after {timeout} s:\n{self.said()}") from None
        assert ended == status, self.said()
        return self.said()

    def said(self) -> str:
        """Its output. Every node of this machine finds the logs of all, and sends them along."""
        return "\n".join(dict.fromkeys(self.log.read_text().splitlines()))

    def kill(self) -> None:
        """SIGKILL to the command alone; what it had begun elsewhere is left to itself."""
        self.process.kill()
        self.process.wait()
