"""Parts that sources come in: training, validation and test, by the names of files and folders."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from biggan.data.sources.options import Split
from biggan.data.sources.source import SourceError

_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "t10k": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
}


def split_named(name: str) -> str:
    """The split that a name is: train, test or val; empty if it is none."""
    return _NAMES.get(name.lower(), "")


def split_of(path: str) -> str:
    """The split that a part of a path names, the last one first; empty if there is none."""
    for word in reversed(re.split(r"[^a-z0-9]+", path.lower())):
        if word in _NAMES:
            return _NAMES[word]
    return ""


def choose(
    splits: Sequence[str], wanted: Split, where: object, *, named: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Which of the things of these splits are wanted, and which of those are held out.

    Returns indices, and a bool for each (None if nothing is). What names no split is for training.
    If `named`, the user has named the very files, and they are taken where all are of one split.
    Raises `SourceError` if there is no such split.
    """
    found = sorted(set(splits) - {""})
    everything = np.arange(len(splits))
    if not found:
        if wanted in ("test", "val"):
            raise SourceError(f"{where} does not come in splits: leave out --split {wanted}")
        return everything, None
    if named and wanted == "train" and len(set(splits)) == 1:
        return everything, None
    of = np.array([split or "train" for split in splits])
    if wanted == "all":
        # Some sources keep the labels of their test split to themselves (ImageNet).
        aside = of == ("test" if "test" in found else "val")
        return everything, aside if aside.any() and not aside.all() else None
    if not (of == wanted).any():
        raise SourceError(f"{where} has no split {wanted!r}: give --split {' or '.join(found)}")
    return np.flatnonzero(of == wanted), None
