"""Hosts die, return and lose each other while they train: nothing is lost, nothing is doubled."""

import math
import re
import time
import uuid

from cluster.on_prem import PATIENCE, until
from conftest import TINY

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

    def __init__(self, on_prem, name):
        self.on_prem, self.run = on_prem, locate("runs", name)
        self.job = f"{name}-{uuid.uuid4().hex[:4]}"
        train = f"jobs/train.py --name {name} {FLAGS} --scaling.workers 2"
        flags = "--no-wait", "--submission-id", self.job
        on_prem.submit(f"{train} --scaling.cpus-per-worker 2", *flags)

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
        return [float(kimg) for kimg in re.findall(r"resuming at (\S+) of", log)]


def assert_whole(run, config=CONFIG):
    """Every row that an uninterrupted run writes, once, in turn; checkpoints whole, to the end."""

    def kimg(step):
        return step * config.step_images / 1000

    steps = range(1, round(config.total_kimg * 1000 / config.step_images) + 1)
    due = [
        step
        for step in steps
        if math.floor(kimg(step) / ROW_EVERY_KIMG) > math.floor(kimg(step - 1) / ROW_EVERY_KIMG)
        or kimg(step) % config.eval.every_kimg == 0
    ]
    assert [row["step"] for row in read_metrics(run)] == due
    saved = checkpoints(run)
    assert sorted(saved) == [name for name in run.children() if name.startswith("checkpoint_0")]
    assert all(is_undamaged(run / name) for name in saved)
    assert max(info.step for info in saved.values()) == steps[-1]


def test_a_network_that_is_away_for_half_a_minute(on_prem, digits):
    training = Training(on_prem, "partition").underway()
    host = training.main_host()
    host.partition()
    time.sleep(30)
    host.heal()
    training.finished()
    on_prem.wait_for(*on_prem.hosts)


def test_a_host_dies_and_is_up_again(on_prem, digits):
    training = Training(on_prem, "death").underway()
    host, before = training.main_host(), training.newest
    host.kill()
    host.start()
    [resumed, *_] = training.finished()
    assert resumed * 1000 >= before * CONFIG.step_images
    on_prem.wait_for(*on_prem.hosts)


def test_the_head_dies_and_is_brought_up_again(on_prem, digits):
    training = Training(on_prem, "beheaded").underway()
    before = training.newest
    on_prem.head.kill()
    on_prem.head.start()
    on_prem.up()
    again = Training(on_prem, "beheaded")
    [resumed, *_] = again.finished()
    assert resumed * 1000 >= before * CONFIG.step_images
