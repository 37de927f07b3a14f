"""CIFAR-10 and CIFAR-100 in their "python version": a folder of pickles, or the archive of it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from typing import Any

import numpy as np

from biggan.data.sources.archives import tar_members
from biggan.data.sources.arrays import ArraySource, Block
from biggan.data.sources.files import File, unpacked
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.source import SourceError
from biggan.data.sources.splits import choose
from biggan.storage import Folder

_BATCH = re.compile(r"data_batch_([0-9]+)")
_LABELS = {"labels": "label_names", "fine_labels": "fine_label_names"}
_LABELS["coarse_labels"] = "coarse_label_names"
_ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("_codecs", "encode"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    *(
        (module, name)
        for module in ("builtins", "__builtin__")
        for name in ("bytearray", "list", "dict", "tuple", "set", "int", "float", "str", "bytes")
    ),
}
"""All that unpickling may call: arrays and containers, nothing that acts."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # Its name before NumPy 2.
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which no CIFAR file does")
        return super().find_class(module, name)


@dataclass(frozen=True)
class _Place:
    """A pickle: a file, or a part of an archive."""

    file: File
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        return unpacked(self.file).read(self.offset, self.size)


def is_cifar(names: Sequence[str]) -> bool:
    """Whether files of these names are a CIFAR set."""
    return any(map(_BATCH.fullmatch, names)) or {"train", "meta"} <= set(names)


class CifarSource(ArraySource):
    """Rows of 3,072 bytes, red, green and blue planes one after the other, and their labels."""

    def __init__(self, place: Folder, options: SourceOptions) -> None:
        """Read the labels; raises `SourceError` if a batch is missing or damaged."""
        found = _from_folder(place) if place.is_folder() else _from_archive(File.find(place))
        batches = _batches(place, found)
        splits = [split for split, _ in batches]
        chosen, held_out = choose(splits, options.split, f"--source {place}")
        loaded = [(batches[i][0], batches[i][1]) for i in chosen.tolist()]
        column = _label_column(loaded[0][1], options.label_column)
        blocks = [_block(split, batch, column) for split, batch in loaded]
        super().__init__(
            "cifar",
            place,
            blocks,
            split=options.split,
            held_out=held_out,
            names=_names(found, column),
            label_column=column,
        )


def _from_folder(folder: Folder) -> dict[str, _Place]:
    found = {}
    for name in folder.children():
        if _is_part(name):
            file = File.find(folder / name)
            found[name] = _Place(file, name, 0, file.size)
    return found


def _from_archive(file: File) -> dict[str, _Place]:
    found = {}
    for member in tar_members(file):
        name = member.name.rpartition("/")[2]
        if _is_part(name):
            found[name] = _Place(file, name, member.offset, member.size)
    return found


def _is_part(name: str) -> bool:
    return name in ("test_batch", "train", "test", "meta", "batches.meta") or bool(
        _BATCH.fullmatch(name)
    )


def _batches(place: Folder, found: dict[str, _Place]) -> list[tuple[str, _Place]]:
    """The split and place of each batch, in order."""
    numbers = sorted(int(m[1]) for m in map(_BATCH.fullmatch, found) if m)
    if numbers and numbers != list(range(1, len(numbers) + 1)):
        missing = sorted(set(range(1, numbers[-1])) - set(numbers))
        raise SourceError(
            f"--source {place} is incomplete: data_batch_{missing[0]} is missing; copy it again"
        )
    training = [found[f"data_batch_{number}"] for number in numbers]
    training += [found["train"]] if "train" in found else []
    test = [found[name] for name in ("test_batch", "test") if name in found]
    batches = [("train", batch) for batch in training] + [("test", batch) for batch in test]
    if not batches:
        raise SourceError(
            f"--source {place} holds no CIFAR batches: expected data_batch_1, ... or train, pickled"
        )
    return batches


def _block(split: str, place: _Place, column: str) -> Block:
    content = _load(place)
    name = f"--source {place.file}: {place.name}"
    data, labels = content.get("data"), content.get(column)
    if not isinstance(data, np.ndarray) or labels is None:
        raise SourceError(f"{name} holds {', '.join(content)}: expected data and {column}")
    if data.ndim != 2 or data.shape[1] != 3072 or data.dtype != np.uint8:
        raise SourceError(
            f"{name} has data of shape {data.shape}, {data.dtype}: expected [n, 3072] bytes"
        )
    opened: Callable[[], np.ndarray] = partial(_images, place)
    shape = (len(data), 3, 32, 32)
    return Block(place.name, opened, shape, np.asarray(labels), split)


def _label_column(place: _Place, wanted: str) -> str:
    content = _load(place)
    found = [name for name in _LABELS if name in content]
    if (wanted and wanted not in found) or not found:
        raise SourceError(
            f"--source {place.file}: {place.name} has no labels {wanted!r}: give --label-column one"
            f" of {', '.join(found)}"
        )
    return wanted or found[0]


def _names(found: dict[str, _Place], column: str) -> list[str]:
    for name in ("batches.meta", "meta"):
        if name in found:
            names = _load(found[name]).get(_LABELS[column], [])
            return [x.decode() if isinstance(x, bytes) else str(x) for x in names]
    return []


def _load(place: _Place) -> dict[str, Any]:
    """A pickle's dictionary, with its keys as text (Python 2 wrote bytes)."""
    try:
        content = _Unpickler(BytesIO(place.read()), encoding="bytes").load()
    except Exception as error:  # Unpickling raises anything at all.
        raise SourceError(
            f"--source {place.file}: {place.name} is truncated or damaged ({error}): copy it again"
        ) from None
    if not isinstance(content, dict):
        raise SourceError(f"--source {place.file}: {place.name} is no dictionary: not CIFAR")
    return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in content.items()}


@lru_cache(maxsize=2)
def _images(place: _Place) -> np.ndarray:
    images: np.ndarray = _load(place)["data"].reshape(-1, 3, 32, 32)
    return images
