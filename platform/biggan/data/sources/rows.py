"""Images in rows of tables: Parquet and Arrow files, read some rows at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from biggan.data.images import ImageError
from biggan.data.sources.decoding import decode_image
from biggan.data.sources.files import File
from biggan.data.sources.labels import Labelled
from biggan.data.sources.source import Sample, Source
from biggan.storage import Folder

_WINDOW = 256
"""Rows whose content is held at a time."""
LONGEST_RUN = 1024


class RowSource(Source):
    """Rows of batches (row groups, record batches), each of which is read as a whole."""

    root: Folder
    """What paths in rows count from."""
    files: Sequence[File]
    file_of: np.ndarray
    """int `[batches]`, the file of each batch."""
    first_of_file: np.ndarray
    """int64 `[files]`, the first row of each."""
    starts: np.ndarray
    """int64 `[batches + 1]`, the first row of each batch."""
    rows: np.ndarray
    """int64 `[n]`, each item's row."""
    numbers: np.dtype | None = None
    """The type of the numbers where the images are arrays."""
    window: tuple[float, float] | None = None

    def _take(self, labelled: Labelled, starts: np.ndarray, held_out: np.ndarray | None) -> None:
        """Note which rows are items; `held_out` says it of every row."""
        self.classes, self.labels, self.rows = labelled.classes, labelled.labels, labelled.rows
        self.rejected, self.unreadable = labelled.rejected, labelled.unreadable
        self.findings = labelled.findings
        self.held_out = None if held_out is None else held_out[labelled.rows]
        self.starts = starts
        lengths = np.diff(starts)
        self.run_length = int(np.clip(np.median(lengths[lengths > 0]), 1, LONGEST_RUN))

    @abstractmethod
    def _contents(self, batch: int, rows: np.ndarray) -> list[Any]:
        """What rows of a batch (counted from its first) hold in the image column."""

    def _ref(self, batch: int, row: int) -> str:
        file = self.file_of[batch]
        number = int(self.starts[batch]) + row - int(self.first_of_file[file])
        return f"{self.files[file].name} row {number}"

    def _row(self, row: int) -> str:
        batch = int(self._batches(np.array([row]))[0])
        return self._ref(batch, row - int(self.starts[batch]))

    def refs(self, items: np.ndarray) -> list[str]:
        """A file and a row for each item."""
        rows = self.rows[items]
        batches = self._batches(rows)
        within = rows - self.starts[batches]
        return [self._ref(b, r) for b, r in zip(batches.tolist(), within.tolist(), strict=True)]

    def read(self, items: np.ndarray) -> Iterator[Sample]:
        """The rows' images, each batch read once for the items of a window that it holds."""
        for start in range(0, len(items), _WINDOW):
            some = items[start : start + _WINDOW]
            contents = self._window_contents(self.rows[some])
            for ref, content in zip(self.refs(some), contents, strict=True):
                yield Sample(ref, partial(self._load, content))

    def _batches(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.searchsorted(self.starts, rows, side="right") - 1
        return found

    def _window_contents(self, rows: np.ndarray) -> list[Any]:
        contents: list[Any] = [None] * len(rows)
        batches = self._batches(rows)
        for batch in np.unique(batches).tolist():
            here = np.flatnonzero(batches == batch)
            try:
                taken = self._contents(batch, rows[here] - self.starts[batch])
            except Exception as error:  # Damaged as a whole: each of its images raises this.
                taken = [error] * len(here)
            for at, content in zip(here.tolist(), taken, strict=True):
                contents[at] = content
        return contents

    def _load(self, content: Any) -> Image.Image | np.ndarray:
        if isinstance(content, Exception):
            raise content
        if isinstance(content, dict):
            path = content.get("path")
            content = content.get("bytes")
            if content is None and path:
                content = self._linked(path)
        if content is None:
            raise ImageError("the row has no image")
        if isinstance(content, list):
            return np.asarray(content, self.numbers)
        return decode_image(content, self.window)

    def _linked(self, path: str) -> bytes:
        if "://" in path or path.startswith("/"):
            above, _, name = path.rpartition("/")
            return Folder(above or "/").read_bytes(name)
        return self.root.read_bytes(path)
