"""NumPy's `.npz`: MedMNIST, and images beside labels under other names.

Its arrays are compressed as streams, so they are unpacked into the cache, and mapped from there.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import IO

import numpy as np

from biggan.data.sources.arrays import ArraySource, Block
from biggan.data.sources.columns import present
from biggan.data.sources.files import File, cached, damage_told
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.source import SourceError
from biggan.data.sources.splits import choose

_PAIRS = (
    ("images", "labels"),
    ("image", "label"),
    ("imgs", "labels"),
    ("x", "y"),
    ("X", "y"),
    ("data", "labels"),
    ("data", "target"),
    ("images", "target"),
)
_SPLITS = {"train": "train", "val": "val", "test": "test", "": ""}


class NpzSource(ArraySource):
    """Arrays `train_images` and `train_labels` (MedMNIST), `x_train` and `y_train`, and others."""

    def __init__(self, file: File, options: SourceOptions) -> None:
        """Read the labels; raises `SourceError` on damage, or images or labels it cannot use."""
        names = _members(file)
        pairs = _pairs(file, names, options)
        where = f"--source {file}"
        chosen, held_out = choose([split for split, _, _ in pairs], options.split, where)
        blocks = [_block(file, *pairs[i]) for i in chosen.tolist()]
        split = options.split if any(split for split, _, _ in pairs) else None
        super().__init__("npz", file, blocks, split=split, held_out=held_out)


def _members(file: File) -> list[str]:
    with (
        damage_told(f"--source {file} is truncated or no NumPy archive"),
        file.stream() as stream,
        zipfile.ZipFile(stream) as archive,
    ):
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _pairs(file: File, names: Sequence[str], options: SourceOptions) -> list[tuple[str, str, str]]:
    """Split, images and labels: names of arrays that belong together."""
    where = f"--source {file}"
    if options.image_column or options.label_column:
        images = present(names, options.image_column or "images", "image", where)
        labels = present(names, options.label_column or "labels", "label", where)
        return [("", images, labels)]
    found: dict[str, tuple[str, str, str]] = {}
    for prefix, split in _SPLITS.items():
        for images, labels in _PAIRS:
            forms = [(f"{prefix}_{images}", f"{prefix}_{labels}")] if prefix else [(images, labels)]
            if prefix:
                forms.append((f"{images}_{prefix}", f"{labels}_{prefix}"))
            for left, right in forms:
                if left in names and right in names:
                    found.setdefault(split, (split, left, right))
    if not found:
        raise SourceError(
            f"{where} holds arrays {', '.join(names) or '(none)'}: expected train_images and"
            " train_labels (MedMNIST), or images and labels; name them with --image-column and"
            " --label-column"
        )
    return list(found.values())


def _block(file: File, split: str, images: str, labels: str) -> Block:
    what = f"--source {file}: {images!r} or {labels!r} cannot be read"
    with damage_told(what, "copy it again, or save it as numbers only"):
        shape = open_array(file, images).shape
        values = np.array(open_array(file, labels))
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise SourceError(
            f"--source {file}: {labels!r} has shape {values.shape}: several labels an image cannot"
            " say one class; make a source with one label an image"
        )
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    return Block(f"{file.name} {images}", partial(open_array, file, images), shape, values, split)


@lru_cache(maxsize=16)
def open_array(file: File, name: str) -> np.ndarray:
    """An array of a `.npz` file, mapped into memory."""
    copy = cached(file, f"array {name}", _unpack(file, name))
    array: np.ndarray = np.load(copy.folder.path, mmap_mode="r", allow_pickle=False)
    return array


def _unpack(file: File, name: str) -> Callable[[IO[bytes]], None]:
    def write(target: IO[bytes]) -> None:
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            member = name if name in archive.namelist() else f"{name}.npy"
            with archive.open(member) as content:
                shutil.copyfileobj(content, target, 1 << 20)

    return write
