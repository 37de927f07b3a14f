"""From files to a dataset, damage included."""

import json
import re
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import job
from PIL import Image

from biggan.commands import run_command
from biggan.data.dataset import Dataset, DatasetInfo
from biggan.data.order import ShuffledOrder
from biggan.data.preparation import Preparation, PreparationError, prepare
from biggan.data.shards import write_shard
from biggan.data.sources import SourceError, open_source
from biggan.data.sources.folders import ClassFolders
from biggan.storage import Folder, StorageError, locate
from jobs import prepare as prepare_command


def draw(path, seed, size=(20, 14)):
    """Save a random picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def photos(tmp_path):
    """Two hundred good pictures in two classes, and one of each kind of bad one."""
    root = tmp_path / "photos"
    for i in range(100):
        draw(root / "cats" / f"{i}.png", i)
        draw(root / "dogs" / "more" / f"{i}.jpg", 1000 + i)
    return root


@pytest.fixture
def command(storage, monkeypatch, capsys):
    """Runs jobs/prepare.py in this process, asserts its status, and gives what it printed."""

    def run(*flags, status=0):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *flags])
        with pytest.raises(SystemExit) as end:
            run_command(prepare_command.main)
        assert end.value.code == status
        return capsys.readouterr()

    return run


def spoil(root):
    whole = (root / "cats" / "0.png").read_bytes()
    (root / "cats" / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "dogs" / "notes.txt").write_text("not an image")
    (root / "empty").mkdir()
    (root / ".DS_Store").write_text("")
    (root / "cats" / "Thumbs.db").write_text("")


def test_a_folder_with_damage_becomes_a_dataset(photos, storage, cluster, command):
    spoil(photos)
    said = job("prepare", "--source", str(photos), "--name", "pets", "--resolution", "8").stdout
    info = DatasetInfo.read(Folder(f"{storage}/datasets/pets"))
    assert info.classes == ["cats", "dogs"]
    assert info.counts == [100, 100]
    assert (info.resolution, info.channels) == (8, 3)
    reasons = {entry.path: entry.reason for entry in info.rejected}
    assert set(reasons) == {"cats/half.png", "dogs/notes.txt", "empty"}
    assert "truncated" in reasons["cats/half.png"]
    assert reasons["dogs/notes.txt"] == "no image that Pillow can open"
    for path, reason in reasons.items():
        assert f"rejected {path}: {reason}" in said
    dataset = Dataset.open("pets")
    assert dataset.images.shape == (200, 3, 8, 8)
    assert torch.bincount(dataset.labels).tolist() == [100, 100]
    table = pq.read_table(f"{storage}/datasets/pets/part-000000.parquet")
    assert [(f.name, str(f.type)) for f in table.schema] == [
        ("image", "binary"),
        ("label", "int32"),
        ("source", "string"),
    ]
    labels = dict(zip(table["source"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert labels["cats/7.png"] == 0
    assert labels["dogs/more/7.jpg"] == 1
    again = command("--source", str(photos), "--name", "pets", "--resolution", "8").out
    assert "already prepared" in again
    with pytest.raises(PreparationError, match="was prepared differently"):
        prepare(Preparation(str(photos), 16), "pets")


def test_a_class_without_a_readable_image_leaves_no_gap(photos, storage, cluster):
    (photos / "birds").mkdir()
    for i in range(2):
        (photos / "birds" / f"{i}.png").write_text("not an image")
    prepare(Preparation(str(photos), 8, channels=1, allow=("channels",)), "birdless")
    dataset = Dataset.open("birdless")
    assert dataset.info.classes == ["cats", "dogs"]
    assert torch.bincount(dataset.labels).tolist() == [100, 100]
    assert dataset.images.shape == (200, 1, 8, 8)
    rejected = {entry.path: entry.reason for entry in dataset.info.rejected}
    assert rejected["birds"] == "class without a readable image"


@pytest.mark.parametrize("bad", [5, 200], ids=["some", "all"])
def test_too_much_damage_fails_and_leaves_nothing(photos, storage, cluster, bad):
    files = sorted(path for path in photos.rglob("*") if path.is_file())[:bad]
    for path in files:
        path.write_bytes(b"")
    before = sorted(path.name for path in storage.rglob("*"))
    said = []
    with pytest.raises(PreparationError) as error:
        prepare(Preparation(str(photos), 8), "bad", progress=said.append)
    if bad == 5:
        expected = "5 of 200 files (2.5%) are unusable, more than --max-rejected 1.0%"
    else:
        expected = "none of the 200 files"
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    rejected = {line.split(": ")[0] for line in said if line.startswith("rejected ")}
    assert len(rejected) == min(bad, 20)
    assert rejected <= {f"rejected {path.relative_to(photos)}" for path in files}
    more = "and 182 more, listed in dataset.json"  # Two classes are without an image, too.
    assert (more in said) == (bad == 200)
    assert sorted(path.name for path in storage.rglob("*")) == before


def test_a_single_class_may_pass_with_a_warning(tmp_path, cluster, command):
    for i in range(30):
        draw(tmp_path / "one" / "only" / f"{i}.png", i)
    flags = ["--source", f"{tmp_path}/one/", "--resolution", "8"]
    refused = command(*flags, status=2).err
    assert refused.startswith("error: all images are of one class, 'only'")
    assert refused.count("\n") == 1
    said = command(*flags, "--allow", "one-class").out
    assert said.count("warning: all images are of one class, 'only'") == 1
    assert "dataset one: 30 images, 1 classes, 0 rejected" in said
    assert Dataset.open("one").info.counts == [30]


def test_a_folder_that_is_no_dataset_is_never_replaced(photos, command, monkeypatch):
    monkeypatch.chdir(photos)
    for flags in (["--name", str(photos)], ["--name", f"{photos}/cats"]):
        said = command("--source", str(photos), *flags, "--overwrite", status=2).err
        assert "exists and is no prepared dataset" in said
    assert len(list(photos.rglob("*.*"))) == 200
    assert [path.name for path in photos.parent.iterdir()] == [photos.name]


def test_files_that_cannot_be_reached_count_as_bad(photos, storage, cluster):
    for i in range(10):
        (photos / "cats" / f"gone{i}.png").symlink_to("/mnt/not-mounted.png")
    with pytest.raises(PreparationError, match=r"10 of 210 files \(4.8%\) are unusable"):
        prepare(Preparation(str(photos), 8), "unmounted", progress=lambda line: None)
    links = photos.parent / "links"
    (links / "cats").mkdir(parents=True)
    (links / "cats" / "0.png").symlink_to("/mnt/not-mounted.png")
    with pytest.raises(SourceError, match=r"cats/0.png: not a file, or a link that leads nowhere"):
        open_source(str(links))


def test_what_an_interrupted_copy_left_is_replaced(photos, storage, cluster):
    left = locate("datasets", "left")
    left.write_bytes("part-000007.parquet", b"half")
    info = prepare(Preparation(str(photos), 8), "left", progress=lambda line: None)
    assert info.n_images == 200
    assert "part-000007.parquet" not in left.children()


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--resolution", "48"], "resolution 48: must be one of"),
        (["--max-rejected", "2"], "max_rejected 2.0: must be from 0 to 1"),
        (["--name", "a b"], "name 'a b': use letters"),
        (["--background", "0", "0", "256"], "background (0, 0, 256): must be RGB, 0 to 255"),
        (["--held-out", "0.6"], "held_out 0.6: must be from 0 (none) to 0.5"),
        (["--min-class-images", "0"], "min_class_images 0: must be 1 or more"),
        (["--seed", "-1"], "seed -1: must be from 0"),
        (["--describe", "digits"], "give it without --source"),
        (["--source", ""], "nothing to prepare: give --source"),
        (["--describe", "nowhere", "--source", ""], "no prepared dataset at"),
    ],
)
def test_bad_flags(flags, said, command):
    assert said in command("--source", "digits", *flags, status=2).err


def test_the_digits(digits):
    info = digits.info
    assert (info.resolution, info.channels, len(info.classes)) == (16, 1, 10)
    assert info.n_images == 1797
    assert re.fullmatch(r"[0-9a-f]{64}", info.fingerprint)
    assert info.rejected == []


def test_the_digest_of_an_image_is_that_of_its_class_and_pixels(photos, tmp_path):
    def digests():
        source = ClassFolders(Folder(str(photos)))
        out, items = Folder(str(tmp_path / "out")), np.arange(len(source))
        record = write_shard(Preparation(str(photos), 8, channels=3), source, items, out, 0)
        return {row.tobytes() for row in record.digests}

    first = digests()
    (photos / "cats" / "0.png").rename(photos / "cats" / "zero.png")  # Names do not count,
    assert digests() == first
    (photos / "cats" / "1.png").rename(photos / "dogs" / "1.png")  # classes do,
    moved = digests()
    assert len(moved - first) == 1
    draw(photos / "cats" / "2.png", 777)  # and pixels.
    assert len(digests() - moved) == 1


def test_a_dataset_that_is_not_there_or_damaged(storage, digits, tmp_path):
    with pytest.raises(StorageError, match=r"no prepared dataset.*jobs/prepare.py"):
        Dataset.open("nowhere")
    copy = tmp_path / "digits"
    with digits.folder.local_copy() as local:
        Folder(str(copy)).upload(local)
    (copy / "part-000001.parquet").unlink()
    with pytest.raises(StorageError, match=r"promises 1797 images"):
        Dataset.open(str(copy))
    (copy / "dataset.json").write_text(json.dumps({"classes": []}))
    with pytest.raises(StorageError, match=r"dataset.json is damaged"):
        Dataset.open(str(copy))


def test_every_image_once_an_epoch_whatever_the_batch():
    order = ShuffledOrder(10, seed=3)
    seen = np.concatenate([order.indices(start, 4) for start in range(0, 40, 4)])
    for epoch in range(4):
        assert sorted(seen[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert seen[:10].tolist() != seen[10:20].tolist()
    assert ShuffledOrder(10, seed=3).indices(23, 9).tolist() == seen[23:32].tolist()
    assert ShuffledOrder(10, seed=4).indices(0, 10).tolist() != seen[:10].tolist()


def test_a_batch_may_span_several_epochs():
    assert np.bincount(ShuffledOrder(3, seed=0).indices(3, 9)).tolist() == [3, 3, 3]


def test_preparation_refuses_what_it_cannot_do():
    with pytest.raises(PreparationError, match="channels 4"):
        Preparation("digits", 8, channels=4)
