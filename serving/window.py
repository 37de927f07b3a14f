"""How much a gateway may ask of samplers at once, learned from what they turn away.

To be turned away by a sampler takes a call to it, which waits behind the work that it is about, and
costs time that this work needs. So a gateway remembers how much they took, and turns away the rest
by itself; it asks for a little more as time goes on, as TCP does for its window (Jacobson 1988).
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np

from serving.batching import Busy, Demand

Answer = np.ndarray | Busy

CROWDED_SECONDS = 5.0
"""So long after one was turned away, requests may go to samplers that are yet to load the model."""


class Window:
    """The images that may be asked for at once: more as images come, fewer when it was too many."""

    def __init__(self) -> None:
        self.limit = math.inf
        self.asked = 0
        self.turned_away = 0
        """Images that were not asked for, for samplers to be told, of which more may be needed."""
        self.demand = Demand()
        self._busy = Busy(0.0)
        self._crowded = -math.inf

    @property
    def crowded(self) -> bool:
        """Whether something was turned away of late."""
        return time.monotonic() - self._crowded < CROWDED_SECONDS

    def full(self, images: int, others: int = 0) -> Busy | None:
        """That there is no room for so many images, if so; samplers are told of them.

        And of `others`, which were turned away before. A request is turned away for what is asked
        already, whatever its own size: if samplers have no room for as many, they say so
        themselves.
        """
        full = self.asked + 1 > self.limit
        if turned_away := others + (images if full else 0):
            self.turned_away += turned_away
            self.demand.turn_away(turned_away)
            self._crowded = time.monotonic()
        return replace(self._busy, many=self.demand.excess > 1) if full else None

    async def ask(self, images: int, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """What `call` gives for so many images, or that there is no room for them."""
        if busy := self.full(images):
            return busy
        before = self.asked
        self.asked += images
        try:
            answer = await call()
        finally:
            self.asked -= images
        if isinstance(answer, Busy):
            self.demand.turn_away(images)
            # Not of what is asked now: the answer comes together with images of the same call.
            # Nor is it known how many fewer images of a large request there would be room for.
            self._crowded = time.monotonic()
            self.limit, self._busy = min(self.limit, max(before, images)), answer
            return answer
        self.demand.make(images)
        if 2 * (self.asked + images) > self.limit:  # Of use, at least in half.
            self.limit += images / self.limit  # By one in the time that takes to make them all.
        return answer
