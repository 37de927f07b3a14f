"""A killed preparation goes on where it was; what it left never mixes with anything else."""

import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from biggan.data import plan as plans
from biggan.data.dataset import Dataset
from biggan.data.plan import Plan
from biggan.data.preparation import Preparation, PreparationError, prepare
from biggan.data.shards import finished_shards, sort_out, write_shard
from biggan.data.sources.digits import DigitsSource
from biggan.storage import Folder

KILLED = """
import sys
from biggan.data import plan
plan.SHARD_IMAGES = 8
from biggan.data.preparation import Preparation, prepare
prepare(Preparation(sys.argv[1], 8, held_out=0.1), "killed")
"""


def pictures(root, n, side):
    """So many images in two classes; large ones leave time to interrupt."""
    for i in range(n):
        few = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(few).resize((side, side)).save(root / "ab"[i % 2] / f"{i}.jpg")
    return root


def test_a_killed_preparation_goes_on(tmp_path, storage, cluster, monkeypatch):
    datasets, slow = storage / "datasets", pictures(tmp_path / "slow", 160, 1000)
    driver = subprocess.Popen(
        [sys.executable, "-c", KILLED, slow], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while not list(datasets.glob(".killed.*.partial/.records/*.npz")):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    (draft,) = datasets.glob(".killed.*.partial")
    time.sleep(0.5)  # Its workers end, too.
    records = sorted(draft.glob(".records/*.npz"))
    done = {path.stem: (draft / f"part-{path.stem}.parquet").stat() for path in records}
    assert 1 <= len(done) < 20
    records[0].write_bytes(records[0].read_bytes()[:-100])  # A record that was cut short:
    done.pop(records[0].stem)  # its shard is written again.
    monkeypatch.setattr(plans, "SHARD_IMAGES", 8)
    choices = Preparation(str(slow), 8, held_out=0.1)
    written = {}

    def spy(*args):
        written.update({path.stem[5:]: path.stat() for path in draft.glob("part-*.parquet")})

    monkeypatch.setattr("biggan.data.preparation._sort_out", spy)
    monkeypatch.setattr("biggan.data.preparation._measure_reference", interrupt)
    said = []
    with pytest.raises(KeyboardInterrupt):
        prepare(choices, "killed", progress=said.append)
    taken_up = f"taking up at {len(done)} of 20 shards, {8 * len(done)} images done"
    assert taken_up in said or not done
    for name, before in done.items():
        assert written[name].st_mtime_ns == before.st_mtime_ns
    assert len(written) == 20
    monkeypatch.undo()
    monkeypatch.setattr(plans, "SHARD_IMAGES", 8)
    info = prepare(choices, "killed", progress=said.append)  # Interrupted again, and taken up.
    assert "taking up at 20 of 20 shards, 160 images done" in said
    assert (info.counts, info.held_out) == ([72, 72], [8, 8])
    assert not list(datasets.glob(".killed*"))
    assert not [f for f in Dataset.open("killed").folder.children() if f.startswith(".")]
    whole = prepare(choices, "unkilled", progress=said.append)
    assert whole == info


def interrupt(*args):
    raise KeyboardInterrupt


def test_taking_rows_out_twice_is_taking_them_out_once(tmp_path):
    draft, items = Folder(str(tmp_path)), np.arange(10)
    write_shard(Preparation("digits", 8, channels=1), DigitsSource(), items, draft, 0)
    dropped, held_out = items < 2, items == 5
    renumbered = np.arange(10, dtype=np.int32)[::-1]
    sort_out(draft, 0, dropped, held_out, renumbered)
    once = (tmp_path / "part-000000.parquet").read_bytes()
    assert list(dict(finished_shards(draft, Plan(10, 1, 64)))) == [0]
    sort_out(draft, 0, dropped, held_out, renumbered)
    assert (tmp_path / "part-000000.parquet").read_bytes() == once
    table = pq.read_table(tmp_path / "part-000000.parquet")
    assert table["source"].to_pylist() == ["2", "3", "4", "6", "7", "8", "9"]
    assert table["label"].to_pylist() == [7, 6, 5, 3, 2, 1, 0]
    held = pq.read_table(tmp_path / "held_out-000000.parquet")
    assert (held["source"].to_pylist(), held["label"].to_pylist()) == (["5"], [4])


def test_what_is_left_of_another_plan_is_not_used_and_goes(tmp_path, storage, cluster, monkeypatch):
    few = pictures(tmp_path / "few", 40, 20)
    monkeypatch.setattr("biggan.data.preparation._measure_reference", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(Preparation(str(few), 8), "changed", progress=lambda line: None)
    monkeypatch.undo()
    (few / "a" / "0.jpg").unlink()
    said = []
    info = prepare(Preparation(str(few), 8), "changed", progress=said.append)
    assert info.n_images == 39
    assert not any("taking up" in line for line in said)
    assert [path.name for path in (storage / "datasets").glob("*changed*")] == ["changed"]


def test_a_verdict_leaves_nothing_to_take_up(tmp_path, storage, cluster):
    few = pictures(tmp_path / "few", 40, 20)
    for i in range(0, 4, 2):
        (few / "a" / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(PreparationError, match="2 of 40 files"):
        prepare(Preparation(str(few), 8), "refused", progress=lambda line: None)
    assert not list((storage / "datasets").glob("*refused*"))
