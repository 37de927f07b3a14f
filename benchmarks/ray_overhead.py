"""What Ray Train costs in steady state, against the same training loop under torchrun.

Both train the same configuration on the same data set and machine, in turn, with equally many
workers, threads a worker, and niceness (Ray's workers run at 15). Each run is a command of its own,
so that no Ray is up while torchrun's turn lasts, unless `ray start` began one before.

    python jobs/prepare.py --source digits --name digits16 --resolution 16
    python benchmarks/ray_overhead.py --dataset digits16 --workers 2 --threads 1

Prints the ratio of images a second, Ray Train to torchrun, by pair of runs, and their median: the
claim is that it is no less than 0.98. A run's figure is the median of `images_per_second` over the
rows of its metrics.jsonl, less the first quarter. Those time the steps alone: data, both networks
and the averaging over workers, but no evaluation, checkpoint or report, which a run does once here,
at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import BenchmarkError, describe
from train_step import parse_overrides, positive

import biggan
from biggan.config import RunConfig
from biggan.data.dataset import DatasetInfo, open_dataset
from biggan.distributed import Scaling, check_fit
from biggan.errors import UserError
from biggan.loop import KeepCheckpoints, TrainingLoop
from biggan.parallel import Workers
from biggan.runs import read_metrics
from biggan.storage import locate

NICENESS = 15
"""That of Ray's workers by default."""
RAY, TORCHRUN = "Ray Train", "torchrun"


def under_ray(task: dict[str, Any]) -> None:
    """Train as `biggan.train` does."""
    scaling = Scaling(task["workers"], torch.cuda.is_available(), task["threads"], max_failures=0)
    config = RunConfig.parse(task["config"])
    print(biggan.train(config, task["name"], root=task["root"], scaling=scaling).stop_reason)


def under_torchrun(task: dict[str, Any]) -> None:
    """One worker's part of the same."""
    os.nice(NICENESS)
    torch.set_num_threads(task["threads"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    config = RunConfig.parse(task["config"])
    run = locate("runs", task["name"], task["root"])
    loop = TrainingLoop(
        config,
        open_dataset(config),
        run,
        Workers.current(),
        KeepCheckpoints(run, config.checkpoint.keep),
    )
    print(loop.run())
    dist.destroy_process_group()


def images_per_second(launcher: str, task: dict[str, Any]) -> float:
    """Train once, under that launcher; the speed in steady state."""
    folder = Path(task["root"])
    (folder / "task.json").write_text(json.dumps(task))
    command = [__file__, "--task", str(folder / "task.json")]
    if launcher == TORCHRUN:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc_per_node={task['workers']}", *command, "--worker"]
    equal = {"OMP_NUM_THREADS": str(task["threads"]), "RAY_worker_niceness": str(NICENESS)}
    process = subprocess.run(
        [sys.executable, *command], env=os.environ | equal, capture_output=True, text=True
    )
    if process.returncode or "finished" not in process.stdout:
        raise BenchmarkError(f"{launcher} did not finish:\n{process.stdout}{process.stderr}")
    rows = read_metrics(locate("runs", task["name"], task["root"]))
    speeds: list[float] = [row["images_per_second"] for row in rows]
    return statistics.median(speeds[len(speeds) // 4 :])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Ray Train against the same training loop under torchrun.",
        epilog="example: python benchmarks/ray_overhead.py --dataset digits16 --workers 2"
        " --threads 1",
    )
    parser.add_argument("--dataset", required=True, help="a prepared data set")
    parser.add_argument("--storage", help="storage root, path or URI; by default $BIGGAN_STORAGE,"
                        " else ./storage")  # fmt: skip
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--threads", type=positive, default=1, help="of each worker")
    parser.add_argument("--kimg", type=positive, default=20, help="thousand real images a run")
    parser.add_argument("--rounds", type=positive, default=5, help="pairs of runs")
    parser.add_argument("--preset", default="laptop", choices=sorted(biggan.presets.PRESETS))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of the run by dotted name; repeatable")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    args = parser.parse_args(argv)
    if args.kimg < 4:
        parser.error(f"--kimg {args.kimg}: must be at least 4, of which the first is left out")
    return args


def configuration(args: argparse.Namespace) -> RunConfig:
    """The run of the flags, with one evaluation and checkpoint, at its end."""
    dataset = locate("datasets", args.dataset, args.storage)
    values = {
        "dataset": dataset.uri,
        "total_kimg": args.kimg,
        "eval.every_kimg": args.kimg,
        "checkpoint.every_kimg": args.kimg,
        "eval.num_samples": 100,
        "guard": "off",
    }
    config = biggan.presets.get(args.preset).override(values | parse_overrides(args.set))
    check_fit(config, DatasetInfo.read(dataset), args.workers)
    if args.workers * args.threads > (cores := len(os.sched_getaffinity(0))):
        raise BenchmarkError(
            f"--workers {args.workers} --threads {args.threads}: this machine has {cores} core(s)"
        )
    return config


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    config = configuration(args)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {args.workers} workers, each {describe(device)}")
    print(f"{args.kimg} kimg of {args.dataset} a run, batch {config.optim.batch_size}")
    task = {"config": config.model_dump(), "workers": args.workers, "threads": args.threads}
    rates: dict[str, list[float]] = {RAY: [], TORCHRUN: []}
    for k in range(args.rounds):
        for launcher in (RAY, TORCHRUN) if k % 2 else (TORCHRUN, RAY):
            with tempfile.TemporaryDirectory() as root:
                run = task | {"name": "run", "root": root}
                rates[launcher].append(images_per_second(launcher, run))
        ray, plain = rates[RAY][-1], rates[TORCHRUN][-1]
        print(f"round {k + 1}: {RAY} {ray:.1f}, {TORCHRUN} {plain:.1f} images/s,"
              f" ratio {ray / plain:.3f}", flush=True)  # fmt: skip
    ratios = [ray / plain for ray, plain in zip(rates[RAY], rates[TORCHRUN], strict=True)]
    median = statistics.median(ratios)
    print(f"{RAY} : {TORCHRUN} = {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if args.json:
        args.json.write_text(json.dumps({"images_per_second": rates, "ratios": ratios}) + "\n")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--task"]:
            train = under_torchrun if sys.argv[3:] == ["--worker"] else under_ray
            train(json.loads(Path(sys.argv[2]).read_text()))
        else:
            main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
