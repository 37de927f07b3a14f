"""What evaluations cost training: in its course, beside it, and not at all.

The same run three times a round, in turn, each with equally many checkpoints: with evaluations in
training's course (`eval.mode inline`), in tasks beside it (`async`), and without any but the last.

    python jobs/prepare.py --source digits
    python benchmarks/evaluation.py --dataset digits --kimg 40 --every-kimg 5 --rounds 3

A run's stall is the part of its time that it spent neither in steps nor waiting for images, which
its metrics.jsonl tells by row (`stall`): checkpoints, reports and, inline, evaluations. Printed is
the mean over rows, less the first and the last one's, and what evaluating adds to the stall of
checkpoints alone: the claim is that beside training it adds less than 1%. Also printed is the speed
of the steps, which a neighbour that uses the same memory and caches slows down.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from machine import BenchmarkError, describe
from train_step import parse_overrides, positive

import biggan
from biggan.config import RunConfig
from biggan.errors import UserError
from biggan.runs import read_metrics
from biggan.storage import Folder, locate

MODES = ("none", "inline", "async")


def run(mode: str, base: RunConfig, every_kimg: float) -> tuple[float, float]:
    """Train once; the mean stall over rows, from 0 to 1, and the median images a second."""
    evaluated = every_kimg if mode != "none" else base.total_kimg
    changes = {"eval.every_kimg": evaluated, "checkpoint.every_kimg": every_kimg}
    config = base.override(changes | {"eval.mode": "async" if mode == "async" else "inline"})
    with tempfile.TemporaryDirectory() as root:
        settings = Path(root, "config.yaml")
        settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        job = Path(__file__).parents[1] / "jobs/train.py"
        command = [sys.executable, str(job), "--name", "run", "--config", str(settings)]
        done = subprocess.run(
            [*command, "--storage", root, "--scaling.cpus-per-worker", "1"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise BenchmarkError(f"training with {mode} failed:\n{done.stdout}{done.stderr}")
        rows = read_metrics(Folder(f"{root}/runs/run"))[1:-1]
    return (
        statistics.fmean(row["stall"] for row in rows),
        statistics.median(row["images_per_second"] for row in rows),
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What evaluations cost training, in its course and beside it.",
        epilog="example: python benchmarks/evaluation.py --dataset digits --kimg 40 --rounds 3",
    )
    parser.add_argument("--dataset", required=True, help="a prepared data set")
    parser.add_argument("--storage", help="storage root, path or URI; by default $BIGGAN_STORAGE,"
                        " else ./storage")  # fmt: skip
    parser.add_argument("--kimg", type=positive, default=40, help="thousand real images a run")
    parser.add_argument("--every-kimg", type=positive, default=5, help="between evaluations")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--preset", default="digits", choices=sorted(biggan.presets.PRESETS))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of the run by dotted name; repeatable")  # fmt: skip
    args = parser.parse_args(argv)
    if args.kimg < 3 * args.every_kimg:
        parser.error(f"--kimg {args.kimg}: must be at least 3 times --every-kimg")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    dataset = locate("datasets", args.dataset, args.storage).uri
    values = {"dataset": dataset, "total_kimg": args.kimg, "guard": "off"}
    base = biggan.presets.get(args.preset).override(values | parse_overrides(args.set))
    print(f"torch {torch.__version__}, {describe(torch.device('cpu'))}; {args.kimg} kimg a run,"
          f" {base.eval.num_samples} samples every {args.every_kimg} kimg")  # fmt: skip
    stalls: dict[str, list[float]] = {mode: [] for mode in MODES}
    for k in range(args.rounds):
        for mode in MODES if k % 2 else reversed(MODES):
            stall, speed = run(mode, base, args.every_kimg)
            stalls[mode].append(stall)
            print(f"round {k + 1}, {mode:6}: stall {stall:.2%}, {speed:.0f} images/s", flush=True)
    for mode in MODES[1:]:
        added = [a - b for a, b in zip(stalls[mode], stalls["none"], strict=True)]
        print(f"{mode}: evaluations add {statistics.median(added):.2%} of the run's time"
              f" ({min(added):.2%} to {max(added):.2%})")  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
