"""Every kind of source: what was written comes out, pixel by pixel, and damage is told."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import struct
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pydicom.data
import pytest
from PIL import Image
from pydicom.encaps import encapsulate

from biggan.data.dataset import DatasetInfo
from biggan.data.images import standardize
from biggan.data.parts import encode
from biggan.data.sources import SourceError, SourceOptions, open_source
from biggan.data.sources import parquet as parquet_module
from biggan.data.sources.decoding import decode_image
from biggan.storage import Folder

SIDE = 6
CLASSES = ["bird", "cat", "dog"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BIGGAN_CACHE", str(folder))
    (folder / "sources").mkdir()
    return folder / "sources"


def pictures(n, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, SIDE, SIDE, channels) if channels > 1 else (n, SIDE, SIDE)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def names(n):
    """Class names of n images: bird, cat, dog, bird, ..."""
    return [CLASSES[i % len(CLASSES)] for i in range(n)]


def shown(source, items=None):
    """Pixels and class names of items, in the order asked for, after a worker's pickling."""
    source = pickle.loads(pickle.dumps(source))
    items = np.arange(len(source)) if items is None else np.asarray(items)
    pixels = [np.asarray(sample.load()) for sample in source.read(items)]
    return pixels, [source.classes[label] for label in source.labels[items]]


def check(source, images, labels):
    """The source holds these images with these labels, each once, in any order."""
    pixels, found = shown(source)
    assert len(source) == len(images)
    wanted = {(image.tobytes(), label) for image, label in zip(images, labels, strict=True)}
    assert {(image.tobytes(), label) for image, label in zip(pixels, found, strict=True)} == wanted
    order = np.random.default_rng(1).permutation(len(source))
    again, _ = shown(source, order)
    assert all(np.array_equal(again[i], pixels[item]) for i, item in enumerate(order))
    refs = [sample.ref for sample in source.read(order)]
    assert refs == source.refs(order)
    assert len(set(refs)) == len(refs)


def fails(path, said, **options):
    with pytest.raises(SourceError, match=said) as error:
        open_source(str(path), SourceOptions(**options))
    assert "\n" not in str(error.value)


def errors(source):
    """What the items that cannot be read say, by item."""
    found = {}
    for item, sample in enumerate(source.read(np.arange(len(source)))):
        try:
            standardize(sample.load(), 8, 3)
        except Exception as error:
            found[item] = str(error)
    return found


def cut(path, part=0.5):
    """Leave the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


# Class folders, and archives of them.


def class_folders(root, images, labels, above=""):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = root / above / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return root


def zipped(path, folder):
    with zipfile.ZipFile(path, "w") as archive:
        for i, file in enumerate(sorted(folder.rglob("*"))):
            methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
            method = (*methods, zipfile.ZIP_LZMA)[i % 4]
            archive.write(file, file.relative_to(folder), method)
    return path


def tarred(path, folder, mode="w"):
    with tarfile.open(path, mode) as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, f"./{file.name}")
    return path


@pytest.mark.parametrize("above", ["", "archive/pictures"])
@pytest.mark.parametrize(
    "name,mode",
    [("a.zip", ""), ("a.tar", "w"), ("a.tgz", "w:gz"), ("a.tar.bz2", "w:bz2"), ("a.txz", "w:xz")],
)
def test_archives_of_class_folders(tmp_path, name, mode, above, cache):
    images, labels = pictures(10), names(10)
    folder = class_folders(tmp_path / "folder", images, labels, above)
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._0.png").write_text("litter")
    (folder / above / CLASSES[0] / ".DS_Store").write_text("litter")
    path = tmp_path / name
    source = open_source(str(tarred(path, folder, mode) if mode else zipped(path, folder)))
    assert source.classes == CLASSES
    assert source.description == {"kind": "tar" if mode else "zip", "uri": str(path)}
    check(source, images, labels)
    assert source.rejected == []
    assert len(list(cache.iterdir())) == (2 if ":" in mode else 0)  # Unpacked once, and its lock.


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_class_folders_by_split(tmp_path, kind):
    images, labels = pictures(12), names(12)
    root = tmp_path / "root"
    class_folders(root, images[:6], labels[:6], "train")
    class_folders(root, images[6:], labels[6:], "Test")
    path = root
    if kind != "folder":
        path = tmp_path / f"a.{kind}"
        (zipped if kind == "zip" else tarred)(path, root)
    check(open_source(str(path)), images[:6], labels[:6])
    check(open_source(str(path), SourceOptions(split="test")), images[6:], labels[6:])
    both = open_source(str(path), SourceOptions(split="all"))
    check(both, images, labels)
    assert both.held_out.sum() == 6
    assert all(ref.lower().startswith("test") for ref in both.refs(np.flatnonzero(both.held_out)))
    fails(path, "no split 'val': give --split test or train", split="val")


def test_splits_without_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.png").write_bytes(png(pictures(1)[0]))
    fails(tmp_path, "has folders test, train, and no folders of classes in them.*--labels")


def test_a_member_that_is_damaged_or_encrypted(tmp_path):
    folder = class_folders(tmp_path / "folder", pictures(8), names(8))
    path = zipped(tmp_path / "a.zip", folder)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("cat/1.png")
        locked = archive.getinfo("cat/4.png")
    content = bytearray(path.read_bytes())
    content[info.header_offset + 60] ^= 0xFF
    place = content.rindex(b"cat/4.png") - 46  # Its entry in the directory.
    assert content[place : place + 4] == b"PK\1\2"
    content[place + 8] |= 1
    path.write_bytes(content)
    source = open_source(str(path))
    found = {source.refs(np.array([item]))[0]: text for item, text in errors(source).items()}
    assert set(found) == {info.filename, locked.filename}
    assert "encrypted" in found["cat/4.png"]


@pytest.mark.parametrize("part", [0.2, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("name,mode", [("a.zip", ""), ("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_archives_cut_short(tmp_path, name, mode, part):
    folder = class_folders(tmp_path / "folder", pictures(50), names(50))
    path = tmp_path / name
    tarred(path, folder, mode) if mode else zipped(path, folder)
    if mode == "w":  # Without the padding at the end.
        path.write_bytes(path.read_bytes().rstrip(b"\0"))
    cut(path, part)
    fails(path, "truncated")


def test_tars_that_end_too_early(tmp_path):
    folder = class_folders(tmp_path / "folder", pictures(5), names(5))
    path = tarred(tmp_path / "a.tar", folder)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        end = archive.offset
    path.write_bytes(whole[: members[3].offset])  # Just between two members.
    fails(path, "its end marker is missing")
    path.write_bytes(whole + whole)
    fails(path, "joined archives")
    broken = bytearray(whole)
    broken[members[3].offset + 5] ^= 0xFF
    path.write_bytes(broken)
    fails(path, "no header at byte")
    path.write_bytes(whole[: end + 512])  # One block of zeros is enough.
    assert len(open_source(str(path))) == 5


def test_links_in_tars(tmp_path):
    path = tmp_path / "a.tar"
    image = png(pictures(1)[0])
    with tarfile.open(path, "w") as archive:
        for name, kind, target in (
            ("a/0.png", tarfile.REGTYPE, ""),
            ("b/0.png", tarfile.LNKTYPE, "a/0.png"),
            ("b/1.png", tarfile.SYMTYPE, "../a/0.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            info.size = 0 if target else len(image)
            archive.addfile(info, io.BytesIO(image))
    source = open_source(str(path))
    check(source, [pictures(1)[0]] * 2, ["a", "b"])
    assert [(r.path, source.unreadable) for r in source.rejected] == [("b/1.png", 1)]


def test_archives_without_classes(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("0.png", png(pictures(1)[0]))
    fails(tmp_path / "a.zip", "has no classes: expected one folder a class.*found 1 files")


def test_folders_named_by_numbers_with_gaps(tmp_path):
    class_folders(tmp_path / "gaps", pictures(3), ["0", "1", "3"])
    (finding,) = open_source(str(tmp_path / "gaps")).findings
    assert finding.check == "gaps"
    assert "class ids 0, 1, 3 ('folders') leave out 2" in finding.text
    for names_ in (["1", "2", "3"], ["2019", "2021", "2022"], ["0", "1", "cat"]):
        class_folders(tmp_path / names_[1], pictures(3), names_)
        assert open_source(str(tmp_path / names_[1])).findings == []


# WebDataset.


def shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for key, files in samples:
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def shards(root, images, labels, pattern="train-{:03d}.tar", per=4):
    root.mkdir(parents=True, exist_ok=True)
    for k, start in enumerate(range(0, len(images), per)):
        some = range(start, min(start + per, len(images)))
        samples = [(f"{i:06d}", {"png": png(images[i]), "cls": labels[i].encode()}) for i in some]
        shard(root / pattern.format(k), samples)


@pytest.mark.parametrize(
    "spec", ["", "train-{000..002}.tar", "train-*.tar", "train-{000,001,002}.tar"]
)
def test_webdataset(tmp_path, spec):
    images, labels = pictures(10), [str(i % 3) for i in range(10)]
    shards(tmp_path, images, labels)
    source = open_source(str(tmp_path / spec))
    assert source.classes == ["0", "1", "2"]
    assert source.description["kind"] == "webdataset"
    assert source.refs(np.array([5])) == ["train-001.tar/000005.png"]
    check(source, images, labels)


def test_webdataset_with_json_and_two_splits(tmp_path):
    images = pictures(6)
    label = {"label": "cat", "species": "felis"}
    for split, part in (("train", images[:4]), ("val", images[4:])):
        samples = [
            (f"pets.v1/{i}", {"png": png(p), "json": json.dumps(label).encode()})
            for i, p in enumerate(part)
        ]
        shard(tmp_path / f"pets-{split}-0.tar", samples)
    check(open_source(str(tmp_path)), images[:4], ["cat"] * 4)
    options = SourceOptions(split="val", label_column="species")
    check(open_source(str(tmp_path), options), images[4:], ["felis"] * 2)
    check(open_source(str(tmp_path / "pets-val-0.tar")), images[4:], ["cat"] * 2)
    check(open_source(f"{tmp_path}/*val*"), images[4:], ["cat"] * 2)
    assert open_source(str(tmp_path), SourceOptions(split="all")).held_out.sum() == 2


def test_webdataset_with_bad_samples(tmp_path):
    image = png(pictures(1)[0])
    samples = [
        ("0", {"png": image, "cls": b"1"}),
        ("1", {"png": image}),
        ("2", {"cls": b"1"}),
        ("3", {"png": image[:40], "cls": b"2"}),
        ("4", {"png": image, "cls": b""}),
    ]
    shard(tmp_path / "a.tar", samples)
    source = open_source(str(tmp_path / "a.tar"))
    assert {r.path: r.reason for r in source.rejected} == {
        "a.tar/1.png": "no label beside the image",
        "a.tar/2": "a sample without an image",
        "4.png": "no label",
    }
    assert source.unreadable == 3
    assert list(errors(source)) == [1]
    shard(tmp_path / "b.tar", [("0", {"left.png": image, "right.png": image, "cls": b"0"})])
    fails(tmp_path / "b.tar", r"several images \(left.png, right.png\).*--image-column")
    assert len(open_source(str(tmp_path / "b.tar"), SourceOptions(image_column="left.png"))) == 1


def test_webdataset_with_a_shard_cut_short_or_missing(tmp_path):
    shards(tmp_path, pictures(10), names(10))
    fails(tmp_path / "train-{000..003}.tar", "train-003.tar is no file, or does not exist")
    fails(tmp_path / "test-*.tar", "names no file that is there")
    cut(tmp_path / "train-001.tar", 0.4)
    fails(tmp_path, "train-001.tar is a truncated")


# Parquet.


def image_rows(images):
    return [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(images)]


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def noted(table, label, class_names):
    """The table with the note that Hugging Face leaves in its schema."""
    features = {
        "image": {"_type": "Image"},
        label: {"names": class_names, "_type": "ClassLabel"},
    }
    note = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": note})


@pytest.mark.parametrize("large", [0, 2**40])
@pytest.mark.parametrize(
    "columns",
    [
        lambda images, labels: {
            "image": pa.array(image_rows(images), STRUCT),
            "label": pa.array(labels),
            "caption": pa.array(labels),
        },
        lambda images, labels: {
            "file": pa.array([png(image) for image in images], pa.large_binary()),
            "species": pa.array(labels).dictionary_encode(),
        },
        lambda images, labels: {
            "pixels": pa.array(images.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
            "class": pa.array(labels),
        },
    ],
    ids=["struct", "bytes", "lists"],
)
def test_parquet(tmp_path, columns, large, monkeypatch):
    monkeypatch.setattr(parquet_module, "LARGE_GROUP", large)
    parquet_module._group.cache_clear()
    images, labels = pictures(25), names(25)
    path = tmp_path / "images.parquet"
    pq.write_table(pa.table(columns(images, labels)), path, row_group_size=10)
    source = open_source(str(path))
    assert source.classes == CLASSES
    assert source.run_length == 10
    assert source.refs(np.array([24])) == ["images.parquet row 24"]
    check(source, images, labels)


def test_a_folder_of_parquet_with_named_classes(tmp_path):
    images = pictures(20)
    for k, split in enumerate(["train-0", "train-1", "test-0"]):
        some = slice(k * 6, k * 6 + 6)
        rows = pa.array(image_rows(images[some]), STRUCT)
        table = pa.table({"image": rows, "label": pa.array([0, 1, 2, 0, 1, -1])})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(noted(table, "label", CLASSES), tmp_path / "data" / f"{split}.parquet")
    kept = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    source = open_source(str(tmp_path))
    check(source, images[kept], names(5) * 2)
    assert [(r.path, r.reason) for r in source.rejected] == [
        ("train-0.parquet row 5", "label -1 is negative: unlabelled?"),
        ("train-1.parquet row 5", "label -1 is negative: unlabelled?"),
    ]
    everything = open_source(str(tmp_path), SourceOptions(split="all"))
    assert everything.held_out.tolist() == [True] * 5 + [False] * 10  # test-0 comes first.
    picked = open_source(str(tmp_path), SourceOptions(classes=("dog", "bird")))
    assert picked.classes == ["dog", "bird"]
    check(picked, images[[2, 0, 3, 8, 6, 9]], ["dog", "bird", "bird"] * 2)
    fails(
        tmp_path, "--classes dgo: the source has no such class; did you mean 'dog'", classes=["dgo"]
    )


def test_parquet_columns_that_are_not_clear(tmp_path):
    path = tmp_path / "a.parquet"
    images = pa.array([png(image) for image in pictures(4)])
    pq.write_table(pa.table({"a": images, "b": images, "label": [0, 1, 0, 1]}), path)
    fails(path, "which column is the image. Give --image-column one of a, b, label")
    assert len(open_source(str(path), SourceOptions(image_column="b"))) == 4
    fails(path, "has no column 'c': give --image-column one of a, b", image_column="c")
    pq.write_table(pa.table({"image": images, "p": [0, 1, 0, 1], "q": [0, 1, 0, 1]}), path)
    fails(path, "which column is the label. Give --label-column")
    many = pa.array([[0, 1], [1], [0], [1]])
    pq.write_table(pa.table({"image": images, "label": many}), path)
    fails(path, "type list<.*one whole number or one name an image", label_column="label")


def test_parquet_with_damage(tmp_path):
    images = pictures(30)
    rows = image_rows(images)
    rows[3]["bytes"] = rows[3]["bytes"][:40]
    rows[4] = {"bytes": None, "path": "gone.png"}
    rows[5] = None
    path = tmp_path / "a.parquet"
    table = pa.table({"image": pa.array(rows, STRUCT), "label": names(30)})
    pq.write_table(table, path, row_group_size=10, compression="NONE")
    source = open_source(str(path))
    assert set(errors(source)) == {3, 4, 5}
    assert "no image" in errors(source)[5]
    content = bytearray(path.read_bytes())
    middle = pq.read_metadata(path).row_group(1).column(0)
    content[middle.data_page_offset : middle.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    source = open_source(str(path))
    assert set(errors(source)) == {3, 4, 5, *range(10, 20)}
    cut(path)
    fails(path, "truncated or damaged Parquet file")
    path.write_bytes(b"")
    fails(path, "is empty")


# Labels, wherever they are.


@pytest.mark.parametrize(
    "labels,classes,rejected,check_",
    [
        ([0, 1, 3, 0], ["0", "1", "3"], [], "gaps"),
        ([1, 2, 3, 1], ["1", "2", "3"], [], None),
        ([5, 6, 7, 5], ["5", "6", "7"], [], "gaps"),
        ([10, 9, 8, None], ["8", "9", "10"], ["no label"], "gaps"),
        ([0.0, 1.0, float("nan"), 1.0], ["0", "1"], ["no label"], None),
        ([0.0, 1.0, 0.5, 1.0], ["0", "1"], ["label 0.5 is no whole number"], None),
        ([0, 1, -1, 1], ["0", "1"], ["label -1 is negative: unlabelled?"], None),
        (["b10", "b9", "", None], ["b9", "b10"], ["no label", "no label"], None),
        ([" cat", "cat ", "dog", "dog"], ["cat", "dog"], [], None),
        ([True, False, True, True], ["0", "1"], [], None),
    ],
)
def test_labels(tmp_path, labels, classes, rejected, check_):
    path = tmp_path / "a.parquet"
    images = pa.array([png(image) for image in pictures(4)])
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    source = open_source(str(path))
    assert source.classes == classes
    assert source.labels.dtype == np.int32
    assert len(source) == 4 - len(rejected)
    assert [r.reason for r in source.rejected] == rejected
    assert source.unreadable == len(rejected)
    assert [finding.check for finding in source.findings] == ([check_] if check_ else [])


def test_labels_that_are_all_missing(tmp_path):
    path = tmp_path / "a.parquet"
    images = pa.array([png(image) for image in pictures(4)])
    pq.write_table(pa.table({"image": images, "label": pa.array([-1] * 4)}), path)
    fails(path, "none of 4 labels .* is usable; the first, a.parquet row 0: label -1")


def test_named_classes_without_images_are_gaps(tmp_path):
    path = tmp_path / "a.parquet"
    rows = pa.array(image_rows(pictures(3)), STRUCT)
    pq.write_table(noted(pa.table({"image": rows, "label": [0, 2, 7]}), "label", CLASSES), path)
    source = open_source(str(path))
    assert source.classes == ["bird", "dog"]
    assert "leave out 1 ('cat')" in source.findings[0].text
    assert source.rejected[0].reason == "label 7: the class names end at 2"


# Hugging Face on disk, written by hand as `save_to_disk` of datasets 3.6 writes it.


def saved(folder, images, labels, batch=4, files=2, class_names=CLASSES):
    folder.mkdir(parents=True)
    table = pa.table(
        {"image": pa.array(image_rows(images), STRUCT), "label": pa.array(labels, pa.int64())}
    )
    table = noted(table, "label", class_names)
    entries = [f"data-{k:05d}-of-{files:05d}.arrow" for k in range(files)]
    bounds = np.linspace(0, len(images), files + 1).astype(int)
    for k, name in enumerate(entries):
        part = table.slice(bounds[k], bounds[k + 1] - bounds[k])
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(part, max_chunksize=batch)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    state = {"_data_files": [{"filename": name} for name in entries], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_hugging_face(tmp_path):
    images = pictures(21)
    labels = [i % 3 for i in range(21)]
    folder = saved(tmp_path / "pets", images, labels)
    source = open_source(str(folder))
    assert source.description == {
        "kind": "huggingface",
        "uri": str(folder),
        "image_column": "image",
        "label_column": "label",
    }
    assert source.run_length == 4
    assert source.refs(np.array([20])) == ["data-00001-of-00002.arrow row 10"]
    check(source, images, names(21))


def test_hugging_face_splits(tmp_path):
    images = pictures(12)
    saved(tmp_path / "train", images[:9], [0, 1, 2] * 3)
    saved(tmp_path / "validation", images[9:], [0, 1, 2])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    check(open_source(str(tmp_path)), images[:9], names(9))
    check(open_source(str(tmp_path), SourceOptions(split="val")), images[9:], names(3))
    everything = open_source(str(tmp_path), SourceOptions(split="all"))
    assert everything.held_out.tolist() == [False] * 9 + [True] * 3
    fails(tmp_path, "no split 'test': give --split train or val", split="test")


def test_hugging_face_with_damage(tmp_path):
    folder = saved(tmp_path / "pets", pictures(12), [i % 3 for i in range(12)])
    _, second = sorted(folder.glob("*.arrow"))
    whole = second.read_bytes()
    for part in (0.3, 0.7, 0.99):
        second.write_bytes(whole[: int(len(whole) * part)])
        fails(folder, "data-00001-of-00002.arrow is a truncated or damaged Arrow stream")
    second.write_bytes(whole[:-8])
    fails(folder, "its end marker is missing")
    second.unlink()
    fails(folder, "is incomplete: data-00001-of-00002.arrow is missing")
    (folder / "state.json").write_text("{")
    fails(folder, "state.json is damaged")


# CIFAR.


def cifar_batch(images, labels, key="labels", protocol=4):
    data = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return pickle.dumps({b"data": data, key: labels, b"filenames": []}, protocol)


def cifar10(folder, images, labels, keys=str):
    folder.mkdir(parents=True)
    for k in range(2):
        some = slice(k * 6, k * 6 + 6)
        batch = cifar_batch(images[some], labels[some], keys("labels"), protocol=5)
        (folder / f"data_batch_{k + 1}").write_bytes(batch)
    test = cifar_batch(images[12:], labels[12:], keys("labels"))
    (folder / "test_batch").write_bytes(test)
    meta = {keys("label_names"): [keys(name) for name in CLASSES]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    return folder


@pytest.fixture
def tiny_images():
    return np.random.default_rng(0).integers(0, 256, (15, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("keys", [str, str.encode], ids=["text", "bytes"])
@pytest.mark.parametrize("form", ["folder", "above", "archive"])
def test_cifar_10(tmp_path, tiny_images, form, keys):
    labels = [i % 3 for i in range(15)]
    folder = cifar10(tmp_path / "x" / "cifar-10-batches-py", tiny_images, labels, keys)
    path = {"folder": folder, "above": folder.parent}.get(form)
    path = path or tarred(tmp_path / "cifar-10-python.tar.gz", folder.parent, "w:gz")
    source = open_source(str(path))
    assert source.classes == CLASSES
    check(source, tiny_images[:12], names(12))
    assert source.refs(np.array([7])) == ["data_batch_2 1"]
    check(open_source(str(path), SourceOptions(split="test")), tiny_images[12:], names(3))
    assert open_source(str(path), SourceOptions(split="all")).held_out.sum() == 3


def test_cifar_100(tmp_path, tiny_images):
    data = tiny_images.transpose(0, 3, 1, 2).reshape(15, -1)
    content = {"data": data, "fine_labels": [i % 3 for i in range(15)], "coarse_labels": [0] * 15}
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    meta = {"fine_label_names": CLASSES, "coarse_label_names": ["animal"]}
    (tmp_path / "meta").write_bytes(pickle.dumps(meta))
    check(open_source(str(tmp_path)), tiny_images, names(15))
    coarse = open_source(str(tmp_path), SourceOptions(label_column="coarse_labels"))
    assert coarse.classes == ["animal"]


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_cifar_with_damage(tmp_path, tiny_images):
    labels = [i % 3 for i in range(15)]
    folder = cifar10(tmp_path / "c", tiny_images, labels)
    whole = (folder / "data_batch_2").read_bytes()
    cut(folder / "data_batch_2")
    fails(folder, "data_batch_2 is truncated or damaged")
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": Evil(), "labels": labels}))
    fails(folder, "it calls posix.system, which no CIFAR file does")
    (folder / "data_batch_2").write_bytes(cifar_batch(tiny_images, labels[:4]))
    fails(folder, "data_batch_2: 15 images, but 4 labels")
    (folder / "data_batch_3").write_bytes(whole)
    (folder / "data_batch_2").unlink()
    fails(folder, "is incomplete: data_batch_2 is missing")


# IDX.


def idx(array):
    kinds = {"uint8": 8, "int8": 9, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
    head = bytes([0, 0, kinds[array.dtype.name], array.ndim])
    big = array.astype(array.dtype.newbyteorder(">")).tobytes()
    return head + struct.pack(f">{array.ndim}I", *array.shape) + big


def idx_pair(folder, images, labels, prefix="train", pack=None):
    suffix = {None: "", gzip: ".gz", bz2: ".bz2", lzma: ".xz"}[pack]
    paths = []
    for role, array in (("images", images), ("labels", labels)):
        path = folder / f"{prefix}-{role}-idx{array.ndim}-ubyte{suffix}"
        path.write_bytes(pack.compress(idx(array)) if pack else idx(array))
        paths.append(path)
    return paths


@pytest.mark.parametrize("pack", [None, gzip, bz2, lzma])
@pytest.mark.parametrize("channels", [1, 3])
def test_idx(tmp_path, pack, channels):
    images, labels = pictures(14, channels), np.arange(14, dtype=np.uint8) % 3
    pair = idx_pair(tmp_path, images[:10], labels[:10], pack=pack)
    idx_pair(tmp_path, images[10:], labels[10:], "t10k", pack)
    words = [str(label) for label in labels]
    check(open_source(str(tmp_path)), images[:10], words[:10])
    for path in pair:
        check(open_source(str(path)), images[:10], words[:10])
    check(open_source(str(tmp_path), SourceOptions(split="test")), images[10:], words[10:])
    assert open_source(str(tmp_path), SourceOptions(split="all")).held_out.sum() == 4


def test_what_torchvision_leaves(tmp_path, tiny_images):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = pictures(6, 1), np.arange(6, dtype=np.uint8) % 3
    for path in [*idx_pair(raw, images, labels), *idx_pair(raw, images, labels, "t10k")]:
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    check(open_source(str(tmp_path)), images, [str(label) for label in labels])
    labels = [i % 3 for i in range(15)]
    folder = cifar10(tmp_path / "x" / "cifar-10-batches-py", tiny_images, labels)
    tarred(folder.parent / "cifar-10-python.tar.gz", folder.parent, "w:gz")
    check(open_source(str(folder.parent)), tiny_images[:12], names(12))


def test_idx_of_emnist(tmp_path):
    images = pictures(6, 1)
    labels = np.arange(6, dtype=np.int32) % 3 + 1
    for name in ("emnist-letters-train", "emnist-digits-train"):
        pair = idx_pair(tmp_path, images, labels, name, gzip)
    check(open_source(str(pair[0])), images, [str(label) for label in labels])
    assert open_source(str(pair[0])).findings == []
    fails(tmp_path, "holds several sets: give the path of one of emnist-digits-train-images")


def test_idx_with_damage(tmp_path):
    images, labels = idx_pair(tmp_path, pictures(10, 1), np.zeros(10, np.uint8))
    whole = images.read_bytes()
    images.write_bytes(whole[:-5])
    fails(tmp_path, r"is truncated: 10x6x6 values take 376 bytes, it has 371")
    images.write_bytes(whole[:6])
    fails(tmp_path, "truncated")
    images.write_bytes(whole + b"?")
    fails(tmp_path, "is damaged: 10x6x6")
    images.write_bytes(b"\1" + whole[1:])
    fails(tmp_path, "does not begin as IDX files do")
    images.write_bytes(whole)
    labels.write_bytes(idx(np.zeros(9, np.uint8)))
    fails(tmp_path, "10 images, but 9 labels")
    labels.unlink()
    fails(tmp_path, "the labels train-labels-idx3-ubyte are missing")
    pair = idx_pair(tmp_path, pictures(10, 1), np.zeros(10, np.uint8), pack=gzip)
    images.unlink()
    (tmp_path / "train-labels-idx1-ubyte").unlink(missing_ok=True)
    cut(pair[0])
    fails(tmp_path, "truncated or damaged IDX file")


# NumPy, MedMNIST above all.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_medmnist(tmp_path, save, channels, cache):
    images, labels = pictures(12, channels), np.arange(12)[:, None] % 3
    parts = {"train": slice(0, 6), "val": slice(6, 9), "test": slice(9, 12)}
    arrays = {f"{split}_images": images[part] for split, part in parts.items()}
    arrays |= {f"{split}_labels": labels[part] for split, part in parts.items()}
    path = tmp_path / "pathmnist.npz"
    save(path, **arrays)
    words = [str(label) for label in labels[:, 0]]
    for split, part in parts.items():
        check(open_source(str(path), SourceOptions(split=split)), images[part], words[part])
    everything = open_source(str(path), SourceOptions(split="all"))
    check(everything, images, words)
    assert everything.held_out.tolist() == [False] * 9 + [True] * 3
    assert everything.refs(np.array([11])) == ["pathmnist.npz test_images 2"]
    assert len([p for p in cache.iterdir() if not p.suffix]) == 6  # Each array unpacked once.


@pytest.mark.parametrize(
    "arrays,options",
    [
        (lambda x, y: {"images": x, "labels": y}, {}),
        (lambda x, y: {"x": x, "y": y}, {}),
        (lambda x, y: {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2]}, {}),
        (lambda x, y: {"a": x, "b": y}, {"image_column": "a", "label_column": "b"}),
        (lambda x, y: {"images": x.transpose(0, 3, 1, 2), "labels": y.astype(np.float32)}, {}),
    ],
)
def test_numpy_archives(tmp_path, arrays, options):
    images, labels = pictures(9), np.arange(9) % 3
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays(images, labels))
    source = open_source(str(path), SourceOptions(**options))
    check(source, images, [str(label) for label in labels])


@pytest.mark.parametrize(
    "images,labels,said",
    [
        (np.zeros((4, 5, 6), np.uint8), np.eye(4), "labels' has shape .4, 4.: several labels an"),
        (np.zeros((4, 8, 8, 8), np.uint8), np.zeros(4), "shape .4, 8, 8, 8.: expected.*volumes"),
        (np.zeros((4, 5, 6), np.uint8), np.zeros(3), "4 images, but 3 labels"),
        (np.array([{}] * 4), np.zeros(4), "cannot be read .*save it as numbers only"),
    ],
    ids=["many-labels", "volumes", "mismatch", "objects"],
)
def test_numpy_archives_that_cannot_be_used(tmp_path, images, labels, said):
    path = tmp_path / "a.npz"
    np.savez(path, train_images=images, train_labels=labels)
    fails(path, said)


def test_numpy_archives_with_damage(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, train_images=pictures(100), train_labels=np.arange(100) % 3)
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    path.write_bytes(broken)
    fails(path, "'train_images' or 'train_labels' cannot be read.*Bad CRC")
    cut(path)
    fails(path, "is truncated or no NumPy archive")
    np.savez(path, weights=np.zeros(3))
    fails(path, "holds arrays weights: expected train_images")


# HDF5.


@pytest.mark.parametrize("form", [{"chunks": (5, 3, SIDE, SIDE)}, {"compression": "lzf"}, {}])
def test_hdf5(tmp_path, form):
    images, labels = pictures(13), np.arange(13) % 3
    path = tmp_path / "ilsvrc.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("imgs", data=images.transpose(0, 3, 1, 2), **form)
        file.create_dataset("labels", data=labels)
    source = open_source(str(path))
    check(source, images, [str(label) for label in labels])
    assert source.run_length == (5 if "chunks" in form else source.run_length)
    cut(path, 0.7)
    fails(path, "truncated or damaged HDF5 file")


def test_hdf5_with_other_names_and_damage(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["pictures"], file["kinds"] = pictures(4), np.array(names(4), "S")
    fails(path, "holds arrays kinds, pictures: expected imgs; give --image-column")
    options = SourceOptions(image_column="pictures", label_column="kinds")
    check(open_source(str(path), options), pictures(4), names(4))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["imgs"], file["labels"] = pictures(4), np.arange(3)
    fails(tmp_path / "b.h5", "4 images, but 3 labels")


def test_a_library_that_is_not_installed(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["imgs"], file["labels"] = pictures(4), np.arange(4)
    monkeypatch.setitem(sys.modules, "h5py", None)
    fails(path, r"not installed: pip install 'biggan-platform\[hdf5\]'")
    dicom(tmp_path / "scans" / "a" / "0.dcm", CT)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    fails(tmp_path / "scans", r"not installed: pip install 'biggan-platform\[medical\]'")


# DICOM.


def dicom(path, pixels, **tags):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    bits = 8 * pixels.dtype.itemsize
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    data.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.Rows, data.Columns = pixels.shape[:2]
    data.PixelData = tags.pop("data", pixels.tobytes())
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.save_as(path, enforce_file_format=True)


JPEG_LS = "1.2.840.10008.1.2.4.80"
CT = np.array([[-1024, 0], [40, 3071]], np.int16)


@pytest.mark.parametrize(
    "pixels,tags,window,expected",
    [
        # Level 40, width 401: from -160.5 + 0.5 to 239.5 + 0.5 by the standard's formula.
        (CT, {"WindowCenter": 40, "WindowWidth": 401}, None, [[0, 102], [128, 255]]),
        (CT, {"WindowCenter": [40, 5], "WindowWidth": [401, 9]}, None, [[0, 102], [128, 255]]),
        (CT, {"WindowCenter": 40, "WindowWidth": 401}, (0, 2), [[0, 255], [255, 255]]),
        (CT, {"RescaleSlope": 2, "RescaleIntercept": -40}, (40, 401), [[0, 77], [128, 255]]),
        (CT, {}, None, [[0, 64], [66, 255]]),
        (CT, {"PhotometricInterpretation": "MONOCHROME1"}, None, [[255, 191], [189, 0]]),
        (np.array([[7, 9], [90, 200]], np.uint8), {}, None, [[7, 9], [90, 200]]),
        (
            np.array([[0, 9], [2, 4]], np.uint16),
            {"PixelPaddingValue": 9},
            None,
            [[0, 255], [128, 255]],
        ),
    ],
)
def test_the_window_of_dicom(tmp_path, pixels, tags, window, expected):
    for label in ("a", "b"):
        dicom(tmp_path / label / "0.dcm", pixels, **tags)
    source = open_source(str(tmp_path), SourceOptions(window=window))
    assert source.description["kind"] == "dicom"
    assert shown(source)[0][0].tolist() == expected


def test_dicom_with_a_table(tmp_path):
    images = pictures(6, 1)
    for i, image in enumerate(images):
        dicom(tmp_path / "scans" / f"patient{i}", image)
    rows = [f"patient{i},{CLASSES[i % 3]}" for i in range(5)]
    (tmp_path / "scans" / "labels.csv").write_text("\n".join(["patientId,diagnosis", *rows]))
    source = open_source(str(tmp_path / "scans"), SourceOptions(image_column="patientId"))
    check(source, images[:5], names(5))
    assert [(r.path, r.reason) for r in source.rejected] == [
        ("patient5", "not in the table labels.csv")
    ]
    shutil.move(tmp_path / "scans" / "labels.csv", tmp_path / "elsewhere.csv")
    fails(tmp_path / "scans", "has no classes.*or give a table of paths and labels by --labels")
    options = SourceOptions(labels=str(tmp_path / "elsewhere.csv"), image_column="patientId")
    check(open_source(str(tmp_path / "scans"), options), images[:5], names(5))


def test_dicom_of_other_kinds(tmp_path):
    colours = pictures(1)[0]
    dicom(tmp_path / "a" / "0.dcm", colours)
    dicom(tmp_path / "a" / "1.dcm", pictures(1, 1)[0])
    cut(tmp_path / "a" / "1.dcm", 0.98)
    dicom(tmp_path / "a" / "2.dcm", np.zeros((4, 2), np.uint8), NumberOfFrames=2, Rows=2)
    dicom(tmp_path / "a" / "3.dcm", pictures(1, 1)[0], syntax=JPEG_LS, data=encapsulate([b"?"]))
    (tmp_path / "a" / "4.dcm").write_bytes(b"not DICOM")
    source = open_source(str(tmp_path))
    assert np.array_equal(next(iter(source.read(np.array([0])))).load(), colours)
    said = errors(source)
    assert set(said) == {1, 2, 3, 4}
    assert "2 frames: save each as a file of its own" in said[2]
    assert "pylibjpeg" in said[3]


# Tables of paths and labels.


@pytest.mark.parametrize(
    "name,header,delimiter",
    [
        ("labels.csv", "path,label", ","),
        ("labels.csv", "\ufeffid;file;class", ";"),
        ("labels.tsv", "filename\ttarget", "\t"),
        ("labels.csv", "", ","),
        ("labels.csv.gz", "image,y", ","),
        ("labels.parquet", "path,label", ","),
    ],
)
def test_tables(tmp_path, name, header, delimiter):
    images, labels = pictures(9), names(9)
    class_folders(tmp_path / "images", images, labels)
    paths = [f"images/{label}/{i}.png" for i, label in enumerate(labels)]
    paths[1] = str(tmp_path / paths[1])
    paths[2] = f"file://{tmp_path}/{paths[2]}"
    paths[4] = f"./{paths[4]}"
    rows = [[*(["x"] if "id" in header else []), p, w] for p, w in zip(paths, labels, strict=True)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"path": paths, "label": labels}), path)
    else:
        text = "\n".join([*([header] if header else []), *map(delimiter.join, rows)])
        path.write_bytes(gzip.compress(text.encode()) if "gz" in name else text.encode())
    options = SourceOptions(label_column="class") if "id" in header else SourceOptions()
    source = open_source(str(path), options)
    assert source.findings == []
    assert source.rejected == []
    check(source, images, labels)


def table(path, rows, header="path,label"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_a_table_with_bad_rows(tmp_path):
    class_folders(tmp_path, pictures(4), ["x"] * 4)
    path = table(
        tmp_path / "t.csv",
        [("x/0.png", 0), ("x/1.png", 1), ("x/9.png", 1), ("x/2.png", ""), ("x/2.png", 1, 1)],
    )
    source = open_source(str(path))
    assert source.classes == ["0", "1"]
    assert {r.path: r.reason for r in source.rejected} == {
        "t.csv line 6": "3 columns; the header has 2 columns",
        "t.csv row 4": "no label",
        "t.csv row 3": "no file 'x/9.png', or several",
        "x/3.png": "not in the table t.csv",
    }
    assert source.unreadable == 3
    table(path, [("9.png", 0)])
    fails(path, "none of its 1 rows names a file that is there; the first: '9.png', looked for in")
    path.write_bytes(b"path,label\n\xff\xfe,0\n")
    fails(path, "no table of UTF-8 text")
    table(path, [("x/0.png", 0, 1)], "path,a,b")
    fails(path, "which column is the label. Give --label-column one of path, a, b")


def test_labels_that_do_not_match_folders(tmp_path):
    labels = names(30)
    class_folders(tmp_path, pictures(30), labels)
    rows = [(f"{label}/{i}.png", label) for i, label in enumerate(labels)]
    assert open_source(str(table(tmp_path / "t.csv", rows))).findings == []
    rows[7] = (rows[7][0], "dog")
    (finding,) = open_source(str(table(tmp_path / "t.csv", rows))).findings
    assert finding.check == "labels"
    assert "1 of 30 labels do not match the folder" in finding.text
    assert "row 8: label 'dog', folder 'cat'" in finding.text
    numbers = [(path, CLASSES.index(label)) for path, label in rows]  # The same, by number.
    (finding,) = open_source(str(table(tmp_path / "t.csv", numbers))).findings
    assert "row 8: label '2', folder 'cat' (others: '1')" in finding.text
    options = SourceOptions(labels=str(table(tmp_path.parent / "outside.csv", rows)))
    (finding,) = open_source(str(tmp_path), options).findings
    assert finding.check == "labels"


def test_a_table_found_among_folders(tmp_path):
    labels = names(30)
    class_folders(tmp_path, pictures(30), labels)
    rows = [(f"{label}/{i}.png", label) for i, label in enumerate(labels)]
    rows[7] = (rows[7][0], "dog")
    path = table(tmp_path / "labels.csv", rows)
    source = open_source(str(tmp_path))
    assert "1 of 30 labels do not match" in source.findings[0].text
    assert source.description["labels"] == str(path)
    assert open_source(str(tmp_path), SourceOptions(kind="folders")).findings == []
    for header in ("path,width", "size,weight"):  # It says nothing of classes.
        table(path, [(f"{label}/{i}.png", i) for i, label in enumerate(labels)], header)
        source = open_source(str(tmp_path))
        assert source.classes == CLASSES
        assert [r.path for r in source.rejected] == ["labels.csv"]


def test_folders_that_are_no_classes_say_nothing(tmp_path):
    class_folders(tmp_path, pictures(30), [f"patient{i % 3}" for i in range(30)])
    rows = [(f"patient{i % 3}/{i}.png", CLASSES[i // 10]) for i in range(30)]
    assert open_source(str(table(tmp_path / "t.csv", rows))).findings == []


def test_how_a_table_beside_a_folder_names_its_files(tmp_path):
    images = pictures(5)
    folder = class_folders(tmp_path / "photos", images, ["x", "x", "y", "y", "y"])
    shutil.copy(folder / "x" / "1.png", folder / "y" / "1.png")
    rows = [
        ("x/0.png", "a"),  # From the folder,
        ("photos/x/1", "a"),  # from further above and without its suffix,
        ("2.png", "b"),  # by name,
        ("3", "b"),  # without its suffix.
        ("1.png", "b"),  # There are two of these,
        ("x/4.png", "b"),  # and this one lies in another folder.
    ]
    options = SourceOptions(labels=str(table(tmp_path / "t.csv", rows)))
    source = open_source(str(folder), options)
    check(source, images[:4], ["a", "a", "b", "b"])
    assert [r.path for r in source.rejected[:2]] == ["t.csv row 5", "t.csv row 6"]
    assert source.rejected[2].path == "2 files, such as y/1.png"


def test_a_file_with_two_labels(tmp_path):
    class_folders(tmp_path, pictures(3), ["x"] * 3)
    rows = [("x/0.png", "a"), ("x/1.png", "b"), ("x/2.png", "b"), ("x/1.png", "b")]
    assert open_source(str(table(tmp_path / "t.csv", rows))).findings == []
    rows.append(("x/0.png", "b"))
    source = open_source(str(table(tmp_path / "t.csv", rows)))
    assert len(source) == 3
    assert "x/0.png: 'a' in row 1, 'b' in row 5" in source.findings[0].text


def test_a_table_with_splits(tmp_path):
    images = pictures(6)
    class_folders(tmp_path, images, ["x"] * 6)
    rows = [(f"x/{i}.png", names(6)[i], "train" if i < 4 else "test") for i in range(6)]
    path = table(tmp_path / "t.csv", rows, "path,label,split")
    check(open_source(str(path)), images[:4], names(4))
    assert (
        open_source(str(path), SourceOptions(split="all")).held_out.tolist()
        == [False] * 4 + [True] * 2
    )


# Prepared datasets, and what holds for all.


def prepared(root, images, labels, channels=3):
    root.mkdir()
    rows = {
        "image": [encode(image.reshape(SIDE, SIDE, channels)) for image in images],
        "label": pa.array(labels, pa.int32()),
        "source": [str(i) for i in range(len(images))],
    }
    table_ = pa.table(rows)
    pq.write_table(table_.slice(0, 7), root / "part-000000.parquet")
    pq.write_table(table_.slice(7), root / "part-000001.parquet")
    info = DatasetInfo(
        classes=CLASSES,
        resolution=SIDE,
        channels=channels,
        counts=np.bincount(labels, minlength=3).tolist(),
        fingerprint="",
        source={},
        rejected=[],
    )
    (root / "dataset.json").write_text(info.model_dump_json())
    return root


@pytest.mark.parametrize("channels", [1, 3])
def test_a_prepared_dataset(tmp_path, channels):
    images = pictures(12, channels)
    root = prepared(tmp_path / "pets", images, [i % 3 for i in range(12)], channels)
    check(open_source(str(root)), images, names(12))
    options = SourceOptions(classes=("dog",))
    source = open_source(str(root), options)
    check(source, images[2::3], ["dog"] * 4)
    assert source.description["classes"] == ["dog"]
    (root / "part-000001.parquet").unlink()
    fails(root, "promises 12 images .train., its parts hold 7")
    (root / "part-000000.parquet").unlink()
    fails(root, "has a dataset.json, but no images: copy it again", kind="prepared")


@pytest.mark.parametrize(
    "options,said",
    [
        ({"kind": "zip"}, "truncated or no ZIP archive"),
        ({"kind": "rar"}, "--kind rar: must be one of auto, folders"),
        ({"split": "test"}, "does not come in splits: leave out --split test"),
        ({"labels": "x.csv"}, "--labels x.csv says nothing about a source of kind parquet"),
        ({"window": (40.0, 0.0)}, "--window 40 0: the width must be more than 0"),
        ({"classes": ("0", "0")}, "each class once"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, said):
    path = tmp_path / "a.parquet"
    images = pa.array([png(image) for image in pictures(2)])
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), path)
    fails(path, said, **options)


def test_files_that_are_no_source(tmp_path):
    (tmp_path / "a.png").write_bytes(png(pictures(1)[0]))
    fails(tmp_path / "a.png", "is a file: expected a folder.*this is one image")
    (tmp_path / "a.bin").write_bytes(b"\x12" * 1000)
    fails(tmp_path / "a.bin", "this is none of them")
    (tmp_path / "a.zip").write_bytes(b"\x12" * 1000)
    fails(tmp_path / "a.zip", "truncated or no ZIP")
    fails(tmp_path / "none", "does not exist")


def everything(root, images, labels):
    """The same images and labels (0, 1, 2) in each form that can hold them."""
    numbers = [int(label) for label in labels]
    folder = class_folders(root / "folder", images, labels)
    yield folder
    yield zipped(root / "a.zip", folder)
    yield tarred(root / "a.tar", folder)
    yield tarred(root / "a.tar.gz", folder, "w:gz")
    shards(root / "shards", images, labels)
    yield root / "shards"
    rows = pa.array(image_rows(images), STRUCT)
    pq.write_table(pa.table({"image": rows, "label": numbers}), root / "a.parquet")
    yield root / "a.parquet"
    yield saved(root / "saved", images, numbers, class_names=["0", "1", "2"])
    (root / "idx").mkdir()
    idx_pair(root / "idx", images, np.array(numbers, np.uint8))
    yield root / "idx"
    np.savez_compressed(root / "a.npz", train_images=images, train_labels=numbers)
    yield root / "a.npz"
    with h5py.File(root / "a.h5", "w") as file:
        file["imgs"], file["labels"] = images.transpose(0, 3, 1, 2), numbers
    yield root / "a.h5"
    rows = [(f"folder/{label}/{i}.png", label) for i, label in enumerate(labels)]
    yield table(root / "a.csv", rows)


@pytest.mark.parametrize("remote", [False, True])
def test_one_set_in_every_form_at_any_uri(tmp_path, monkeypatch, remote):
    images, labels = pictures(9), ["0", "1", "2"] * 3
    paths = list(everything(tmp_path, images, labels))
    assert len(paths) == 11
    if remote:  # A local filesystem, treated as any other.
        monkeypatch.setattr(Folder, "is_local", property(lambda folder: False))
    for path in paths:
        source = open_source(f"file://{path}")
        assert source.classes == ["0", "1", "2"], path
        check(source, images, labels)
        assert len(pickle.dumps(source)) < 6000 + 150 * len(images)


def test_real_dicom():
    content = Path(pydicom.data.get_testdata_file("CT_small.dcm")).read_bytes()
    header = pydicom.dcmread(io.BytesIO(content))
    values = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
    level, width = 40, 400
    expected = ((values - (level - 0.5)) / (width - 1) + 0.5).clip(0, 1) * 255
    assert np.abs(decode_image(content, (level, width)) - expected).max() <= 0.5


def test_the_digits_by_class():
    source = open_source("digits", SourceOptions(classes=("3", "7")))
    assert source.description == {"kind": "digits", "classes": ["3", "7"]}
    assert np.bincount(source.labels).tolist() == [183, 179]
