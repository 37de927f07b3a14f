"""Which of the images that could be read make up the dataset: copies, classes, the held-out part.

Works on numbers alone, about 60 bytes an image on the driver, whatever the images' size.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from biggan.data.dataset import Rejected
from biggan.data.plan import Preparation
from biggan.data.shards import Record
from biggan.data.sources import Source
from biggan.latents import Stream, rng

REJECTED_KEPT = 10_000
"""Rejected files that `dataset.json` lists; of more, it has the number by reason."""
LEFT_TO_TRAIN = 2
"""Images of a class that holding out leaves at least."""


class Tally:
    """What became of every item of a source, as its shards come in."""

    def __init__(self, n: int) -> None:
        """Nothing is known yet of `n` items."""
        self.items = Record.blank(n)
        self.reasons: Counter[str] = Counter()
        self.done = 0
        self._rejected: dict[int, list[Rejected]] = {}

    @property
    def bad(self) -> int:
        """Items that were rejected."""
        return self.reasons.total()

    @property
    def rejected(self) -> list[Rejected]:
        """The rejected ones, or the first of very many."""
        return [entry for _, shard in sorted(self._rejected.items()) for entry in shard]

    def add(self, shard: int, items: np.ndarray, record: Record) -> None:
        """Take in the record of one shard."""
        for key, value in record.arrays().items():
            getattr(self.items, key)[items] = value
        self.done += len(items)
        self.reasons.update(reason_kind(entry.reason) for entry in record.rejected)
        room = REJECTED_KEPT - sum(map(len, self._rejected.values()))
        if record.rejected:
            self._rejected[shard] = record.rejected[: max(0, room)]


def reason_kind(reason: str) -> str:
    """A reason without its numbers, so that equal ones can be counted."""
    return re.sub(r"[0-9][0-9.,]*", "N", reason)[:120]


@dataclass(frozen=True)
class Copies:
    """Images whose pixels equal those of another."""

    items: np.ndarray
    """int64 `[n]`, those beyond the first of each, in the source's order."""
    firsts: np.ndarray
    """int64 `[n]`, the first that each of them equals."""

    @classmethod
    def find(cls, images: Record) -> Copies:
        """Compare the hashes of all that was kept."""
        kept = np.flatnonzero(images.kept)
        low, high = np.ascontiguousarray(images.pixels[kept]).view(np.uint64).reshape(-1, 2).T
        order = np.lexsort((kept, high, low))
        same = np.zeros(len(kept), dtype=bool)
        same[1:] = (np.diff(low[order]) == 0) & (np.diff(high[order]) == 0)
        leaders = np.maximum.accumulate(np.where(same, 0, np.arange(len(kept))))
        items, firsts = kept[order[same]], kept[order[leaders[same]]]
        by_item = np.argsort(items)
        return cls(items[by_item], firsts[by_item])

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Selection:
    """Which images are in the dataset, which of them are held out, and under which label."""

    source: Source
    images: Record
    copies: Copies
    empty: np.ndarray
    """bool `[classes]`: the class has no image to train on, and is left out."""
    dropped: np.ndarray
    """bool `[n]`: could be read, and is left out."""
    held_out: np.ndarray
    """bool `[n]`."""

    @classmethod
    def choose(cls, preparation: Preparation, source: Source, images: Record) -> Selection:
        """Drop copies if asked, then hold out, then drop classes that have nothing left."""
        copies = Copies.find(images)
        dropped = np.zeros(len(source), dtype=bool)
        if preparation.drop_duplicates:
            dropped[copies.items] = True
        there = images.kept & ~dropped
        held_out = np.zeros(len(source), dtype=bool)
        if source.held_out is not None:
            held_out = there & source.held_out
        elif preparation.held_out:
            # No image stands on both sides of the split: those with copies are all trained on.
            single = there.copy()
            if not preparation.drop_duplicates:
                single[copies.items] = single[copies.firsts] = False
            held_out = hold_out(
                source.labels, there, single, preparation.held_out, preparation.seed
            )
        empty = _counts(source, there & ~held_out) == 0
        homeless = empty[source.labels] & there
        return cls(source, images, copies, empty, dropped | homeless, held_out & ~homeless)

    @cached_property
    def train(self) -> np.ndarray:
        """Images to train on: bool `[n]`."""
        chosen: np.ndarray = self.images.kept & ~self.dropped & ~self.held_out
        return chosen

    @property
    def classes(self) -> list[str]:
        """Names of the classes that are left."""
        return [self.source.classes[i] for i in np.flatnonzero(~self.empty).tolist()]

    @property
    def renumbered(self) -> np.ndarray:
        """int32 `[classes]`: labels without gaps."""
        return (np.cumsum(~self.empty) - 1).astype(np.int32)

    def counts(self, which: np.ndarray) -> list[int]:
        """Images by class that is left, of those marked."""
        counts: list[int] = _counts(self.source, which)[~self.empty].tolist()
        return counts

    def fingerprint(self, shape: str, which: np.ndarray) -> str:
        """SHA-256 over shape and the digests of the images marked, in no particular order."""
        digests = np.ascontiguousarray(self.images.digests[which]).view("S32").ravel()
        total = hashlib.sha256(shape.encode())
        total.update(np.sort(digests).tobytes())
        return total.hexdigest()

    def sizes(self) -> dict[str, list[int]]:
        """Smallest, median and largest width and height of the images as they came."""
        sizes = self.images.sizes[self.train | self.held_out]
        return {
            side: [int(values.min()), int(np.median(values)), int(values.max())]
            for side, values in zip(("width", "height"), sizes.T, strict=True)
        }

    @property
    def conflicting(self) -> int:
        """Copies that have another label than the first of them."""
        labels = self.source.labels
        return int((labels[self.copies.items] != labels[self.copies.firsts]).sum())


def hold_out(
    labels: np.ndarray, there: np.ndarray, candidates: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Mark that part of each class, drawn from the candidates by seed: bool `[n]`.

    At least one of a class, if that leaves `LEFT_TO_TRAIN`.
    """
    shuffled = rng(seed, Stream.SPLIT, 1).permutation(len(labels))
    shuffled = shuffled[candidates[shuffled]]
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]
    n_classes = int(labels.max(initial=0)) + 1
    sizes = np.bincount(labels[there], minlength=n_classes)
    wanted = np.maximum(np.rint(sizes * fraction).astype(int), 1)
    wanted = np.clip(wanted, 0, np.maximum(sizes - LEFT_TO_TRAIN, 0))
    offered = np.bincount(labels[shuffled], minlength=n_classes)
    rank = np.arange(len(shuffled)) - np.repeat(np.cumsum(offered) - offered, offered)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[shuffled[rank < wanted[labels[shuffled]]]] = True
    return held_out


def _counts(source: Source, which: np.ndarray) -> np.ndarray:
    return np.bincount(source.labels[which], minlength=len(source.classes))
