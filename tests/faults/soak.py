"""Training that something befalls again and again: `make soak`.

Two workers on two nodes train a small run. Every `--every` seconds one of `FAULTS`, drawn by
`--seed`, strikes. Then the run is brought to its end, and looked at: every row of metrics there
once, every checkpoint as it was written, no worker left behind. Prints what struck when, what it
cost, and a summary for docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faults.disturbed import EVERY, newest, steps_as_kimg, train, wait_for_step
from faults.machines import Command, Machines

from biggan.checkpoint import STATE
from biggan.runs import checkpoints, is_undamaged, read_metrics
from biggan.storage import Folder, locate


@dataclass
class Soak:
    """A run, the machines that it trains on, and what has struck it."""

    machines: Machines
    run: Folder
    random: random.Random
    flags: tuple[str, ...] = ()
    command: Command | None = None
    struck: list[str] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)
    """Seconds from each fault to the next checkpoint."""
    steps: int = 0
    """Taken in the end."""

    def begin(self) -> None:
        """Begin the command, or again."""
        self.command = train(self.machines, self.run.name, *self.flags)

    def strike(self) -> None:
        """Let one fault happen, and wait until the run has come further."""
        fault = self.random.choice(FAULTS)
        before, began = newest(self.run), time.monotonic()
        fault(self)
        if self.command and self.command.process.poll() is not None:
            return  # The run ended first.
        wait_for_step(self.run, before + 1, timeout=240)
        self.struck.append(fault.__name__)
        self.recovery.append(time.monotonic() - began)
        print(f"{fault.__name__:24} at step {before}: {self.recovery[-1]:.0f} s", flush=True)

    def end(self) -> None:
        """Let the run come to its end, and see that it is whole and has left nothing behind."""
        assert self.command
        self.command.kill()
        self.steps = (newest(self.run) // 1000 + 1) * 1000
        total = str(steps_as_kimg(self.steps))
        train(self.machines, self.run.name, "--total-kimg", total).wait(timeout=600)
        check_whole(self.run, self.steps)
        assert not self.machines.workers(), "workers are left behind"

    def worker_dies(self) -> None:
        """SIGKILL to a worker in mid-step."""
        if alive := self.machines.workers():
            self.random.choice(alive).kill()

    def worker_hangs(self) -> None:
        """A worker stands still for ten seconds."""
        if alive := self.machines.workers():
            stopped = self.random.choice(alive)
            stopped.suspend()
            time.sleep(10)
            stopped.resume()

    def node_dies(self) -> None:
        """A node with all its processes; another comes in its place."""
        self.machines.kill(self._a_node())
        self._replace()

    def node_is_drained(self) -> None:
        """SIGTERM to a node, which drains it; another comes in its place."""
        self.machines.terminate(self._a_node())
        self._replace()

    def driver_dies(self) -> None:
        """SIGKILL to the command; the same one is run again."""
        assert self.command
        self.command.kill()
        self.begin()

    def cluster_dies(self) -> None:
        """Head, nodes and command; all come back."""
        assert self.command
        for name in list(self.machines.nodes):
            self.machines.kill(name)
        self.command.kill()
        self.machines.restart()
        self.begin()

    def checkpoint_is_torn(self) -> None:
        """The newest checkpoint loses its last bytes, and a worker dies."""
        name = list(checkpoints(self.run))[-1]
        state = Path(self.run.path) / name / STATE
        os.truncate(state, state.stat().st_size - 100)
        self.worker_dies()

    def _a_node(self) -> str:
        return self.random.choice([name for name in self.machines.nodes if name != "head"])

    def _replace(self) -> None:
        self.machines.start_node(f"n{len(self.struck)}-{time.monotonic_ns()}")


FAULTS: list[Callable[[Soak], None]] = [
    Soak.worker_dies,
    Soak.worker_hangs,
    Soak.node_dies,
    Soak.node_is_drained,
    Soak.driver_dies,
    Soak.cluster_dies,
    Soak.checkpoint_is_torn,
]


def check_whole(run: Folder, steps: int) -> None:
    """Every row once, none missing; every checkpoint that is listed as it was written."""
    rows = [row["step"] for row in read_metrics(run)]
    assert rows == sorted(set(rows)), "rows twice, or out of order"
    assert rows[-1] == steps, f"the last row is of step {rows[-1]}, not {steps}"
    per_kimg = {int(steps_as_kimg(step)) for step in rows}
    assert per_kimg >= set(range(1, int(steps_as_kimg(steps)))), "rows are missing"
    assert all(is_undamaged(run / name) for name in checkpoints(run))


def soak(machines: Machines, minutes: float, every: float, seed: int) -> Soak:
    """Let faults befall a run for a while, bring it to its end, and look at it."""
    run = locate("runs", "soak")
    soaked = Soak(machines, run, random.Random(seed), ("--total-kimg", "1000000"))
    begin = time.monotonic()
    soaked.begin()
    wait_for_step(run, 2 * EVERY)
    while (now := time.monotonic()) - begin < 60 * minutes:
        soaked.strike()
        time.sleep(max(0.0, every - (time.monotonic() - now)))
    soaked.end()
    return soaked


def main() -> None:
    """Soak for a while, and tell how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="how long (60)")
    parser.add_argument("--every", type=float, default=120, help="seconds between faults (120)")
    parser.add_argument("--seed", type=int, default=0, help="decides what strikes (0)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    os.environ |= {"BIGGAN_STORAGE": str(folder / "s"), "BIGGAN_CACHE": str(folder / "c")}
    machines = Machines(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        machines.restart()
        source = ["--source", "digits", "--resolution", "16"]
        machines.begin("prepare", "--name", "digits", *source).wait()
        soaked = soak(machines, given.minutes, given.every, given.seed)
    finally:
        machines.close()
    struck, took = soaked.struck, soaked.recovery
    print(f"\n{len(struck)} faults in {given.minutes:g} minutes, {soaked.steps} steps, whole")
    for name, count in Counter(struck).most_common():
        times = [s for f, s in zip(struck, took, strict=True) if f == name]
        print(f"| {name} | {count} | {statistics.median(times):.0f} s | {max(times):.0f} s |")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
