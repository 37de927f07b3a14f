"""Ray Train: workers that share a batch, and workers that die."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import tiny

import biggan
from biggan.checkpoint import STATE
from biggan.config import ConfigError
from biggan.distributed import Scaling
from biggan.runs import checkpoints, read_metrics
from biggan.storage import StorageError, locate

CONFIG = tiny(
    total_kimg=3.84,  # 60 steps
    optim__batch_size=64,
    optim__lr_g=2e-4,
    optim__lr_d=2e-4,
    eval__every_kimg=1.92,
    checkpoint__every_kimg=0.32,  # every 5 steps
    checkpoint__keep=100,
)
TWO = Scaling(workers=2, cpus_per_worker=1)


def state(run, step):
    return torch.load(f"{run.path}/checkpoint_{step:09d}/{STATE}", weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(digits):
    result = biggan.train(CONFIG, "undisturbed", scaling=TWO)
    assert result.stop_reason == "finished"
    return result


def test_two_workers_of_32_follow_one_of_64(undisturbed, digits):
    alone = biggan.train(CONFIG.override({"total_kimg": 0.32}), "alone")
    one, two = (state(result.folder, 5) for result in (alone, undisturbed))
    for network in ("G", "D", "G_ema"):
        for name, expected in one[network].items():
            difference = (two[network][name] - expected).norm() / expected.norm()
            assert difference < 1e-4, f"{network}.{name}"


def kill_a_worker_once(run, after_step, killed):
    """SIGKILL one of the run's workers as soon as the run has a checkpoint past `after_step`.

    The latest checkpoint is damaged, too. Notes its step.
    """
    while not any(info.step >= after_step for info in checkpoints(run).values()):
        time.sleep(0.05)
    workers = [p for p in psutil.process_iter(["name"]) if "RayTrainWorker" in p.info["name"]]
    os.kill(workers[-1].pid, signal.SIGKILL)
    time.sleep(0.5)  # The other may have one to finish; new ones start in seconds.
    latest, info = list(checkpoints(run).items())[-1]
    damaged = Path(f"{run.path}/{latest}/{STATE}")
    damaged.write_bytes(damaged.read_bytes()[::-1])
    killed.append(info.step)


def test_a_worker_killed_beside_a_damaged_checkpoint_changes_nothing(undisturbed):
    run, killed = locate("runs", "disturbed"), []
    killer = threading.Thread(target=kill_a_worker_once, args=(run, 15, killed), daemon=True)
    killer.start()
    result = biggan.train(CONFIG, "disturbed", scaling=TWO)
    killer.join(1)
    assert 15 <= killed[0] < 60  # It happened in the middle.
    assert result.stop_reason == "finished"
    kept = [info.step for info in checkpoints(run).values()]
    assert [step for step in kept if kept.count(step) > 1] == 2 * killed  # Damaged, and made anew.
    ours, theirs = state(result.folder, 60), state(undisturbed.folder, 60)
    for part in ("G", "D", "G_ema"):
        for name, expected in theirs[part].items():
            assert torch.equal(ours[part][name], expected), f"{part}.{name}"
    for part in ("optim_G", "optim_D"):
        for i, moments in theirs[part]["state"].items():
            assert torch.equal(ours[part]["state"][i]["exp_avg_sq"], moments["exp_avg_sq"])
    steps = [row["step"] for row in read_metrics(result.folder)]
    assert steps == [row["step"] for row in read_metrics(undisturbed.folder)]
    assert len(steps) == len(set(steps))


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--dataset", "nowhere"], "no prepared dataset at"),
        (["--dataset", "digits", "--preset", "nope"], "preset 'nope' is not known"),
        (["--dataset", "digits", "--optim.lr-gg", "1"], "--optim.lr-g"),
        (["--dataset", "digits", "--config", "nope.yaml"], "there is no such file"),
    ],
    ids=["dataset", "preset", "flag", "file"],
)
def test_mistakes_on_the_command_line(digits, job_here, flags, said):
    status, told = job_here("train", "--name", "mistake", *flags)
    assert status == 2
    assert said in told
    assert "Traceback" not in told
    assert not locate("runs", "mistake").exists()


def test_mistakes_in_a_notebook(digits):
    with pytest.raises(ConfigError, match="does not divide among 3 workers"):
        biggan.train(CONFIG, "odd", scaling=Scaling(workers=3))
    with pytest.raises(StorageError, match="no prepared dataset"):
        biggan.train(CONFIG.override({"dataset": "nowhere"}), "lost")
    with pytest.raises(ConfigError, match="workers = 0: must be 1 or more"):
        Scaling(workers=0)
    with pytest.raises(ConfigError, match="min_workers = 3: must be from 0 to workers = 2"):
        Scaling(workers=2, min_workers=3)
    with pytest.raises(ConfigError, match="does not divide among 3 workers"):
        biggan.train(CONFIG, "odd", scaling=Scaling(workers=4, min_workers=3))


def test_elastic_groups_have_sizes_among_which_the_batch_divides():
    config = tiny(optim__batch_size=96, optim__accumulation=2)
    assert Scaling(workers=16, min_workers=4).sizes(config) == [4, 6, 8, 12, 16]
    assert Scaling(workers=8).sizes(config) == [8]
