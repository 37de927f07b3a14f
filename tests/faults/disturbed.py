"""Runs that something befalls, and how they are compared with one that nothing did."""

import io
import time

import torch
from conftest import TINY

from biggan.checkpoint import STATE
from biggan.runs import checkpoints, read_metrics
from biggan.storage import Folder

STEPS = 400
EVERY = 20
"""Steps from checkpoint to checkpoint."""


def steps_as_kimg(steps):
    return steps * TINY["optim.batch_size"] / 1000


RUN = TINY | {
    "total_kimg": steps_as_kimg(STEPS),
    "checkpoint.every_kimg": steps_as_kimg(EVERY),
    "checkpoint.keep": 3,
    "eval.every_kimg": steps_as_kimg(STEPS) / 4,
}


def flags(config):
    named = {k.replace("_", "-"): str(v) for k, v in config.items()}
    return [part for key, value in named.items() for part in (f"--{key}", value)]


def train(machines, name, *more, workers=2, **env):
    """Begin `jobs/train.py` for a run of `STEPS` steps."""
    scaling = ["--scaling.workers", str(workers), "--scaling.cpus-per-worker", "1"]
    return machines.begin("train", "--name", name, *scaling, *flags(RUN), *more, **env)


def newest(run: Folder) -> int:
    return max((info.step for info in checkpoints(run).values()), default=-1)


def wait_for_step(run: Folder, step: int, timeout: float = 120) -> int:
    """Wait until a run has a checkpoint of that step or a later one; which it is."""
    deadline = time.monotonic() + timeout
    while newest(run) < step:
        assert time.monotonic() < deadline, f"{run} stands at {newest(run)}"
        time.sleep(0.02)
    return newest(run)


def resumed_at(said: str) -> list[int]:
    """The steps at which a command's workers took a run up."""
    lines = [line for line in said.splitlines() if "resuming at" in line]
    return [round(float(line.split("resuming at ")[1].split()[0]) * 1000 / 32) for line in lines]


def assert_same_end(run: Folder, undisturbed: Folder) -> None:
    """The same weights, moments and rows, bit for bit."""
    ours, theirs = (
        torch.load(io.BytesIO((r / list(checkpoints(r))[-1]).read_bytes(STATE)), weights_only=True)
        for r in (run, undisturbed)
    )
    for part in ("G", "D", "G_ema"):
        for name, expected in theirs[part].items():
            assert torch.equal(ours[part][name], expected), f"{part}.{name}"
    for part in ("optim_G", "optim_D"):
        for i, moments in theirs[part]["state"].items():
            assert torch.equal(ours[part]["state"][i]["exp_avg_sq"], moments["exp_avg_sq"])
    timed = {"time", "images_per_second", "data_wait", "stall"}
    rows, expected = (
        [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(r)]
        for r in (run, undisturbed)
    )
    assert rows == expected
