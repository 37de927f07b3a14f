"""Batches that fill while the model works, and no more of them than clients would wait for.

A model takes little longer for several images than for one. So whatever has come in by the time
that it is free goes into its next batch together: nothing waits for company while the model is
idle, and under load batches are as full as they may be. Whoever would not fit into the next one or
two is turned away at once: a queue that only grows would serve everybody late.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Busy:
    """The answer to what was turned away."""

    seconds: float
    """After which there should be room."""


@dataclass(frozen=True)
class _Waiting(Generic[K, T]):
    key: K
    items: Sequence[T]
    images: asyncio.Future[np.ndarray]


class Batcher(Generic[K, T]):
    """Has items done in batches of one key, one batch at a time, in a thread of its own."""

    def __init__(
        self,
        run: Callable[[K, list[T]], np.ndarray],
        limit: Callable[[K], int],
        note: Callable[[int, int], None] = lambda _items, _backlog: None,
    ) -> None:
        """`run` makes `[N, ...]` of a key and N items; `limit` is the most items of its batch.

        A request of more items is a batch of its own. `note` is told of every batch: its items, and
        how many are left waiting.
        """
        self.run, self.limit, self.note = run, limit, note
        self._waiting: deque[_Waiting[K, T]] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "batches")
        self._doing = 0
        self.last_seconds = 0.0
        """What the last batch took."""

    @property
    def backlog(self) -> int:
        """Items that wait for their batch."""
        return sum(len(waiting.items) for waiting in self._waiting)

    async def submit(self, key: K, items: Sequence[T]) -> np.ndarray | Busy:
        """What `run` makes of the items, which may travel with those of others.

        `Busy` if others wait already and two batches have no room for all, the items that are being
        done included: if these are few, those that wait may be more than fit into the next. A
        request that is cancelled before its batch begins is not done. Raises what `run` raises for
        these items alone.
        """
        if self._waiting and self._doing + self.backlog + len(items) > 2 * self.limit(key):
            return Busy(self.last_seconds)
        waiting = _Waiting(key, items, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await waiting.images

    async def _work(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            self._doing = sum(len(waiting.items) for waiting in batch)
            await self._do(batch)
            self._doing = 0
            self.last_seconds = time.monotonic() - began

    def _next(self) -> list[_Waiting[K, T]]:
        """The first that waits, and as many others of its key, in their order, as fit."""
        batch: list[_Waiting[K, T]] = []
        kept: deque[_Waiting[K, T]] = deque()
        room = 0
        while self._waiting:
            waiting = self._waiting.popleft()
            if waiting.images.cancelled():
                continue
            if not batch:
                room = self.limit(waiting.key)
            if not batch or (waiting.key == batch[0].key and len(waiting.items) <= room):
                batch.append(waiting)
                room -= len(waiting.items)
            else:
                kept.append(waiting)
        self._waiting = kept
        return batch

    async def _do(self, batch: list[_Waiting[K, T]]) -> None:
        items = [item for waiting in batch for item in waiting.items]
        self.note(len(items), self.backlog)
        loop = asyncio.get_running_loop()
        try:
            made = await loop.run_in_executor(self._thread, self.run, batch[0].key, items)
        except Exception as error:
            if len(batch) > 1:  # Whose fault it was shows when each is done alone.
                for waiting in batch:
                    await self._do([waiting])
            elif not batch[0].images.done():
                batch[0].images.set_exception(error)
            return
        start = 0
        for waiting in batch:
            end = start + len(waiting.items)
            if not waiting.images.done():
                waiting.images.set_result(made[start:end])
            start = end
