"""Hosts die, return and lose each other while they train: nothing is lost, nothing is doubled."""

import re
import time
import uuid

from cluster.on_prem import PATIENCE, until
from conftest import TINY

import biggan
from biggan.checkpoint import is_undamaged
from biggan.config import RunConfig
from biggan.journal import ROW_EVERY_KIMG
from biggan.runs import checkpoints, read_metrics
from biggan.storage import locate

LONG = TINY | {"total_kimg": 1.024}
FLAGS = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in LONG.items())
CONFIG = RunConfig().override(LONG)


class Training:
    """A run of two workers, one on each worker host, as a job of its own."""

    def __init__(self, on_prem, name, scaling=""):
        self.on_prem, self.run = on_prem, locate("runs", name)
        self.job = f"{name}-{uuid.uuid4().hex[:4]}"
        train = f"jobs/train.py --name {name} {FLAGS} --scaling.workers 2"
        flags = "--no-wait", "--submission-id", self.job
        on_prem.submit(f"{train} --scaling.cpus-per-worker 2 {scaling}", *flags)

    @property
    def newest(self):
        """The step of its newest checkpoint; 0 if there is none."""
        return max((info.step for info in checkpoints(self.run).values()), default=0)

    def main_host(self):
        """The host of the worker that writes."""
        [address, *_] = re.findall(r"ip=(\S+?)\)\S* .*kimg on ", self.on_prem.log(self.job))[-1:]
        return next(host for host in self.on_prem.workers if host.address == address)

    def underway(self, step=8):
        until(lambda: self.newest >= step)
        return self

    def finished(self):
        """Wait for its end; the kimg at which it was taken up again, in turn."""
        until(lambda: self.on_prem.status(self.job) in ("SUCCEEDED", "FAILED"), 2 * PATIENCE)
        log = self.on_prem.log(self.job)
        assert self.on_prem.status(self.job) == "SUCCEEDED", log
        assert_whole(self.run)
        return self.said(r"resuming at (\S+) of")

    def said(self, what):
        """The numbers that it printed; a host that is back prints its old lines once more."""
        return [*dict.fromkeys(map(float, re.findall(what, self.on_prem.log(self.job))))]


def assert_whole(run):
    """Every row that an uninterrupted run writes, once, in turn; checkpoints whole, to the end."""

    images, end = CONFIG.step_images, round(CONFIG.total_kimg * 1000)
    row_every, evaluate_every = ROW_EVERY_KIMG * 1000, round(CONFIG.eval.every_kimg * 1000)
    due = [
        seen // images
        for seen in range(images, end + 1, images)
        if seen // row_every > (seen - images) // row_every or seen % evaluate_every == 0
    ]
    assert [row["step"] for row in read_metrics(run)] == due
    saved = checkpoints(run)
    assert sorted(saved) == [name for name in run.children() if name.startswith("checkpoint_0")]
    assert all(is_undamaged(run / name) for name in saved)
    assert max(info.step for info in saved.values()) * images == end


def test_a_network_that_is_away_for_half_a_minute(on_prem, digits):
    training = Training(on_prem, "partition").underway()
    host = training.main_host()
    host.partition()
    time.sleep(30)
    host.heal()
    training.finished()
    on_prem.wait_for(*on_prem.hosts)


def test_a_host_dies_and_the_other_goes_on_alone(on_prem, digits):
    training = Training(on_prem, "death", "--scaling.min-workers 1").underway()
    host, before = training.main_host(), training.newest
    host.kill()
    [resumed] = training.finished()
    assert resumed * 1000 >= before * CONFIG.step_images
    host.start()
    on_prem.wait_for(*on_prem.hosts)


def test_a_host_that_is_drained_is_left_with_a_checkpoint(on_prem, digits):
    training = Training(on_prem, "drained", "--scaling.min-workers 1").underway()
    address = training.main_host().address
    [node] = [node for node, at in on_prem.alive().items() if at == address]
    drain = f"drain-node --address {on_prem.head.address}:6379 --node-id {node}"
    why = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message test"
    on_prem.head.run(f"ray {drain} {why} --deadline-remaining-seconds 60")
    [resumed, *_] = training.finished()
    [left] = training.said(r"preempted at (\S+)")
    assert resumed == left  # Not one step was taken twice.
    on_prem.wait_for(*on_prem.hosts)


def test_the_head_dies_and_is_brought_up_again(on_prem, digits):
    """Its jobs die with it. What they have stored is whole: the same commands go on from there."""
    sweep = locate("sweeps", "beheaded")
    search = f"jobs/sweep.py --name beheaded {FLAGS} --num-trials 2 --noise-repeats 0"
    # So that none stops early.
    search += f" --space optim.lr_g=loguniform(1e-4,1e-2) --grace-kimg {CONFIG.total_kimg}"

    def trials():
        return [sweep / name for name in sweep.children() if name.startswith("trial_")]

    on_prem.submit(search, "--no-wait")
    until(lambda: any(checkpoints(trial) for trial in trials()))
    training = Training(on_prem, "beheaded").underway()
    before = training.newest
    on_prem.head.kill()
    on_prem.head.start()
    on_prem.up()
    [resumed, *_] = Training(on_prem, "beheaded").finished()
    assert resumed * 1000 >= before * CONFIG.step_images
    on_prem.submit(search)
    assert len(trials()) == 2
    for trial in trials():
        assert_whole(trial)
    on_prem.submit("jobs/promote.py --sweep beheaded --name beheaded")
    assert biggan.load_generator("beheaded@best").sample([1]).shape == (1, 16, 16, 1)
