"""Batches that do not fit, in processes whose memory is really limited."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny

from biggan.memory import smaller_accumulations
from biggan.runs import read_metrics
from biggan.storage import Folder

PROGRAM = """
import resource, sys
import torch
from conftest import tiny, train_here
from biggan.data.dataset import Dataset
from biggan.memory import DoesNotFitError
from biggan.storage import Folder

torch.set_num_threads(1)
dataset, runs = sys.argv[1:]
config = tiny(
    optim__batch_size=1024, total_kimg=1.024, eval__every_kimg=1.024, eval__num_samples=64,
    checkpoint__every_kimg=1.024, model__ch_g=16, model__ch_d=16,
    speed__keep_memory=False,  # A limit on addresses counts what is kept, too.
)
data = Dataset.open(dataset)
torch.nn.functional.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))  # Loads what it loads.
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 700 * 2**20,) * 2)
try:
    train_here(config, Folder(runs + "/stop"), data)
except DoesNotFitError as error:
    print(error)
config = config.override({"speed.auto_accumulate": True})
print(train_here(config, Folder(runs + "/auto"), data, say=print))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory by RLIMIT_AS")
def test_a_batch_that_does_not_fit(digits, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, digits.folder.uri, str(tmp_path)],
        cwd=Path(__file__).parent,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # Holes between arenas are not the matter here.
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    advice, *said = done.stdout.splitlines()
    assert advice.startswith("micro-batches of 1024 images do not fit in memory")
    assert "would fit: --optim.accumulation" in advice
    assert "keeps the optimizer's batch as it is" in advice
    run = Folder(str(tmp_path / "auto"))
    accumulation = run.read_json("accumulation.json")["accumulation"]
    assert any(f"with {1024 // accumulation}, {accumulation} to a batch" in line for line in said)
    assert said[-1] == "finished"
    assert read_metrics(run)[-1]["step"] == 1  # The optimizer's batch is the one configured.


def test_smaller_micro_batches_divide_the_batch():
    assert smaller_accumulations(tiny(optim__batch_size=64), workers=2) == [2, 4, 8, 16]
    config = tiny(optim__batch_size=60, optim__accumulation=2)
    assert smaller_accumulations(config, workers=1) == [3, 4, 5, 6, 10, 12, 15, 20, 30]
