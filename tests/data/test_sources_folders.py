"""Class folders as they are found on disks."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from biggan.data.sources import SourceError, open_source
from biggan.data.sources.folders import ClassFolders
from biggan.data.sources.source import natural
from biggan.storage import Folder


def draw(path, seed, size=(20, 14)):
    """Save a random picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def refs(source):
    return source.refs(np.arange(len(source)))


@pytest.mark.parametrize(
    "make,said",
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "has no classes: expected one sub-folder a class"),
        (lambda root: draw(root / "a.png", 0), "has no classes.*1 files"),
    ],
    ids=["missing", "empty", "flat"],
)
def test_sources_without_classes(tmp_path, make, said):
    root = tmp_path / "source"
    make(root)
    with pytest.raises(SourceError, match=said):
        open_source(str(root))


def test_oddities_of_a_folder_are_listed(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    draw(root / "a" / "deep" / "0.png", 0)
    draw(elsewhere / "1.png", 1)
    (root / "b").symlink_to(elsewhere)  # A class may be a link.
    (root / "a" / "around").symlink_to(root / "a")
    (root / "a" / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "a" / "pipe.png")
    shutil.copy(root / "a" / "deep" / "0.png", os.fsencode(root / "a") + b"/caf\xe9.png")
    source = open_source(str(root))
    assert refs(source) == ["a/deep/0.png", "b/1.png"]
    assert {r.path: r.reason.split(":")[0].split(",")[0] for r in source.rejected} == {
        "a/around": "a link to a folder that it lies in",
        "a/gone.png": "not a file",
        "a/pipe.png": "not a file",
        "a/caf\\xe9.png": "its name is not valid UTF-8",
    }
    assert source.unreadable == 4


def test_links_to_and_fro_are_followed_once(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        draw(tmp_path / name / f"{name}.png", 0)
        (tmp_path / name / "also").symlink_to(tmp_path / other)
    source = open_source(str(tmp_path))
    assert refs(source) == ["a/a.png", "a/also/b.png", "b/also/a.png", "b/b.png"]


def test_a_file_is_no_source(tmp_path):
    draw(tmp_path / "a.png", 0)
    with pytest.raises(SourceError, match="is a file: expected a folder"):
        open_source(str(tmp_path / "a.png"))


def test_classes_are_in_natural_order(tmp_path):
    names = ["1", "01", "2", "9", "10", "b1", "b2", "b10", "\uff11"]
    for name in reversed(names):
        draw(tmp_path / name / "a.png", 0)
    found = ClassFolders(Folder(str(tmp_path))).classes
    assert found == ["01", "1", "2", "9", "10", "b1", "b2", "b10", "\uff11"]
    assert natural("x10y") == (["x", 10, "y"], "x10y")


def test_files_outside_classes_are_listed(tmp_path):
    draw(tmp_path / "a" / "0.png", 0)
    draw(tmp_path / "stray.png", 0)
    rejected = ClassFolders(Folder(str(tmp_path))).rejected
    assert [(r.path, r.reason) for r in rejected] == [
        ("stray.png", "lies outside any class folder")
    ]
