"""Reading images beside the training step that consumes them.

    python jobs/prepare.py --source digits --name digits --resolution 16
    python benchmarks/data.py read --dataset digits --threads 2

Prints, for the recipe of a preset on a prepared dataset and this machine:

- images a second that the training step alone consumes, on inputs made once;
- images a second that reading alone gives, from memory (a mapped file) and in a stream: pixels,
  labels, latents, transfer, scaling and flips. The claim is at least 3 times as many;
- `data_wait` of the training loop as users run it, the part of a step's time that it waits for
  inputs. The claim is under 2%;
- the time of a step with inputs made ahead to the time with inputs made when they are wanted, in
  turn, the median over paired rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from machine import choose_device, describe, synchronize
from train_step import parse_overrides, positive

from biggan import presets
from biggan.config import RunConfig
from biggan.data import decoded
from biggan.data.batches import Batches, Prefetch
from biggan.data.dataset import Dataset, Mode
from biggan.data.reading import OpenStream
from biggan.loop import TrainingLoop
from biggan.parallel import Workers
from biggan.runs import read_metrics
from biggan.storage import Folder
from biggan.training import TrainStep, build

ENOUGH, LITTLE_WAIT = 3.0, 0.02
"""What is claimed: reading : consumption, and data_wait."""
WARM_UP = 10
"""Steps before anything is timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `measure`."""
    parser.add_argument("--dataset", required=True, help="a prepared dataset")
    parser.add_argument("--storage", help="storage root, path or URI; by default $BIGGAN_STORAGE,"
                        " else ./storage")  # fmt: skip
    parser.add_argument("--preset", default="digits", choices=sorted(presets.PRESETS))
    parser.add_argument("--steps", type=positive, default=300, help="steps of a measurement")
    parser.add_argument("--rounds", type=positive, default=9, help="pairs with and without reading"
                        " ahead, of a ninth of the steps each")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=("memory", "stream"),
                        default=["memory", "stream"])  # fmt: skip
    parser.add_argument("--threads", type=positive, help="torch's threads")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of the run by dotted name; repeatable")  # fmt: skip


def configuration(args: argparse.Namespace) -> RunConfig:
    """The preset's recipe, as long as the steps asked for, evaluated once."""
    config = presets.get(args.preset).override(parse_overrides(args.set))
    kimg = args.steps * config.step_images / 1000
    length = {"total_kimg": kimg, "eval.every_kimg": kimg, "checkpoint.every_kimg": kimg}
    return config.override({"dataset": args.dataset, **length, "eval.num_samples": 100})


@contextmanager
def mapped() -> Iterator[None]:
    """A new cache in which also a small dataset is a mapped file, as large ones are."""
    before = decoded.IN_MEMORY
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BIGGAN_CACHE"], decoded.IN_MEMORY = folder, 0
        try:
            yield
        finally:
            decoded.IN_MEMORY = before
            del os.environ["BIGGAN_CACHE"]


def rate(work: Callable[[int], object], steps: int, images: int) -> float:
    """Images a second of `work(step)`, after a few steps to warm up."""
    for step in range(WARM_UP):
        work(step)
    synchronize()
    begin = time.perf_counter()
    for step in range(WARM_UP, WARM_UP + steps):
        work(step)
    synchronize()
    return steps * images / (time.perf_counter() - begin)


def losses(train_step: TrainStep, inputs: Any) -> list[float]:
    """One step, at whose losses the training loop always looks."""
    values: list[float] = torch.stack(list(train_step(inputs).values())).tolist()
    return values


def new_step(config: RunConfig, dataset: Dataset, workers: Workers) -> TrainStep:
    state = build(config, **dataset.info.shape, device=workers.device)
    return TrainStep(config, state, workers)


def consumption(config: RunConfig, dataset: Dataset, workers: Workers, steps: int) -> float:
    """Images a second of the training step on inputs made once."""
    inputs = Batches(config, dataset, workers).inputs(0)
    train_step = new_step(config, dataset, workers)
    return rate(lambda _step: losses(train_step, inputs), steps, config.step_images)


def reading(
    config: RunConfig, dataset: Dataset, workers: Workers, steps: int, stream: OpenStream | None
) -> float:
    """Images a second of making inputs, with nothing to consume them."""
    batches = Batches(config, dataset, workers, stream)
    try:
        return rate(batches.inputs, steps, config.step_images)
    finally:
        batches.close()


def data_wait(
    config: RunConfig, dataset: Dataset, workers: Workers, stream: OpenStream | None
) -> tuple[float, float]:
    """Part of the time of a run's steps that went by waiting for their inputs.

    Over all steps, and without those of the first thousand images: a stream takes seconds to begin,
    once a run.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Folder(folder)
        keep_nothing = lambda _metrics, _folder: None  # noqa: E731
        loop = TrainingLoop(config, dataset, run, workers, keep_nothing, say=None, stream=stream)
        print(f"  the loop: {loop.run()}", flush=True)
        rows = read_metrics(run)
    # Rows are of about as many images each; the time of one is that of its images.
    steps = [b["step"] - a["step"] for a, b in zip([{"step": 0}, *rows[:-1]], rows, strict=True)]
    times = [n / row["images_per_second"] for n, row in zip(steps, rows, strict=True)]
    waits = [seconds * row["data_wait"] for seconds, row in zip(times, rows, strict=True)]
    return sum(waits) / sum(times), sum(waits[1:]) / sum(times[1:])


def step_ahead_to_alone(
    config: RunConfig, dataset: Dataset, workers: Workers, steps: int, rounds: int
) -> list[float]:
    """Time of steps whose inputs were made ahead to that of steps that make theirs, by round."""
    batches = Batches(config, dataset, workers)
    train_step = new_step(config, dataset, workers)
    ratios = []
    for k in range(rounds):
        rates = {}
        for ahead in (True, False) if k % 2 else (False, True):
            prefetch = Prefetch(batches, 0)
            make = prefetch.inputs if ahead else batches.inputs
            rates[ahead] = rate(
                lambda step, make=make: losses(train_step, make(step)),  # type: ignore[misc]
                max(1, steps // rounds),
                config.step_images,
            )
            prefetch.close()
        ratios.append(rates[False] / rates[True])
    return ratios


def open_stream() -> OpenStream:
    """Streaming by Ray Data; connects to Ray."""
    from biggan.cluster import connect
    from biggan.data.stream import StreamReader

    connect()
    return StreamReader


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return all figures."""
    if args.threads:
        torch.set_num_threads(args.threads)
    workers = Workers(0, 1, choose_device(args.device))
    config = configuration(args)
    print(f"torch {torch.__version__}, {describe(workers.device)}; {args.preset} on {args.dataset}")
    with mapped():
        dataset = Dataset.open(args.dataset, args.storage, classes=config.data.classes)
        consumed = consumption(config, dataset, workers, args.steps)
        figures: dict[str, Any] = {"consumption": consumed}
        print(f"the step alone: {consumed:,.0f} images/s", flush=True)
        for mode in args.modes:
            figures[mode] = _measure_mode(args, config, mode, workers, consumed)
        ratios = step_ahead_to_alone(config, dataset, workers, args.steps, args.rounds)
    figures["step_ahead_to_alone"] = ratios
    print(
        f"a step with inputs made ahead : made when wanted = {statistics.median(ratios):.3f}"
        f" ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    return figures


def _measure_mode(
    args: argparse.Namespace, config: RunConfig, mode: Mode, workers: Workers, consumed: float
) -> dict[str, float]:
    config = config.override({"data.mode": mode})
    stream = open_stream() if mode == "stream" else None
    dataset = Dataset.open(args.dataset, args.storage, classes=config.data.classes, mode=mode)
    speed = reading(config, dataset, workers, args.steps, stream)
    enough = "" if speed >= ENOUGH * consumed else f", SHORT of {ENOUGH:g}"
    print(f"{mode}: reading {speed:,.0f} images/s, {speed / consumed:.1f} times that{enough}")
    overall, waited = data_wait(config, dataset, workers, stream)
    little = "" if waited < LITTLE_WAIT else f", MORE than {LITTLE_WAIT:.0%}"
    print(f"{mode}: data_wait {waited:.2%}{little}; {overall:.2%} with its start", flush=True)
    return {
        "images_per_second": speed,
        "to_consumption": speed / consumed,
        "data_wait": waited,
        "data_wait_with_start": overall,
    }
