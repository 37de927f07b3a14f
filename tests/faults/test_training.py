"""Training when something dies: nothing is lost that was saved, and nothing is left behind."""

import json
import re
import time

import numpy as np
import pytest
from conftest import train_here
from faults.disturbed import (
    EVERY,
    RUN,
    STEPS,
    assert_same_end,
    newest,
    resumed_at,
    steps_as_kimg,
    train,
    wait_for_step,
)

from biggan.config import RunConfig
from biggan.data.dataset import Dataset
from biggan.runs import read_metrics
from biggan.storage import Folder, locate

pytestmark = pytest.mark.usefixtures("undisturbed")


def test_a_worker_that_dies_costs_at_most_a_checkpoint_interval(machines, undisturbed):
    run, command = locate("runs", "worker"), train(machines, "worker")
    wait_for_step(run, 100)
    before = newest(run)
    machines.workers()[-1].kill()
    said = command.wait()
    [at] = resumed_at(said)
    assert before <= at <= before + EVERY
    assert_same_end(run, undisturbed)


def test_a_driver_that_is_killed_leaves_no_workers_and_no_lock(machines, undisturbed):
    run, command = locate("runs", "driver"), train(machines, "driver")
    wait_for_step(run, 100)
    command.kill()
    begin = time.monotonic()
    again = train(machines, "driver")
    while machines.workers() and time.monotonic() - begin < 5:
        time.sleep(0.1)
    again.wait()
    assert_same_end(run, undisturbed)
    assert not machines.workers()


def test_a_drained_node_is_left_with_a_checkpoint(machines, undisturbed):
    run, command = locate("runs", "drained"), train(machines, "drained")
    wait_for_step(run, 100)
    listed = machines.ray("list", "nodes", "--filter", "state=ALIVE", "--format", "json")
    node = next(
        n["node_id"] for n in json.loads(listed.stdout) if n["resources_total"].get("CPU") == 1
    )
    done = machines.ray(
        "drain-node", "--address", machines.address, "--node-id", node,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
        "--deadline-remaining-seconds", "60",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    machines.start_node("replacement")
    said = command.wait()
    assert "left machines that are about to go" in said
    [preempted] = [line for line in said.splitlines() if ": preempted at" in line]
    left_at = round(float(preempted.split("preempted at ")[1].split()[0]) * 1000 / 32)
    assert resumed_at(said) == [left_at]  # Not one step was taken twice.
    assert_same_end(run, undisturbed)


def test_sigterm_to_a_node_drains_it(machines, undisturbed):
    run, command = locate("runs", "terminated"), train(machines, "terminated")
    wait_for_step(run, 100)
    machines.terminate("b")
    machines.start_node("another")
    said = command.wait()
    assert "left machines that are about to go" in said
    assert_same_end(run, undisturbed)


def test_the_whole_cluster_dies_and_comes_back(machines, undisturbed):
    run, command = locate("runs", "cluster"), train(machines, "cluster")
    before = wait_for_step(run, 100)
    for name in list(machines.nodes):
        machines.kill(name)
    command.kill()
    machines.restart()
    said = train(machines, "cluster").wait()
    assert resumed_at(said)[0] >= before
    assert_same_end(run, undisturbed)


def test_the_second_of_a_name_is_told_of_the_first(machines):
    run, first = locate("runs", "twins"), train(machines, "twins")
    wait_for_step(run, EVERY)
    said = train(machines, "twins").wait(status=2)
    assert f"is being trained by another command (process {first.process.pid} of " in said
    assert re.search(r"since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", said)
    assert "or use another --name" in said
    first.wait()


def fids(run):
    """The FIDs of a run's first `STEPS` steps."""
    return np.array([r["fid"] for r in read_metrics(run) if "fid" in r and r["step"] <= STEPS])


def noise(undisturbed, folder):
    """How far FIDs of one age differ between seeds: their relative standard deviation."""
    curves = [fids(undisturbed)]
    for seed in (1, 2, 3):
        run = Folder(f"{folder}/{seed}")
        train_here(RunConfig().override(RUN | {"seed": seed}), run, Dataset.open("digits"))
        curves.append(fids(run))
    return float(np.sqrt(np.mean((np.std(curves, 0, ddof=1) / np.mean(curves, 0)) ** 2)))


def test_elastic_workers_go_from_two_to_one_and_back(machines, undisturbed, tmp_path):
    elastic = ["--scaling.min-workers", "1", "--scaling.resize-every-s", "5"]
    longer = ["--total-kimg", str(steps_as_kimg(4 * STEPS))]
    run, command = locate("runs", "elastic"), train(machines, "elastic", *elastic, *longer)
    wait_for_step(run, 100)
    machines.kill(next(name for name in machines.nodes if name != "head"))
    alone = wait_for_step(run, newest(run) + 3 * EVERY)
    machines.start_node("b")
    said = command.wait()
    first, second = resumed_at(said)
    assert first < alone <= second
    groups = [line for line in said.splitlines() if line.endswith("elastic: 2 workers")]
    assert len(groups) == 2, said  # One worker alone does not say so.
    differences = fids(run) / fids(undisturbed) - 1
    sigma = noise(undisturbed, tmp_path)
    print(f"FIDs differ by {differences.round(3)}; the noise of seeds is {sigma:.3f}")
    assert np.sqrt(np.mean(differences**2)) < sigma
