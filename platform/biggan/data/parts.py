"""A dataset's images as they lie in storage: encoded, in Parquet parts, read when asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pyarrow import fs
from torch import Tensor

from biggan.storage import Folder, StorageError

Split = Literal["train", "held_out"]
"""The images to train on, or those set aside for reference statistics."""
_PREFIXES: dict[Split, str] = {"train": "part-", "held_out": "held_out-"}
_DECODERS = 4
"""Threads that decode at a time; Pillow does most of it outside the interpreter lock."""


def part_files(folder: Folder, split: Split = "train") -> list[str]:
    """A dataset's Parquet files, in order."""
    return list(part_sizes(folder, split))


def part_sizes(folder: Folder, split: Split) -> dict[str, int]:
    """A dataset's Parquet files, in order, and the bytes of each."""
    selector = fs.FileSelector(folder.path, allow_not_found=True)
    found = {info.base_name: info.size for info in folder.filesystem.get_file_info(selector)}
    prefix = _PREFIXES[split]
    return {f: found[f] for f in sorted(found) if f.startswith(prefix) and f.endswith(".parquet")}


def read_labels(folder: Folder, files: Sequence[str]) -> list[np.ndarray]:
    """The class ids in each part: int64 `[rows]`."""

    def read(file: str) -> np.ndarray:
        with _opened(folder, file) as parquet:
            column = parquet.read(columns=["label"])["label"]
        labels: np.ndarray = column.to_numpy().astype(np.int64)
        return labels

    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, files))


@contextmanager
def _opened(folder: Folder, file: str) -> Iterator[pq.ParquetFile]:
    """A part, open; raises `StorageError` if it cannot be read."""
    try:
        with pq.ParquetFile(f"{folder.path}/{file}", filesystem=folder.filesystem) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{folder}/{file} cannot be read: {error}") from None


class StoredImages:
    """Images that are read from their parts and decoded whenever they are asked for.

    Takes an index as a tensor of uint8 `[N, C, H, W]` does: some numbers, or a slice.
    """

    def __init__(
        self,
        folder: Folder,
        files: Sequence[str],
        rows: Sequence[np.ndarray],
        shape: tuple[int, int, int],
    ) -> None:
        """`rows` are those of each part that belong, ascending; `shape` is an image's, C, H, W."""
        self.folder = folder
        self.files = list(files)
        self.counts = np.array([len(part) for part in rows], dtype=np.int64)
        self.shape = (int(self.counts.sum()), *shape)
        self._rows = np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32)
        self._starts = np.cumsum([0, *self.counts[:-1]])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all images, decoded."""
        return int(np.prod(self.shape))

    def __getitem__(self, index: Tensor | np.ndarray | slice) -> Tensor:
        """uint8 `[n, C, H, W]`; as fast as the parts are few that the index falls into."""
        if isinstance(index, slice):
            index = np.arange(len(self))[index]
        return torch.from_numpy(self.take(np.asarray(index, dtype=np.int64)))

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, `size` at a time; each part is read once."""
        left = np.empty((0, *self.shape[1:]), dtype=np.uint8)
        for images in self.parts():
            left = np.concatenate([left, images])
            while len(left) >= size:
                yield torch.from_numpy(left[:size].copy())
                left = left[size:]
        if len(left):
            yield torch.from_numpy(left.copy())

    def parts(self) -> Iterator[np.ndarray]:
        """All images in order, a part at a time."""
        for start, count in zip(self._starts, self.counts, strict=True):
            yield self.take(np.arange(start, start + count))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """uint8 `[n, C, H, W]` for image numbers in any order."""
        images = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        with ThreadPoolExecutor(_DECODERS) as pool:
            for part in np.unique(parts).tolist():
                here = np.flatnonzero(parts == part)
                decoded = pool.map(decode, self._read(part, self._rows[indices[here]]))
                for i, image in zip(here, decoded, strict=True):
                    images[i] = image.transpose(2, 0, 1)
        return images

    def _read(self, part: int, rows: np.ndarray) -> list[bytes]:
        """The encoded images in some rows of a part, out of the row groups that hold them."""
        with _opened(self.folder, self.files[part]) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            groups, which = np.unique(
                np.searchsorted(ends, rows, side="right"), return_inverse=True
            )
            table = file.read_row_groups(groups.tolist(), columns=["image"])
        # Where each of the groups read begins in the table, and in the part.
        in_table = np.cumsum([0, *(sizes[g] for g in groups)])[which]
        in_part = (ends - sizes)[groups][which]
        content: list[bytes] = table["image"].take(in_table + rows - in_part).to_pylist()
        return content


def encode(image: np.ndarray) -> bytes:
    """A uint8 image `[H, W, C]` without loss: PNG for 1 and 3 channels, NumPy's format else."""
    file = io.BytesIO()
    if image.shape[2] in (1, 3):
        pixels = image[:, :, 0] if image.shape[2] == 1 else image
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        # A quarter quicker than Pillow's 6 for an eighth more bytes (benchmarks/README.md).
        picture.save(file, "PNG", compress_level=1)
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
