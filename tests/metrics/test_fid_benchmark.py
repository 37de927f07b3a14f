"""`benchmarks/fid.py` as it is run, with few features and images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = """--dim 256 --rounds 1 --num-samples 1000 --measured 2 --batch-size 2 --ch 2 --threads 1
    --device cpu"""


def test_figures_of_fid(tmp_path):
    script = [sys.executable, "-W", "ignore:Matrix is singular", "benchmarks/fid.py"]
    command = [*script, *TINY.split(), "--json", tmp_path / "figures.json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    for row in figures["frechet"].values():
        assert row["difference"] < 1e-6
        assert row["error"] < 1e-9
        assert row["ratio"] == pytest.approx(row["seconds_scipy"] / row["seconds"])
    assert all(seconds > 0 for seconds in figures["stages"].values())
    assert "from 2 measured in batches of 2" in run.stdout


def test_what_cannot_be_measured():
    command = [sys.executable, "benchmarks/fid.py", "--rounds", "0"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "error: --rounds must be 1 or more\n"
