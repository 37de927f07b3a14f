"""Images as numbers in one large array a file: NumPy, IDX, CIFAR and HDF5 sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from biggan.data.sources.folders import describe
from biggan.data.sources.labels import classify
from biggan.data.sources.options import Split
from biggan.data.sources.source import Sample, Source, SourceError


@dataclass(frozen=True)
class Block:
    """An array of images with their labels."""

    name: str
    """What its images are known by, ahead of their number."""
    open: Callable[[], Any]
    """The array, `[n, H, W]`, `[n, H, W, C]` or `[n, C, H, W]`; opened once in each process."""
    shape: tuple[int, ...]
    labels: np.ndarray
    split: str = ""

    def __post_init__(self) -> None:
        channels_last(self.shape, self.name)
        if len(self.labels) != self.shape[0]:
            raise SourceError(
                f"{self.name}: {self.shape[0]:,} images, but {len(self.labels):,} labels: is the"
                " file truncated, or the pair mismatched?"
            )


def channels_last(shape: tuple[int, ...], name: str) -> bool:
    """Whether images of that shape have channels last, or none; raises `SourceError` if odd."""
    if len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4)):
        return True
    if len(shape) == 4 and shape[1] in (1, 3, 4):
        return False
    raise SourceError(
        f"{name} has shape {shape}: expected images [n, H, W], [n, H, W, C] or [n, C, H, W] with 1,"
        " 3 or 4 channels; cut volumes into slices, each with a label, first"
    )


class ArraySource(Source):
    """Images in blocks, each an array."""

    def __init__(
        self,
        kind: str,
        place: object,
        blocks: Sequence[Block],
        *,
        split: Split | None,
        held_out: np.ndarray | None,
        names: Sequence[str] = (),
        run_length: int = 1,
        **options: Any,
    ) -> None:
        """`held_out` says it of each block; `names` are those of labels 0, 1, ..."""
        raw = np.concatenate([block.labels for block in blocks])
        self.starts = np.cumsum([0, *(len(block.labels) for block in blocks)])
        self.blocks = [_Opened(block.name, block.open, block.shape) for block in blocks]
        labelled = classify(raw, self._ref, names)
        self.classes, self.labels, self.rows = labelled.classes, labelled.labels, labelled.rows
        self.rejected, self.unreadable = labelled.rejected, labelled.unreadable
        self.findings = labelled.findings
        if held_out is not None:
            self.held_out = np.repeat(held_out, np.diff(self.starts))[self.rows]
        self.run_length = run_length
        self._described = describe(kind, place, split=split, **options)

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        return self._described

    def read(self, items: np.ndarray) -> Iterator[Sample]:
        """Slices of the arrays."""
        for row in self.rows[items].tolist():
            yield Sample(self._ref(row), partial(self._load, row))

    def refs(self, items: np.ndarray) -> list[str]:
        """An array and a number for each item."""
        return [self._ref(row) for row in self.rows[items].tolist()]

    def _find(self, row: int) -> tuple[int, int]:
        block = int(np.searchsorted(self.starts, row, side="right")) - 1
        return block, row - int(self.starts[block])

    def _ref(self, row: int) -> str:
        block, number = self._find(row)
        return f"{self.blocks[block].name} {number}"

    def _load(self, row: int) -> np.ndarray:
        number, within = self._find(row)
        block = self.blocks[number]
        image = np.asarray(block.open()[within])
        if image.ndim == 3 and not channels_last(block.shape, block.name):
            image = image.transpose(1, 2, 0)
        return image


@dataclass(frozen=True)
class _Opened:
    """What is left of a block once its labels are taken."""

    name: str
    open: Callable[[], Any]
    shape: tuple[int, ...]
