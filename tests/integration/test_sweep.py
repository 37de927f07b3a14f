"""Ray Tune: sweeps that stop bad trials early, survive their driver, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pandas as pd
import psutil
import pytest
import yaml
from conftest import ROOT, tiny

import biggan
from biggan.config import ConfigError, RunConfig
from biggan.runs import best_checkpoint, read_metrics
from biggan.search import Search, parse_domain
from biggan.storage import Folder, locate

TRIALS = 6
COMMAND = [
    *("jobs/sweep.py", "--preset", "laptop", "--dataset", "digits", "--name", "searched"),
    *("--num-trials", str(TRIALS), "--max-concurrent", "2", "--search-seed", "1"),
    *("--total-kimg", "4.5", "--eval.every-kimg", "0.5", "--eval.num-samples", "256"),
    *("--model.ch-g", "2", "--model.ch-d", "2", "--model.z-dim", "12", "--ema.decay", "0.98"),
    *("--space", "optim.lr_g=loguniform(1e-5, 1e-2)", "loss.ortho_g=choice([0.0, 1e-4])"),
]


def sweep_command(log):
    """Start the sweep as a user would."""
    return subprocess.Popen([sys.executable, *COMMAND], cwd=ROOT, stdout=log, stderr=log)


def finished(folder):
    """Trials that trained as far as they should: kimg by trial."""
    trials = [name for name in folder.children() if name.startswith("trial_")]
    rows = {name: read_metrics(folder / name) for name in trials}
    return {name: r[-1]["kimg"] for name, r in rows.items() if r and r[-1]["kimg"] >= 4.5}


class Interrupted(NamedTuple):
    folder: Folder
    before: dict[str, list]
    """Metrics of the trials that had finished at the kill."""
    begun_again: float
    printed: str


@pytest.fixture(scope="module")
def interrupted_sweep(digits, tmp_path_factory):
    """A sweep whose driver was killed once a trial had finished, and that was begun again."""
    folder = locate("sweeps", "searched")
    log = tmp_path_factory.mktemp("sweep") / "log"
    with log.open("w") as out:
        driver = sweep_command(out)
        while not finished(folder):
            assert driver.poll() is None, log.read_text()
            time.sleep(0.1)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        before = {name: read_metrics(folder / name) for name in finished(folder)}
        begun_again = time.time()
        assert sweep_command(out).wait() == 0, log.read_text()
    return Interrupted(folder, before, begun_again, log.read_text())


def test_a_sweep_killed_half_way_finishes_without_repeating_trials(interrupted_sweep):
    folder, before, _, printed = interrupted_sweep
    assert 1 <= len(before) < TRIALS
    for trial, rows in before.items():
        assert read_metrics(folder / trial) == rows  # With its times: it was not trained again.
    trials = pd.read_csv(f"{folder.path}/trials.csv")
    assert len(trials) == TRIALS
    assert set(trials["status"]) <= {"finished", "stopped early"}
    for trial in trials["trial"]:
        steps = [row["step"] for row in read_metrics(folder / trial)]
        assert steps == sorted(set(steps))
    assert "sweep searched, best first" in printed


def test_bad_trials_stop_early_and_the_best_is_no_worse_than_the_start(interrupted_sweep):
    folder, _, _, printed = interrupted_sweep
    trials = pd.read_csv(f"{folder.path}/trials.csv").set_index("trial")
    stopped = trials[trials["status"] == "stopped early"]
    assert len(stopped) >= 2
    assert (stopped["kimg"] < 4.5).all()
    start = trials.loc["trial_00000"]
    assert start["optim.lr_g"] == 7e-4  # The configuration that the sweep was started from.
    assert trials["fid"].min() <= start["fid"]
    for trial in trials.index:  # What is promoted lies where promotion looks.
        _, info = best_checkpoint(folder / trial)
        assert info.fid == trials["fid"][trial]
    spent = trials["kimg"].sum()
    assert f"saved {max(0, 1 - spent / (TRIALS * 4.5)):.0%} of the full grid's training" in printed


def test_a_sweep_leaves_tables_plots_and_the_best_configuration(interrupted_sweep):
    folder = interrupted_sweep.folder
    trials = pd.read_csv(f"{folder.path}/trials.csv")
    points = pd.read_parquet(f"{folder.path}/points.parquet")
    pd.testing.assert_frame_equal(points, pd.read_csv(f"{folder.path}/points.csv"))
    for trial, rows in points.groupby("trial"):
        reported = [row for row in read_metrics(folder / trial) if "fid" in row]
        assert rows["kimg"].tolist() == [row["kimg"] for row in reported]
        assert rows["fid"].tolist() == [row["fid"] for row in reported]
    best = RunConfig.parse(yaml.safe_load(folder.read_bytes("best.yaml")))
    assert best.optim.lr_g == pytest.approx(trials["optim.lr_g"][0])
    assert best.total_kimg == 4.5
    for plot in ("fid_by_kimg.png", "fid_by_parameter.png"):
        assert folder.read_bytes(plot).startswith(b"\x89PNG")


def test_a_finished_sweep_is_read_not_run_again(interrupted_sweep):
    folder = interrupted_sweep.folder
    config = RunConfig.parse(folder.read_json("sweep.json")["config"])
    space = {"optim.lr_g": "loguniform(1e-5, 1e-2)", "loss.ortho_g": "choice([0.0, 1e-4])"}
    search = Search(num_trials=TRIALS, max_concurrent=2, search_seed=1)
    began = time.monotonic()
    again = biggan.sweep(config, "searched", space, search=search)
    assert time.monotonic() - began < 15
    assert (
        again.trials["trial"].tolist() == pd.read_csv(f"{folder.path}/trials.csv")["trial"].tolist()
    )
    with pytest.raises(ConfigError, match="exists with another search"):
        biggan.sweep(config, "searched", space, search=Search(num_trials=TRIALS + 1))


def test_no_more_trials_run_at_a_time_than_asked_for(interrupted_sweep):
    folder, spans = interrupted_sweep.folder, []
    for trial in pd.read_csv(f"{folder.path}/trials.csv")["trial"]:
        times = [row["time"] for row in read_metrics(folder / trial)]
        if later := [time for time in times if time > interrupted_sweep.begun_again]:
            spans.append((later[0], later[-1]))
    # The cluster counts 4 CPUs, so that more could.
    assert len(spans) > 2
    assert max(sum(a <= start <= b for a, b in spans) for start, _ in spans) <= 2


def train_workers():
    return [p for p in psutil.process_iter(["name"]) if "RayTrainWorker" in p.info["name"]]


def test_trials_of_several_workers_stop_early_and_leave_no_worker_behind(digits):
    config = tiny(total_kimg=0.768, optim__lr_g=1e-3)
    search = Search(num_trials=2, max_concurrent=1, workers_per_trial=2, grace_kimg=0.256)
    # The first trial is the configuration's own 1e-3.
    result = biggan.sweep(config, "grouped", {"optim.lr_g": "choice([1e-7])"}, search=search)
    assert result.trials["optim.lr_g"].tolist() == [1e-3, 1e-7]  # Best first.
    assert result.trials["status"].tolist() == ["finished", "stopped early"]
    for _ in range(100):
        if not train_workers():
            break
        time.sleep(0.1)
    assert not train_workers()


@pytest.mark.parametrize(
    "space,said",
    [
        ({"optim.lr": "uniform(0, 1)"}, "optim.lr_g"),
        ({"optim.lr_g": "uniform(-1, 1)"}, "optim.lr_g"),
        ({"model.ch_g": "uniform(2, 8)"}, "model.ch_g = .* valid integer"),
        ({"optim.batch_size": "loguniform(32, 64)"}, "optim.batch_size = .* valid integer"),
        ({"optim.batch_size": "choice([0, 32])"}, "optim.batch_size"),
        ({"model.attention": "choice([[8], [1024]])"}, "attention"),
        ({"optim.batch_size": "choice([])"}, "optim.batch_size.*holds no values"),
        ({"optim.num_D_steps": "randint(2, 2)"}, "optim.num_D_steps.*holds no values"),
        ({"dataset": "choice(['a', 'b'])"}, "compared only if they share it"),
        ({"eval.every_kimg": "choice([1, 2])"}, "compared only if they share it"),
    ],
)
def test_a_space_with_a_value_no_run_could_have_is_refused(digits, space, said):
    with pytest.raises(ConfigError, match=said):
        biggan.sweep(tiny(), "wrong", space)
    assert not locate("sweeps", "wrong").exists()


@pytest.mark.parametrize("text", ["", "loguniform", "loguniform(1)", "open('x')", "lambda: 1", "1"])
def test_what_is_no_domain_is_refused(text):
    with pytest.raises(ConfigError, match="write loguniform"):
        parse_domain(text)


def test_domains_are_read():
    assert parse_domain("choice([32, 64])").categories == [32, 64]
    assert parse_domain(" uniform(0, 1)").upper == 1
    assert parse_domain("randint(1, 5)").lower == 1
    values = [parse_domain("loguniform(1e-5, 1e-3)").sample() for _ in range(100)]
    assert 1e-5 <= min(values) < 1e-4 < max(values) <= 1e-3
