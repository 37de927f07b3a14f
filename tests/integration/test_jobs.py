"""The whole path by `ray job submit`, on a cluster that asks for a token."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, free_port
from ray import serve

import biggan
from biggan.runs import read_metrics
from biggan.storage import locate

RAY = Path(sys.executable).with_name("ray")
MARK = "SUBMITTED CODE"
SMALL = """--preset laptop --dataset submitted --model.ch-g 2 --model.ch-d 2 --model.z-dim 12
    --total-kimg 1.28 --eval.num-samples 64 --eval.every-kimg 0.64 --ema.decay 0.9"""


def submit(cluster, tree, command, status=0, **environment):
    """Submit a command as the README has it, from a working tree; returns what was printed."""
    job = f"""job submit --address {cluster.dashboard} --working-dir .
        --runtime-env jobs/runtime_env.yaml -- python {command}"""
    done = subprocess.run(
        [RAY, *job.split()],
        cwd=tree,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A working tree whose code can be told from the installed package's by what it prints."""
    tree = tmp_path_factory.mktemp("tree")
    for part in ("platform", "jobs", "serving"):
        shutil.copytree(
            ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    loop = tree / "platform/biggan/loop.py"
    original = loop.read_text()
    changed = original.replace("    print(line, flush=True)", f'    print("{MARK}", line)')
    assert changed != original
    loop.write_text(changed)
    return tree


@pytest.fixture(scope="module")
def submitted(cluster, storage, tree):
    """What was printed by the jobs of the whole path; a run and a sweep train side by side."""
    commands = {
        "prepare": "jobs/prepare.py --source digits --name submitted",
        "train": f"jobs/train.py --name submitted {SMALL}"
        " --scaling.workers 2 --scaling.cpus-per-worker 1",
        "repeat": "jobs/train.py --name submitted",
        "sweep": f"jobs/sweep.py --name submitted {SMALL} --num-trials 2",
        "promote": "jobs/promote.py --sweep submitted",
    }
    printed = {}

    def run(*verbs):
        for verb in verbs:
            printed[verb] = submit(cluster, tree, f"{commands[verb]} --storage {storage}")

    run("prepare")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda verbs: run(*verbs), (("train", "repeat"), ("sweep", "promote"))))
    return printed


def test_prepare_and_train_with_the_code_that_was_submitted(submitted):
    assert "prepared 1,797/1,797 images" in submitted["prepare"]
    assert f"{MARK} 0.6/1.28 kimg" in submitted["train"]  # Printed by a worker.
    assert "img/s" in submitted["train"]
    assert "best checkpoint: " in submitted["train"]
    assert "best checkpoint: " in submitted["repeat"]
    assert MARK not in submitted["repeat"]  # There was nothing left to do.
    rows = read_metrics(locate("runs", "submitted"))
    assert [row["kimg"] for row in rows if "fid" in row] == [0.64, 1.28]


def test_a_sweep_is_searched_and_promoted(submitted):
    assert "of the full grid's training" in submitted["sweep"]
    trials = pd.read_csv(f"{locate('sweeps', 'submitted').path}/trials.csv")
    assert trials["status"][0] == "finished"
    assert trials["standing"][0] == "best"
    assert "noise of an FID: " in submitted["sweep"]
    assert "model submitted@v1: FID" in submitted["promote"]
    assert "best points to it: the first version" in submitted["promote"]
    assert biggan.load_generator("submitted@best").sample([1]).shape == (1, 16, 16, 1)


def test_a_model_is_evaluated_generated_from_and_served(
    submitted, cluster, storage, tree, tmp_path
):
    model, parts, port = "submitted@best", tmp_path / "parts", free_port()
    commands = (
        f"jobs/evaluate.py --model {model}",
        f"jobs/generate.py --model {model} --format parquet --n 30 --output {parts}",
        f"-m serving --models {model} --port {port} --no-auth --detach",
    )
    with ThreadPoolExecutor() as pool:
        printed = list(
            pool.map(lambda c: submit(cluster, tree, f"{c} --storage {storage}"), commands)
        )
    try:
        assert f"{biggan.evaluate(model=model).value:.3f}" in printed[0]
        assert len(pd.read_parquet(parts)) == 30
        image = biggan.Client(f"http://127.0.0.1:{port}").arrays(7, seed=1)
        expected = biggan.load_generator(model).sample([7], seed=1)
        assert abs(image.astype(int) - expected.astype(int)).max() <= 1
    finally:
        serve.shutdown()
