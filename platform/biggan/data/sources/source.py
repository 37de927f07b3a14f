"""What a source of labelled images is: a list of items with labels known, to be read in any order.

A source is opened on the driver, which lists its items cheaply; it is then shipped to workers,
which read the items' images. So it holds names and numbers, never images, and about a hundred
bytes an item at most.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from biggan.data.dataset import Rejected
from biggan.data.images import to_image
from biggan.errors import UserError

Check = Literal["one-class", "labels", "gaps", "few-images", "channels", "empty-images"]
"""What preparation looks for, since elsewhere users meet it in silence; `--allow` lets it pass."""


class SourceError(UserError):
    """A source that holds nothing usable, and what it should hold."""


@dataclass(frozen=True)
class Finding:
    """Something about a source's labels that is most likely a mistake."""

    check: Check
    text: str
    """The value, the constraint and the mend."""


@dataclass(frozen=True)
class Sample:
    """One item of a source, about to be read."""

    ref: str
    """What people know it by: a path within the source, or a file and a row."""
    load: Callable[[], Image.Image | np.ndarray]
    """Its image, perhaps not yet decoded: Pillow's, or an array `[H, W]` or `[H, W, C]`. Raises
    whatever a damaged one makes it."""

    def image(self) -> Image.Image:
        """The same as a Pillow image."""
        loaded = self.load()
        return loaded if isinstance(loaded, Image.Image) else to_image(loaded)


class Source(ABC):
    """Labelled images."""

    classes: Sequence[str]
    """Class names; a label is an index into them."""
    labels: np.ndarray
    """int32 `[n]`, each item's class."""
    run_length: int = 1
    """Consecutive items that are cheap to read together, such as a Parquet row group; 1 is
    random access."""
    rejected: Sequence[Rejected] = ()
    """What was found unfit while listing."""
    unreadable: int = 0
    """How many of those are files (or folders of them) that should have been images."""
    findings: Sequence[Finding] = ()
    """What is suspicious about the labels."""
    held_out: np.ndarray | None = None
    """bool `[n]`: items of a test split that the source itself has. None: it has no splits."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source: `kind`, `uri`, and the options that matter."""

    @abstractmethod
    def read(self, items: np.ndarray) -> Iterator[Sample]:
        """The samples of items (int64 indices), in that order; runs of neighbours are cheapest.

        A container that is damaged as a whole still yields a sample for each item, whose `load`
        raises what is wrong.
        """

    def refs(self, items: np.ndarray) -> list[str]:
        """What people know the items by, without reading them."""
        return [sample.ref for sample in self.read(items)]


def natural(text: str) -> tuple[list[str | int], str]:
    """Sort key under which "class 10" follows "class 9"."""
    parts = re.split(r"([0-9]+)", text)  # Every second part is a number.
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text
