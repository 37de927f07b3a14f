"""The order in which a run sees its images: a function of seed and position, of nothing else.

Position p is the p-th image shown since training began, over all workers. How many of them share a
batch, and where a run was interrupted, make no difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from biggan.latents import Stream, rng

Balance = Literal["off", "sqrt", "uniform"]
_POWERS: dict[Balance, float] = {"off": 1.0, "sqrt": 0.5, "uniform": 0.0}


class Order(Protocol):
    """An endless order over images."""

    def indices(self, start: int, count: int) -> np.ndarray:
        """Image indices at positions start to start + count - 1: int64 `[count]`."""


class EpochOrder(ABC):
    """An order that is made one epoch of n positions at a time."""

    def __init__(self, n: int, seed: int) -> None:
        """An order whose epochs have n positions."""
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
            result[here] = self._remembered(int(epoch))[offsets[here]]
        return result

    def _remembered(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # A batch may span a border: keep the epoch before, drop what is older.
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = self.epoch(epoch)
        return self._epochs[epoch]

    @abstractmethod
    def epoch(self, number: int) -> np.ndarray:
        """The image indices of one epoch: int64 `[n]`."""


class ShuffledOrder(EpochOrder):
    """Every image exactly once an epoch, shuffled anew each time."""

    def epoch(self, number: int) -> np.ndarray:
        """A permutation of 0 to n - 1."""
        permutation: np.ndarray = rng(self.seed, Stream.DATA_ORDER, number).permutation(self.n)
        return permutation


def quotas(counts: Sequence[int], balance: Balance) -> np.ndarray:
    """How many of an epoch's positions each class has; as many altogether as there are images.

    Class j has a share of n_j^q / sum_i n_i^q (Kang et al. 2020, arXiv 1910.09217, eq. 1): q = 1 is
    as they occur, 1/2 the square root with which Mahajan et al. 2018 (arXiv 1805.00932) trained on
    long tails of hashtags, 0 equal shares. What rounding leaves over goes to the classes with the
    largest remainders. No class that has an image goes without.
    """
    images = np.asarray(counts, dtype=np.int64)
    weights = np.where(images > 0, images.astype(np.float64) ** _POWERS[balance], 0.0)
    exact = images.sum() * weights / weights.sum()
    whole: np.ndarray = np.floor(exact).astype(np.int64)
    left = int(images.sum() - whole.sum())
    largest = np.argsort(whole - exact, kind="stable")[:left]
    whole[largest] += 1
    return whole


class BalancedOrder(EpochOrder):
    """Classes as often as `quotas` says, and the images of a class equally often, give or take one.

    The j-th image of a class since training began is the j-th of a sequence that runs through all
    of the class, shuffled anew each time; an epoch's border does not interrupt it.
    """

    def __init__(self, labels: np.ndarray, balance: Balance, seed: int) -> None:
        """`labels` are the class ids of all images."""
        super().__init__(len(labels), seed)
        counts = np.bincount(labels)
        self.quotas = quotas(counts.tolist(), balance)
        # The images of each class, in the dataset's order.
        self._members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])

    def epoch(self, number: int) -> np.ndarray:
        """Image indices, in which rarer classes may repeat theirs and commoner ones leave some."""
        shown = [
            members[self._of_class(k, number * quota, quota)]
            for k, (members, quota) in enumerate(
                zip(self._members, self.quotas.tolist(), strict=True)
            )
        ]
        shuffled: np.ndarray = rng(self.seed, Stream.DATA_ORDER, number).permutation(
            np.concatenate(shown)
        )
        return shuffled

    def _of_class(self, k: int, start: int, count: int) -> np.ndarray:
        """Numbers, within class k, of its images start to start + count - 1 since the beginning."""
        size = len(self._members[k])
        if not size or not count:
            return np.empty(0, dtype=np.int64)
        # Rounds through the class, so many drawn at once that an epoch needs two draws at most.
        rounds = -(-count // size)
        block = rounds * size
        first, last = start // block, (start + count - 1) // block
        drawn = [
            rng(self.seed, Stream.CLASS_ORDER, b * len(self._members) + k).permuted(
                np.tile(np.arange(size), (rounds, 1)), axis=1
            )
            for b in range(first, last + 1)
        ]
        return np.concatenate(drawn).reshape(-1)[start - first * block :][:count]


class WindowedOrder:
    """Every image exactly once an epoch, shuffled as far as a stream can: within windows.

    An epoch deals out the stored parts, in an order of its own, in windows of a few whole parts,
    and shuffles the images within each. A reader needs one window in memory, not the dataset.
    """

    def __init__(self, counts: Sequence[int], window: int, seed: int) -> None:
        """`counts` are the images of each part; a window holds up to `window`, one part at least.

        Image numbers count through the parts in order.
        """
        self.counts = np.asarray(counts, dtype=np.int64)
        self.n = int(self.counts.sum())
        self.seed = seed
        self.parts_per_window = max(1, window // max(1, int(self.counts.max())))
        self.windows_per_epoch = -(-len(self.counts) // self.parts_per_window)
        self._starts = np.cumsum([0, *self.counts[:-1]])

    def window_at(self, position: int) -> int:
        """Number of the window that holds a position; windows count on through the epochs."""
        epoch, offset = divmod(position, self.n)
        ends = np.cumsum([self.counts[parts].sum() for parts in self._dealt(epoch)])
        return epoch * self.windows_per_epoch + int(np.searchsorted(ends, offset, side="right"))

    def window(self, number: int) -> tuple[int, np.ndarray]:
        """The position at which a window begins, and its image indices in order: int64."""
        epoch, i = divmod(number, self.windows_per_epoch)
        dealt = self._dealt(epoch)
        before = sum(int(self.counts[parts].sum()) for parts in dealt[:i])
        images = np.concatenate(
            [np.arange(self._starts[p], self._starts[p] + self.counts[p]) for p in dealt[i]]
        )
        shuffled = rng(self.seed, Stream.WINDOW_ORDER, number).permutation(images)
        return epoch * self.n + before, shuffled

    def _dealt(self, epoch: int) -> list[np.ndarray]:
        parts = rng(self.seed, Stream.DATA_ORDER, epoch).permutation(len(self.counts))
        return np.split(parts, range(self.parts_per_window, len(parts), self.parts_per_window))
