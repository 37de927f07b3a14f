"""A prepared dataset: its description, its images in memory, and the order they are shown in.

`datasets/NAME/` holds `dataset.json` (a `DatasetInfo`), `part-*.parquet` with columns `image`
(bytes), `label` (int32) and `source` (string), perhaps `held_out-*.parquet` of the same form, and
`reference/` with the statistics that FID compares against. `biggan.data.preparation` writes it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Self

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from biggan.latents import ClassSampler, Stream, rng
from biggan.storage import Folder, StorageError, locate

DESCRIPTION = "dataset.json"
Split = Literal["train", "held_out"]
"""The images to train on, or those set aside for reference statistics."""


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


class Dataset:
    """A prepared dataset with its images decoded in memory."""

    def __init__(self, info: DatasetInfo, images: Tensor, labels: Tensor, folder: Folder) -> None:
        """`images` is uint8 `[N, C, H, W]`, `labels` int64 `[N]`."""
        self.info = info
        self.images = images
        self.labels = labels
        self.folder = folder
        self.class_sampler = ClassSampler(info.counts)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def open(cls, name: str, root: str | None = None, split: Split = "train") -> Self:
        """Read a dataset by name, path or URI; raises `StorageError` if it is absent or damaged."""
        folder = locate("datasets", name, root)
        info = DatasetInfo.read(folder)
        shape = (info.channels, info.resolution, info.resolution)
        n_images = info.n_images if split == "train" else sum(info.held_out)
        if not n_images:
            raise StorageError(
                f"dataset {folder} has no held-out part: prepare it with --held-out 0.1"
            )
        images = np.empty((n_images, *shape), dtype=np.uint8)
        labels = np.empty(n_images, dtype=np.int64)
        filled = 0
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock.
            for part in part_files(folder, split):
                table = pq.read_table(
                    f"{folder.path}/{part}",
                    columns=["image", "label"],
                    filesystem=folder.filesystem,
                )
                rows = slice(filled, filled + len(table))
                filled += len(table)
                if filled > n_images:
                    break
                labels[rows] = table["label"].to_numpy()
                decoded = pool.map(decode, table["image"].to_pylist())
                for i, image in zip(range(rows.start, rows.stop), decoded, strict=True):
                    images[i] = image.transpose(2, 0, 1)
        if filled != n_images:
            raise StorageError(
                f"dataset {folder} is damaged: {DESCRIPTION} promises {n_images} images,"
                f" its parts hold {filled} or more; prepare it again with --overwrite"
            )
        return cls(info, torch.from_numpy(images), torch.from_numpy(labels), folder)


def part_files(folder: Folder, split: Split = "train") -> list[str]:
    """A dataset's Parquet files, in order."""
    head = "part-" if split == "train" else "held_out-"
    return [f for f in folder.children() if f.startswith(head) and f.endswith(".parquet")]


def encode(image: np.ndarray) -> bytes:
    """A uint8 image `[H, W, C]` without loss: PNG for 1 and 3 channels, NumPy's format else."""
    file = io.BytesIO()
    if image.shape[2] in (1, 3):
        pixels = image[:, :, 0] if image.shape[2] == 1 else image
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    else:
        np.save(file, image, allow_pickle=False)
    return file.getvalue()


def decode(content: bytes) -> np.ndarray:
    """What `encode` was given: uint8 `[H, W, C]`."""
    if content.startswith(b"\x93NUMPY"):
        stored: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
        return stored
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


class ShuffledOrder:
    """An endless order over n images: every image exactly once an epoch, shuffled anew each time.

    Position p is the p-th image shown since training began. The order is a function of the seed
    alone; how many workers share a batch, and where a run was interrupted, make no difference.
    """

    def __init__(self, n: int, seed: int) -> None:
        """An order over images 0 to n - 1."""
        self.n = n
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def indices(self, start: int, count: int) -> np.ndarray:
        """Image indices at positions start to start + count - 1: int64 `[count]`."""
        positions = np.arange(start, start + count)
        epochs, offsets = np.divmod(positions, self.n)
        result = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._permutation(int(epoch))[offsets[here]]
        return result

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # A batch may span a border: keep the epoch before, drop what is older.
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = rng(self.seed, Stream.DATA_ORDER, epoch).permutation(self.n)
        return self._epochs[epoch]


Progress = Callable[[str], None]
"""Receives a line of progress for people."""
