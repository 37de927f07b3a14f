"""A sweep whose cluster dies, the head with Tune on it among it."""

import time

import pytest
from faults.disturbed import RUN, flags

from biggan.runs import METRICS, checkpoints
from biggan.storage import locate


def begin(machines):
    search = ["--num-trials", "6", "--max-concurrent", "2", "--noise-repeats", "0"]
    fixed = RUN | {"eval.every_kimg": 1.28}
    space = ["--space", "optim.lr_g=loguniform(1e-4, 1e-3)"]
    # No trial is stopped early, so that all end in the same way.
    grace = ["--grace-kimg", str(fixed["total_kimg"])]
    return machines.begin("sweep", "--name", "struck", *search, *flags(fixed), *grace, *space)


def rows(trial):
    return trial.read_bytes(METRICS).splitlines()


@pytest.mark.usefixtures("prepared")
def test_finished_trials_are_kept_and_running_ones_resume(machines):
    folder, command = locate("sweeps", "struck"), begin(machines)
    steps = round(RUN["total_kimg"] * 1000 / 32)

    def at(trial):
        return max((info.step for info in checkpoints(trial).values()), default=0)

    def trials():
        return [folder / name for name in folder.children() if name.startswith("trial_")]

    deadline = time.monotonic() + 240
    while True:
        finished = [trial for trial in trials() if at(trial) == steps]
        running = [trial for trial in trials() if 0 < at(trial) < steps]
        if finished and running:
            break
        assert time.monotonic() < deadline, command.said()
        time.sleep(0.05)
    for name in list(machines.nodes):
        machines.kill(name)
    command.kill()
    before = {trial.uri: (rows(trial), at(trial)) for trial in trials()}
    machines.restart()
    said = begin(machines).wait(timeout=400)
    assert len(trials()) == 6
    assert all(at(trial) == steps for trial in trials()), said
    for trial in finished:
        assert rows(trial) == before[trial.uri][0]  # Not a row was written again.
    for trial in running:
        kept = [r for r in before[trial.uri][0] if f'"step": {steps}' not in r.decode()]
        upto = before[trial.uri][1]
        saved = [row for row in kept if int(row.split(b'"step": ')[1].split(b",")[0]) <= upto]
        assert rows(trial)[: len(saved)] == saved  # With the times of before.
