"""Calls to another process that carry what several requests ask of it.

A call costs more than what most requests ask for. So while calls are under way, requests wait for
each other, and go together; one that finds none under way goes at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from serving import background

T = TypeVar("T")
R = TypeVar("R")

UNDER_WAY = 2
"""Calls after which requests wait for each other: one is worked on, the other is there by then."""
PATIENCE_SECONDS = 0.01
"""They wait no longer: where calls are slow their cost is nothing, and others may be idle."""


class Coalescer(Generic[T, R]):
    """Asks for requests together."""

    def __init__(self, call: Callable[[list[T]], Awaitable[Sequence[R | BaseException]]]) -> None:
        """`call` asks for several at once, and gives the answer, or error, of each."""
        self.call = call
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def ask(self, item: T) -> R:
        """The answer to one request; raises its error."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()
        self._waiting.append((item, answer))
        if len(self._calls) < UNDER_WAY:
            self._go()
        elif self._timer is None:
            self._timer = loop.call_later(PATIENCE_SECONDS, self._go)
        return await answer

    def _go(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        together = [(item, answer) for item, answer in self._waiting if not answer.done()]
        self._waiting = []
        if together:
            call = background.begin(self._ask(together))
            self._calls.add(call)
            call.add_done_callback(self._end)

    def _end(self, call: asyncio.Task[None]) -> None:
        self._calls.remove(call)
        if len(self._calls) < UNDER_WAY:
            self._go()

    async def _ask(self, together: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self.call([item for item, _ in together])
        except Exception as error:
            results = [error] * len(together)
        except asyncio.CancelledError:  # Not by those who wait for the answers.
            results = [ConnectionError("the call was cancelled")] * len(together)
        for (_, answer), result in zip(together, results, strict=True):
            if answer.done():  # The request was cancelled.
                continue
            if isinstance(result, BaseException):
                answer.set_exception(result)
            else:
                answer.set_result(result)
