"""Batches that fill while the model works, and no more of them than clients would wait for.

A model takes little longer for several images than for one. So whatever has come in by the time
that a thread is free goes into its next batch together: nothing waits for company while the model
is idle, and under load batches are as full as they may be. Whoever would not fit into the next one
or two of each thread is turned away at once: a queue that only grows would serve everybody late.

A request that does not fit into one batch shares the next ones with those that come after it: half
of each is theirs, if they want it. So an animation takes at most twice its time for their sake, and
none of them waits for its end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from serving.schemas import MAX_FRAMES

MAX_EXCESS = 10.0
"""Of images turned away for one that is made; more is taken for this, to be forgotten soon."""
MEMORY = 0.97
"""What an image leaves of those before it."""
SMALL = 8
"""Images of a request that is small, whatever the size of a batch."""
MAX_ITEMS = 8 * MAX_FRAMES
"""Of requests that wait, all items, made or not: a large one that would make them more is turned
away. Each keeps its images until the last is made, and what `room` counts of it does not grow with
its size: 32 threads have room for 120 animations, 6 GB of images of 256 pixels; these are 400 MB.
"""

K = TypeVar("K", bound="Maker")
T = TypeVar("T")


class Maker(Protocol):
    """Makes images, in batches of its own."""

    @property
    def limit(self) -> int:
        """The most items of a batch."""

    @property
    def threads(self) -> int:
        """How many batches may be done at once, each in a thread of its own."""

    @property
    def room(self) -> int:
        """The most items in hand, those that are being done and those that wait."""


@dataclass(frozen=True)
class Busy:
    """The answer to what was turned away."""

    seconds: float
    """After which there should be room."""
    many: bool = False
    """Whether more is turned away than is made, so that nothing is lost with what comes next."""


@dataclass
class Demand:
    """How many images are turned away for each that is made: a mean of some thirty."""

    excess: float = 0.0

    def turn_away(self, images: int) -> None:
        """Note images that were asked for in vain."""
        self.excess = min(MAX_EXCESS, self.excess + (1 - MEMORY) * images)

    def make(self, images: int) -> None:
        """Note images that were made."""
        self.excess *= MEMORY**images


@dataclass(eq=False)
class _Request(Generic[K, T]):
    maker: K
    items: Sequence[T]
    images: asyncio.Future[np.ndarray]
    begun: int = 0
    """Items that are in batches, from the first."""
    made: dict[int, np.ndarray] = field(default_factory=dict)
    """Images of batches, by the first of their items."""
    owed: bool = False
    """Whether those that came later had more of the last batch, by the odd one."""

    @property
    def left(self) -> int:
        """Items that wait for a batch; none of a request that failed or was cancelled."""
        return 0 if self.images.done() else len(self.items) - self.begun

    @property
    def next(self) -> int:
        """Items that it has of the next batch, if others want the rest."""
        return min(self.left, _half(self.maker))

    def take(self, most: int) -> _Part[K, T]:
        """The next items, for a batch."""
        begin, self.begun = self.begun, min(len(self.items), self.begun + most)
        return _Part(self, begin, self.items[begin : self.begun])

    def keep(self, begin: int, images: np.ndarray) -> None:
        """Put down images of a batch; with the last of them the request is answered."""
        self.made[begin] = images
        if not self.images.done() and sum(map(len, self.made.values())) == len(self.items):
            self.images.set_result(np.concatenate([self.made[i] for i in sorted(self.made)]))


@dataclass(frozen=True)
class _Part(Generic[K, T]):
    """Items of a request that are in one batch."""

    request: _Request[K, T]
    begin: int
    items: Sequence[T]


class Batcher(Generic[K, T]):
    """Has items done in batches, as many at a time as a maker has threads."""

    def __init__(
        self,
        run: Callable[[K, list[T], int], np.ndarray],
        note: Callable[[K, int, int, float], None] = lambda *_told: None,
    ) -> None:
        """`run` makes `[N, ...]` of a maker and N items, computing with a number of threads.

        That is 1, or all of the maker's for items that would leave some idle. `note` is told of
        every batch: maker, items, how many of that maker were left waiting, and the seconds that it
        took.
        """
        self.run, self.note = run, note
        self._waiting: deque[_Request[K, T]] = deque()
        self._threads: list[ThreadPoolExecutor] = []
        self._taken: set[int] = set()
        self._doing = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.last_seconds = 0.0
        """What the last batch took."""

    @property
    def backlog(self) -> int:
        """Items that wait for their batch."""
        return sum(request.left for request in self._waiting)

    async def submit(self, maker: K, items: Sequence[T]) -> np.ndarray | Busy:
        """What `run` makes of the items, which may travel with those of others, and apart.

        `Busy` if others wait already and there is no room for all, the items that are being done
        included: if these are few, those that wait may be more than fit into the next batch. What a
        request that is cancelled has in no batch yet is not done. Raises what `run` raises for
        these items alone.
        """
        if self._full(maker, len(items)):
            return Busy(self.last_seconds)
        request = _Request(maker, items, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._begin()
        return await request.images

    def _full(self, maker: K, items: int) -> bool:
        """Whether others wait already, and there is no room for a request of so many items.

        One that waits counts as what it has of the next batch, whatever its size. Large ones would
        still take all the room where a batch is an image, or much is turned away. So small ones
        have half a batch of room in any case, as half of the next batch is theirs.
        """
        waiting = [request for request in self._waiting if request.left]
        if not waiting:
            return False
        half = _half(maker)
        begun = sum(request.next for request in waiting if request.begun)
        others = sum(request.next for request in waiting if not request.begun)
        room = maker.room - self._doing - begun
        if items <= max(SMALL, half):
            room = max(room, half)
        elif sum(len(request.items) for request in waiting) + items > MAX_ITEMS:
            return True
        return others + min(items, half) > room

    def _begin(self) -> None:
        """Begin as many batches as there are threads for."""
        while first := self._first():
            maker = first.maker
            free = [i for i in range(maker.threads) if i not in self._taken]
            if not free:
                return
            same = [request for request in self._waiting if request.maker is maker]
            items, threads = sum(request.left for request in same), free
            if self._taken or items >= len(free):  # Else all of them do it together.
                items, threads = min(maker.limit, math.ceil(items / len(free))), free[:1]
            self._taken.update(threads)
            self._doing += items
            batch = _batch(same, items)
            self._requeue(batch)
            task = asyncio.create_task(self._work(maker, batch, threads))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _requeue(self, batch: list[_Part[K, T]]) -> None:
        """Put those that want more behind all others, of other makers too; the first of them last.

        So each comes first in its turn, and then has more of the batch than those behind it.
        """
        for part in [*batch[1:], batch[0]]:
            if part.request.left:
                self._waiting.remove(part.request)
                self._waiting.append(part.request)

    def _first(self) -> _Request[K, T] | None:
        while self._waiting and not self._waiting[0].left:
            self._waiting.popleft()
        return self._waiting[0] if self._waiting else None

    async def _work(self, maker: K, batch: list[_Part[K, T]], threads: list[int]) -> None:
        items = sum(len(part.items) for part in batch)
        began = time.monotonic()
        backlog = sum(request.left for request in self._waiting if request.maker is maker)
        await self._do(maker, batch, threads)
        self._doing -= items
        self._taken.difference_update(threads)
        self.last_seconds = time.monotonic() - began
        self.note(maker, items, backlog, self.last_seconds)
        self._begin()

    async def _do(self, maker: K, batch: list[_Part[K, T]], threads: list[int]) -> None:
        items = [item for part in batch for item in part.items]
        thread, loop = self._thread(threads[0]), asyncio.get_running_loop()
        try:
            made = await loop.run_in_executor(thread, self.run, maker, items, len(threads))
        except Exception as error:
            if len(batch) > 1:  # Whose fault it was shows when each is done alone.
                for part in batch:
                    await self._do(maker, [part], threads)
            elif not batch[0].request.images.done():
                batch[0].request.images.set_exception(error)
            return
        start = 0
        for part in batch:
            part.request.keep(part.begin, made[start : start + len(part.items)])
            start += len(part.items)

    def _thread(self, number: int) -> ThreadPoolExecutor:
        while len(self._threads) <= number:
            self._threads.append(ThreadPoolExecutor(1, "batches"))
        return self._threads[number]


def _half(maker: Maker) -> int:
    """Items of half a batch, rounded up."""
    return math.ceil(maker.limit / 2)


def _batch(requests: list[_Request[K, T]], items: int) -> list[_Part[K, T]]:
    """The next items of requests, up to a number that is not more than they have.

    Half of them are of those that had a part of a batch before, and half of the others, who are
    served in the order in which they came. The odd one goes to either in turn: else whoever makes
    one image at a time would make those of an animation alone.
    """
    begun = [request for request in requests if request.left and request.begun]
    others = [request for request in requests if request.left and not request.begun]
    if not begun:
        return _take(others, items)
    half = (items + begun[0].owed) // 2
    begun[0].owed = bool(others) and not begun[0].owed
    parts = _take(begun, max(half, items - sum(request.left for request in others)))
    return parts + _take(others, items - sum(len(part.items) for part in parts))


def _take(requests: list[_Request[K, T]], items: int) -> list[_Part[K, T]]:
    """Up to a number of items: each request in turn has at most half of what is left, rounded up.

    The last has what it wants; if there are still some then, it goes round again.
    """
    taken = dict.fromkeys(requests, 0)
    while items and (wanting := [r for r in requests if taken[r] < r.left]):
        for request in wanting:
            most = items if request is wanting[-1] else math.ceil(items / 2)
            more = min(most, request.left - taken[request])
            taken[request] += more
            items -= more
    return [request.take(more) for request, more in taken.items() if more]
