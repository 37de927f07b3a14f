"""A cluster of many nodes on one machine schedules a sweep of many trials that compute nothing.

Every node is a raylet with its agents, as on a machine of its own (`ray.cluster_utils.Cluster`);
every trial is an actor in a process of its own that sleeps and reports, and the rest is ours: the
Tuner, ASHA, live table and summary of `biggan.sweep`. What is left is what Ray and we cost:

    python benchmarks/simulated_cluster.py --nodes 100 --trials 500

Prints the seconds that the cluster takes to start, trials a second, overhead a trial (time that its
place was taken, less the trial's own), memory and processor time of what a head runs (GCS,
dashboard, driver) as trials go by, the size of Tune's state, and where the driver's time goes.

A node takes about 130 MiB, a trial as much again: nodes are added until `--reserve` GiB are left.
More than ten nodes a core keep the machine from all else: run it where nobody else works.
Ray of others on the machine is left alone: session, token and address file are in a folder of its
own. All processes here share the cores, which bounds trials a second long before a real head does;
the head's processor time a trial is what carries over.
"""

# ruff: noqa: E402  Ray reads the environment when it is imported.

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SESSION = Path(tempfile.mkdtemp(prefix="sim"))  # Short: sockets lie in it.
(SESSION / "token").write_text(secrets.token_hex(32))
os.environ.update(  # Ray reads these when it is imported.
    RAY_TMPDIR=str(SESSION),
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN_PATH=str(SESSION / "token"),
    RAY_enable_worker_prestart="0",  # A process a trial, and none in stock.
    RAY_prestart_worker_first_driver="0",
    # Each node's agent looks at every process of the machine, which is all nodes' here.
    REPORTER_UPDATE_INTERVAL_MS="60000",
    OMP_NUM_THREADS="1",
)

import psutil
import ray
from machine import BenchmarkError
from ray import tune
from ray.cluster_utils import Cluster
from ray.tune.execution.tune_controller import TuneController
from ray.tune.schedulers import ASHAScheduler
from rich.console import Console
from train_step import positive

from biggan import presets, search
from biggan.config import RunConfig
from biggan.errors import UserError
from biggan.search import Search, default_space
from biggan.storage import Folder
from biggan.trials import LiveTable, SweepResult, summarize, trial_folder

OBJECT_STORE = 80 * 2**20
"""Bytes of shared memory a node; Ray wants no less than 75 MiB."""
GIB, MIB = 2**30, 2**20
ROLES = {
    "gcs_server": "GCS",
    "/raylet": "raylet",
    "DashboardAgent": "agent",
    "dashboard/agent.py": "agent",
    "RuntimeEnvAgent": "agent",
    "runtime_env/agent": "agent",
    "dashboard": "dashboard",  # And its modules, in processes of their own.
    "default_worker.py": "trial",
    "ray::": "trial",
}
"""What a process is, by the first of these in its program's name, else in its command."""
HEAD = ("driver", "GCS", "dashboard")


def stub(folder: str, seconds: float, reports: int, length: float) -> Callable[..., None]:
    """A trial that sleeps `seconds` and reports FIDs that follow from its values."""

    def trial(values: dict[str, Any]) -> None:
        began = time.time()
        # What our trials write, without their modules: torch alone would be half a gigabyte.
        run = Path(folder, "trial_" + tune.get_context().get_trial_id().rsplit("_", 1)[-1])
        run.mkdir(parents=True, exist_ok=True)
        level = 10 + 1e6 * abs(values["optim.lr_g"] - 5e-4)
        for k in range(1, reports + 1):
            time.sleep(seconds / reports)
            row = {"step": k, "kimg": length * k / reports, "fid": level / k}
            row["stop_reason"] = "finished" if k == reports else ""
            own = {"own_seconds": time.time() - began}
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row | own) + "\n")
            tune.report(row | own | {"best_fid": level / k})

    return trial


# ------------------------------------------------------------------------------- the cluster


def available() -> int:
    """Bytes of memory that new processes can have."""
    return int(psutil.virtual_memory().available)


@contextlib.contextmanager
def cluster(nodes: int, reserve: int) -> Iterator[Cluster]:
    """A head and as many nodes of one core as asked for, or as `reserve` bytes allow."""
    options = {"object_store_memory": OBJECT_STORE, "include_dashboard": True}
    us = psutil.Process()
    there = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **options})
    try:
        for k in range(nodes):
            if available() < reserve:
                print(f"memory for {k} nodes, of {nodes}", flush=True)
                break
            there.add_node(wait=False, num_cpus=1, object_store_memory=OBJECT_STORE)
        there.wait_for_nodes(timeout=600)
        ray.init(address=there.address, logging_level="ERROR", log_to_driver=False)
        yield there
    finally:
        processes = us.children(recursive=True)
        ray.shutdown()
        there.shutdown()
        _, left = psutil.wait_procs(processes, timeout=30)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        shutil.rmtree(SESSION, ignore_errors=True)


def role(process: psutil.Process) -> str:
    """What a process of the cluster is for; "other" for log monitor and autoscaler."""
    command = process.cmdline()
    # First the program: a raylet's arguments hold the commands of its agents.
    for text in (command[0] if command else "", " ".join(command)):
        for mark, name in ROLES.items():
            if mark in text:
                return name
    return "other"


class Watch(threading.Thread):
    """Notes memory and processor time of the head's processes every few seconds, while it runs.

    Pages that processes share count in part for each: the dashboard is a dozen of one kind.
    """

    def __init__(self, state: Path, every: float = 5.0) -> None:
        super().__init__(daemon=True)
        self.state = state
        self.every = every
        self.rows: list[dict[str, float]] = []
        self._over = threading.Event()
        self._head: dict[str, list[psutil.Process]] = {name: [] for name in HEAD}
        for process in psutil.Process().children(recursive=True):
            if (name := role(process)) in self._head:
                self._head[name].append(process)
        self._head["driver"].append(psutil.Process())

    def run(self) -> None:
        """Take rows until `stop`."""
        while not self._over.wait(self.every):
            self.look()

    def stop(self) -> None:
        """Take the last row."""
        self._over.set()
        self.join()
        self.look()

    def look(self) -> None:
        """Add a row."""
        row = {"at": time.monotonic(), "available": float(available())}
        for name, processes in self._head.items():
            times = [process.cpu_times() for process in processes]
            row[name] = sum(process.memory_full_info().pss for process in processes)
            row[f"{name} cpu"] = sum(taken.user + taken.system for taken in times)
        states = [p.stat().st_size for p in self.state.glob("experiment_state-*.json")]
        row["state"] = max(states, default=0)
        row["trials"] = sum(1 for _ in self.state.glob("trial_*"))
        self.rows.append(row)
        if len(self.rows) % 12 == 0 and sys.__stdout__:  # Now and then; others may be silenced.
            head = ", ".join(f"{name} {row[name] / MIB:.0f} MiB" for name in HEAD)
            cpu = ", ".join(f"{name} {row[f'{name} cpu']:.0f} s" for name in HEAD)
            seconds = row["at"] - self.rows[0]["at"]
            text = f"{seconds:.0f} s: {row['trials']} trials begun; {head}; cpu {cpu}"
            print(f"{text}; state {row['state'] / 1024:.0f} KiB", file=sys.__stdout__, flush=True)


def idle_cores(seconds: float) -> float:
    """Cores that the cluster takes with nothing to do."""

    def taken() -> float:
        total = 0.0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    before = taken()
    time.sleep(seconds)
    return (taken() - before) / seconds


def by_role() -> dict[str, tuple[int, float]]:
    """Processes of the cluster, and their memory in all, shared pages shared out."""
    found: dict[str, list[int]] = defaultdict(list)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found[role(process)].append(process.memory_full_info().pss)
    return {name: (len(sizes), sum(sizes)) for name, sizes in found.items()}


# --------------------------------------------------------------------------------- the sweep


@contextlib.contextmanager
def timed(*methods: tuple[type, str]) -> Iterator[dict[str, float]]:
    """Seconds spent in these methods, by class and name."""
    spent: dict[str, float] = {}
    originals = [(owner, name, getattr(owner, name)) for owner, name in methods]

    def wrap(label: str, method: Callable[..., Any]) -> Callable[..., Any]:
        spent[label] = 0.0

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent[label] += time.perf_counter() - begin

        return wrapped

    for owner, name, method in originals:
        setattr(owner, name, wrap(f"{owner.__name__}.{name}", method))
    try:
        yield spent
    finally:
        for owner, name, method in originals:
            setattr(owner, name, method)


def sweep(args: argparse.Namespace, concurrent: int) -> dict[str, Any]:
    """`biggan.sweep` from its Tuner on, with the stub for a trial; the figures of it."""
    config = presets.get("laptop").override({"total_kimg": 9})
    space = default_space(config)
    folder = Folder(str(SESSION / "sweeps" / "stub"))
    Path(folder.path).mkdir(parents=True)
    settings = Search(num_trials=args.trials, max_concurrent=concurrent)
    search._quiet_tune()
    trial = tune.with_resources(
        stub(folder.path, args.seconds, args.reports, config.total_kimg), {"cpu": 1}
    )
    tuner = search._new_tuner(trial, config, space, folder, settings)
    watch = Watch(Path(folder.path))
    watch.look()
    watch.start()
    methods = (
        (LiveTable, "on_step_end"),
        (TuneController, "checkpoint"),
        (ASHAScheduler, "on_trial_result"),
        (TuneController, "step"),
    )
    said = io.StringIO()
    begin = time.perf_counter()
    with timed(*methods) as spent, contextlib.redirect_stdout(said):
        grid = tuner.fit()
    wall = time.perf_counter() - begin
    watch.stop()
    if failed := grid.num_errors:
        raise BenchmarkError(f"{failed} of {args.trials} trials failed: {grid.errors[0]}")
    drawing = draw(grid._experiment_analysis.trials, config)
    summary, outcome = sum_up(folder, config, grid)
    own = [result.metrics["own_seconds"] for result in grid]
    first, last = watch.rows[0], watch.rows[-1]
    return {
        "trials": len(own),
        "concurrent": concurrent,
        "wall_seconds": wall,
        "trials_per_second": len(own) / wall,
        "own_seconds": statistics.mean(own),
        "overhead_seconds": overhead(wall, concurrent, own),
        "stopped_early": int((outcome.trials["status"] == "stopped early").sum()),
        "memory_bytes": {name: [first[name], last[name]] for name in HEAD},
        "cpu_seconds_per_trial": {
            name: (last[f"{name} cpu"] - first[f"{name} cpu"]) / len(own) for name in HEAD
        },
        "state_bytes": last["state"],
        "least_available_bytes": min(row["available"] for row in watch.rows),
        "driver_seconds_in": spent,
        "table_seconds": drawing,
        "summarize_seconds": summary,
        "lines_printed": said.getvalue().count("\n"),
        "rows": watch.rows,
    }


def draw(trials: Sequence[Any], config: RunConfig) -> float:
    """Seconds in which the live table is drawn once."""
    table = LiveTable(list(default_space(config)), config, len(trials))
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    begin = time.perf_counter()
    console.print(table._table(list(trials)))
    return time.perf_counter() - begin


def sum_up(folder: Folder, config: RunConfig, grid: Any) -> tuple[float, SweepResult]:
    """Seconds in which the sweep's tables and plots are made, and what is in them."""
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        outcome = summarize(folder, config, list(default_space(config)), grid, lambda _trial: None)
    return time.perf_counter() - begin, outcome


def tables(trials: int, reports: int) -> dict[str, float]:
    """What so many trials cost our own tables: no cluster, only what trials would leave behind."""
    config = presets.get("laptop").override({"total_kimg": 9})
    space = default_space(config)
    folder = Folder(str(SESSION / "sweeps" / "stub"))
    ended = []
    for k in range(trials):
        trial_id = f"stub_{k:05d}"
        run = Path(folder.path, trial_folder(trial_id))
        run.mkdir(parents=True)
        rows = [{"step": i, "kimg": 9 * i / reports, "fid": 10 + (k + 1) / i}
                for i in range(1, reports + 1)]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        last = rows[-1] | {"trial_id": trial_id, "best_fid": rows[-1]["fid"]}
        last["stop_reason"] = "finished"
        values = {name: domain.sample() for name, domain in space.items()}
        ended.append(
            SimpleNamespace(trial_id=trial_id, status="TERMINATED", is_finished=lambda: True,
                            last_result=last, metrics=last, config=values, error=None)
        )  # fmt: skip
    drawing, (summary, _) = draw(ended, config), sum_up(folder, config, ended)
    return {"trials": trials, "table_seconds": drawing, "summarize_seconds": summary}


def overhead(wall: float, concurrent: int, own: Sequence[float]) -> float:
    """Seconds that a trial held one of `concurrent` places beyond its own."""
    return wall * min(concurrent, len(own)) / len(own) - statistics.mean(own)


def print_report(figures: dict[str, Any]) -> None:
    mib = {name: [b / MIB for b in pair] for name, pair in figures["memory_bytes"].items()}
    cpu = figures["cpu_seconds_per_trial"]
    print(f"{figures['trials']} trials of {figures['own_seconds']:.2f} s,"
          f" {figures['concurrent']} at a time, in {figures['wall_seconds']:.0f} s:"
          f" {figures['trials_per_second']:.2f} trials/s,"
          f" {figures['stopped_early']} stopped early")  # fmt: skip
    print(f"overhead a trial: {figures['overhead_seconds']:.2f} s of its place")
    print(f"{'of the head':12}{'before':>12}{'after':>12}{'growth a trial':>18}{'cpu a trial':>14}")
    for name, (before, after) in mib.items():
        growth = (after - before) * 1024 / figures["trials"]
        print(f"{name:12}{before:8.0f} MiB{after:8.0f} MiB{growth:14.0f} KiB"
              f"{cpu[name] * 1000:11.0f} ms")  # fmt: skip
    print(f"Tune's state: {figures['state_bytes'] / 1024:.0f} KiB,"
          f" {figures['state_bytes'] / 1024 / figures['trials']:.1f} KiB a trial")  # fmt: skip
    for name, seconds in figures["driver_seconds_in"].items():
        print(f"driver in {name}: {seconds:.1f} s, {seconds / figures['wall_seconds']:.1%}")
    print(f"one drawing of the live table: {figures['table_seconds']:.2f} s;"
          f" summarize: {figures['summarize_seconds']:.1f} s;"
          f" lines printed meanwhile: {figures['lines_printed']:,}")  # fmt: skip


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What a sweep of many trials costs the head of a large cluster; the nodes are"
        " simulated, a raylet each, and trials sleep.",
        epilog="example: python benchmarks/simulated_cluster.py --nodes 20 --trials 100",
    )
    parser.add_argument("--nodes", type=int, default=100,
                        help="of one core each; 0: no cluster, only our tables of so many"
                        " trials")  # fmt: skip
    parser.add_argument("--trials", type=positive, default=500)
    parser.add_argument("--seconds", type=float, default=2.0, help="that a trial sleeps")
    parser.add_argument("--reports", type=positive, default=9, help="of FID, a trial")
    parser.add_argument("--max-concurrent", type=int, default=0,
                        help="trials at a time; 0: what nodes and memory allow")  # fmt: skip
    parser.add_argument("--reserve", type=float, default=4.0, metavar="GIB",
                        help="memory of the machine left alone")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return parser.parse_args(argv)


TRIAL_BYTES = 160 * MIB
"""Memory kept for a trial's process, which is a Python with Ray and Tune."""


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    if not args.nodes:
        figures = tables(args.trials, args.reports)
        print(f"{args.trials} trials: one drawing of the live table {figures['table_seconds']:.2f}"
              f" s, summarize {figures['summarize_seconds']:.1f} s")  # fmt: skip
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
        return
    reserve = int(args.reserve * GIB)
    if available() < reserve + 2 * GIB:
        raise BenchmarkError(
            f"{available() / GIB:.1f} GiB of memory are free: a head and a few nodes take 2 GiB"
            f" beside --reserve {args.reserve:g}"
        )
    begin, before = time.perf_counter(), available()
    print(f"ray {ray.__version__}, {os.cpu_count()} cores, {before / GIB:.1f} GiB free", flush=True)
    with cluster(args.nodes, reserve):
        started = time.perf_counter() - begin
        nodes = sum(node["Alive"] for node in ray.nodes()) - 1
        time.sleep(min(20, nodes))  # Agents that are still starting.
        idle = idle_cores(min(20, nodes))
        took = before - available()
        print(f"{nodes} nodes in {started:.0f} s, {took / GIB:.1f} GiB,"
              f" {idle:.2f} cores while idle", flush=True)  # fmt: skip
        roles = by_role()
        for name, (count, pss) in sorted(roles.items()):
            print(f"  {count:4} {name}: {pss / MIB:.0f} MiB, {pss / MIB / count:.0f} each")
        room = max((available() - reserve // 2) // TRIAL_BYTES, 1)
        concurrent = min(args.max_concurrent or nodes, nodes, room, args.trials)
        figures = sweep(args, concurrent)
        print_report(figures)
    if args.json:
        figures |= {"nodes": nodes, "start_seconds": started, "bytes_of_nodes": took}
        figures |= {"idle_cores": idle}
        figures |= {"processes": roles, "ray": ray.__version__}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        shutil.rmtree(SESSION, ignore_errors=True)
