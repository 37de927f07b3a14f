"""A prepared dataset: its description, its images, and which of its classes a run trains on.

`datasets/NAME/` holds `dataset.json` (a `DatasetInfo`), `part-*.parquet` with columns `image`
(bytes), `label` (int32) and `source` (string), perhaps `held_out-*.parquet` of the same form, and
`reference/` with the statistics that FID compares against. `biggan.data.preparation` writes it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from biggan.config import ConfigError, RunConfig
from biggan.data import decoded
from biggan.data.parts import Split, StoredImages, part_sizes, read_labels
from biggan.latents import ClassSampler
from biggan.storage import Folder, StorageError, locate

DESCRIPTION = "dataset.json"

Progress = Callable[[str], None]
"""Receives a line of progress for people."""


class Rejected(BaseModel):
    """A file, class or folder that was left out, and why."""

    model_config = ConfigDict(frozen=True)

    path: str
    reason: str


class DatasetInfo(BaseModel):
    """What `dataset.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: list[str]
    """Class names; a class id is an index into them."""
    resolution: int
    channels: int
    counts: list[int]
    """Images of each class."""
    fingerprint: str
    """SHA-256 over classes, shape and every image's pixels and label, in no particular order."""
    held_out: list[int] = []
    """Images of each class set aside for reference statistics, in `held_out-*.parquet`; empty if
    none are."""
    held_out_fingerprint: str = ""
    """The fingerprint of those alone; `fingerprint` is of the images to train on."""
    duplicates: int = 0
    """Images whose pixels equal those of another, beyond the first of each."""
    duplicates_dropped: bool = False
    """Whether those were left out."""
    duplicates_conflicting: int = 0
    """How many of them had another label than the first."""
    sizes: dict[str, list[int]] = {}
    """`width` and `height` of the images as they came: smallest, median, largest."""
    source: dict[str, Any]
    """Where the images came from and how they were brought to size."""
    rejected: list[Rejected]
    """What was left out; of very many, the first."""
    reasons: dict[str, int] = {}
    """How many files were rejected for each reason, numbers within it read as N."""

    @property
    def n_images(self) -> int:
        """Images in all classes."""
        return sum(self.counts)

    @property
    def shape(self) -> dict[str, int]:
        """What networks for this dataset are built with."""
        return {
            "resolution": self.resolution,
            "channels": self.channels,
            "n_classes": len(self.classes),
        }

    @property
    def is_subset(self) -> bool:
        """Whether this describes some classes of a dataset alone."""
        return "subset_of" in self.source

    def subset(self, names: Sequence[str]) -> Self:
        """The description of some classes alone, in the dataset's order; of all if none is named.

        Its fingerprint is made of the whole dataset's and the names. What was rejected, duplicates
        and sizes stay those of the whole. Raises `ConfigError` for a class that there is not.
        """
        for name in names:
            if name not in self.classes:
                raise ConfigError(
                    f"data.classes: the dataset has no class {name!r}{self._near(name)}"
                )
        ids = [k for k, name in enumerate(self.classes) if name in names]
        if not names or len(ids) == len(self.classes):
            return self
        kept = [self.classes[k] for k in ids]

        def derived(fingerprint: str) -> str:
            return hashlib.sha256(json.dumps([fingerprint, kept]).encode()).hexdigest()

        return self.model_copy(
            update={
                "classes": kept,
                "counts": [self.counts[k] for k in ids],
                "held_out": [self.held_out[k] for k in ids] if self.held_out else [],
                "fingerprint": derived(self.fingerprint),
                "held_out_fingerprint": self.held_out_fingerprint
                and derived(self.held_out_fingerprint),
                "source": self.source | {"classes": kept, "subset_of": self.fingerprint},
            }
        )

    def _near(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.classes, n=1)
        known = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        return f": did you mean {near[0]!r}?" if near else f"; it has {known}"

    @classmethod
    def read(cls, folder: Folder) -> Self:
        """Read a dataset's description; raises `StorageError` if there is no whole dataset."""
        if not folder.exists(DESCRIPTION):
            raise StorageError(
                f"no prepared dataset at {folder}: make one with"
                f" `python jobs/prepare.py --source ... --name {folder.name}`"
            )
        try:
            return cls.model_validate(folder.read_json(DESCRIPTION))
        except ValidationError as error:
            raise StorageError(f"{folder}/{DESCRIPTION} is damaged: {error}") from None


Mode = Literal["memory", "stream"]
"""memory: decoded once and mapped; stream: left in the parts, to be decoded in passing."""
Images = Tensor | StoredImages
"""uint8 `[N, C, H, W]`, in memory or in storage; indexed and split alike."""


class Dataset:
    """The images of a prepared dataset, or of some of its classes, with their labels."""

    def __init__(
        self,
        info: DatasetInfo,
        labels: Tensor,
        stored: StoredImages,
        *,
        class_ids: Sequence[int],
        split: Split,
        mode: Mode,
        key: str,
        progress: Progress | None,
    ) -> None:
        """`labels` are int64 `[N]`; `key` names what is decoded, of which `progress` is told."""
        self.info = info
        self.labels = labels
        self.stored = stored
        self.class_ids = list(class_ids)
        """What number each of its classes has in the whole dataset."""
        self.split = split
        self.mode = mode
        self.folder = stored.folder
        self.counts = info.counts if split == "train" else info.held_out
        """Images of each class in this part of the dataset."""
        self.class_sampler = ClassSampler(self.counts)
        self._key = key
        self._progress = progress

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the images in this part of the dataset."""
        held_out = self.split == "held_out"
        return self.info.held_out_fingerprint if held_out else self.info.fingerprint

    def of_split(self, split: Split) -> Dataset:
        """Another part of the same dataset, read in the same way."""
        classes, mode = self.info.classes, self.mode
        return Dataset.open(self.folder.uri, split=split, classes=classes, mode=mode)

    @cached_property
    def images(self) -> Images:
        """The images, decoded when first asked for."""
        if self.mode == "stream":
            return self.stored
        return decoded.load(self.stored, self._key, self._progress)

    @classmethod
    def open(
        cls,
        name: str,
        root: str | None = None,
        *,
        split: Split = "train",
        classes: Sequence[str] = (),
        mode: Literal["auto", "memory", "stream"] = "memory",
        progress: Progress | None = None,
    ) -> Self:
        """Read a dataset by name, path or URI, or some classes of it.

        With `auto`, images are decoded if they fit on this machine. Raises `StorageError` if there
        is no such dataset or it is damaged, `ConfigError` for a class that there is not.
        """
        folder = locate("datasets", name, root)
        whole = DatasetInfo.read(folder)
        info = whole.subset(classes)
        sizes = part_sizes(folder, split)
        by_part = read_labels(folder, list(sizes))
        _check_counts(folder, whole.counts if split == "train" else whole.held_out, by_part)
        class_ids = [whole.classes.index(kept) for kept in info.classes]
        renumbered = np.full(len(whole.classes), -1)
        renumbered[class_ids] = range(len(class_ids))
        rows = [np.flatnonzero(renumbered[part] >= 0) for part in by_part]
        labels = [renumbered[part[kept]] for part, kept in zip(by_part, rows, strict=True)]
        joined = np.concatenate([np.empty(0, np.int64), *labels])
        shape = (info.channels, info.resolution, info.resolution)
        stored = StoredImages(folder, list(sizes), rows, shape)
        if mode == "auto":
            mode = "memory" if decoded.fits(stored.nbytes) else "stream"
        return cls(
            info,
            torch.from_numpy(joined),
            stored,
            class_ids=class_ids,
            split=split,
            mode=mode,
            key=_key(whole, split, info.classes, sizes, joined),
            progress=progress,
        )


def _key(
    whole: DatasetInfo,
    split: Split,
    classes: Sequence[str],
    part_sizes: Mapping[str, int],
    labels: np.ndarray,
) -> str:
    """What stands for these images in this order; a fingerprint says nothing of their order."""
    labelled = hashlib.sha256(labels.tobytes()).hexdigest()
    contents = [whole.model_dump(), split, classes, list(part_sizes.items()), labelled]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _check_counts(folder: Folder, promised: Sequence[int], by_part: Sequence[np.ndarray]) -> None:
    """Raise `StorageError` unless the parts hold as many images of each class as are promised."""
    labels = np.concatenate([np.empty(0, np.int64), *by_part])
    if len(labels) != sum(promised):
        raise StorageError(
            f"dataset {folder} is damaged: {DESCRIPTION} promises {sum(promised)} images, its parts"
            f" hold {len(labels)}; prepare it again with --overwrite"
        )
    in_range = not len(labels) or (labels.min() >= 0 and labels.max() < len(promised))
    if not in_range or np.bincount(labels, minlength=len(promised)).tolist() != list(promised):
        raise StorageError(
            f"dataset {folder} is damaged: its parts hold other numbers of images of some class"
            f" than {DESCRIPTION} promises; prepare it again with --overwrite"
        )


def open_dataset(
    config: RunConfig,
    root: str | None = None,
    *,
    name: str = "",
    progress: Progress | None = None,
) -> Dataset:
    """The images that a run of that configuration trains on, read the way it says.

    `name` is where they lie, if not at `config.dataset`. Raises what `Dataset.open` does.
    """
    data = config.data
    return Dataset.open(
        name or config.dataset, root, classes=data.classes, mode=data.mode, progress=progress
    )


def read_info(config: RunConfig, root: str | None = None, *, name: str = "") -> DatasetInfo:
    """The description of the images that a run of that configuration trains on."""
    whole = DatasetInfo.read(locate("datasets", name or config.dataset, root))
    return whole.subset(config.data.classes)
