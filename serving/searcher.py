"""The deployment that searches: inversion and super-resolution, seconds of work each.

It is apart from the sampler, whose clients would wait behind them. A search ends when its time is
up, with the best by then, and when nobody listens any more.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray import serve

from biggan.cluster import own_device
from biggan.inversion import Inversion, OnStep, Progress, Stop, invert, upscale
from biggan.models import load_generator
from biggan.networks import Generator
from biggan.parallel import CPU
from serving import background
from serving.schemas import MAX_SECONDS


@dataclass(frozen=True)
class Task:
    """What to search for."""

    version: str
    """NAME@VERSION of the model."""
    image: np.ndarray
    """uint8 `[H, W, C]`, of the model's resolution over `factor`."""
    factor: int
    """1 to invert, 2, 4 or 8 to upscale."""
    class_ids: tuple[int, ...] | None
    """Classes to start from; None: all."""
    candidates: int
    seed: int
    until: float
    """Time, in seconds since 1970, when the best so far is taken: waiting for a searcher counts."""


@dataclass(frozen=True)
class Result:
    """What was found."""

    inversion: Inversion
    steps: int
    """Taken."""
    finished: bool
    """Whether these are all; else time was up."""


class Searcher:
    """Searches, one at a time. Needs no Ray: `deployed` is what Serve runs."""

    def __init__(self, storage: str | None) -> None:
        """`storage` is the root of the store."""
        self.storage = storage
        self._models: dict[str, Generator] = {}
        self._thread = ThreadPoolExecutor(1, "search")
        self._begun = 0
        """Searches that are done or wait."""

    async def model(self, version: str) -> Generator:
        """A model NAME@VERSION, loaded when first asked for."""
        if version not in self._models:
            self._models[version] = await asyncio.to_thread(load, version, self.storage, CPU)
        return self._models[version]

    async def search(self, task: Task) -> AsyncGenerator[Progress | Result, None]:
        """How far a search is, from time to time, and last what it found.

        Nothing, if others took until its time was up; without others there is a step at least, even
        if the model was loaded for as long. Raises `UserError` for an image or class that the model
        does not take. Closed before its end, it ends the search.
        """
        G = await background.finish(self.model(task.version))
        loop, left = asyncio.get_running_loop(), threading.Event()
        told: asyncio.Queue[Progress | None] = asyncio.Queue()

        def tell(progress: Progress | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, progress)

        def stop() -> bool:
            return left.is_set() or time.time() > task.until

        work = self._thread.submit(_search, G, task, tell, stop)
        patience = task.until - time.time() if self._begun else MAX_SECONDS
        late = loop.call_later(patience, work.cancel)  # Only if it has not begun.
        self._begun += 1
        work.add_done_callback(lambda _: tell(None))
        try:
            last: Progress | None = None
            while progress := await told.get():
                last = progress
                yield progress
            if not work.cancelled():
                inversion = work.result()
                assert last  # There was a step at least, which was told.
                yield Result(inversion, last.step, last.step == last.steps)
        finally:
            left.set()
            self._begun -= 1
            late.cancel()
            work.cancel()  # If it has not begun; otherwise it sees that it is left.


def load(version: str, storage: str | None, device: torch.device) -> Generator:
    """A model NAME@VERSION."""
    return load_generator(version, root=storage, device=device)


def _search(G: Generator, task: Task, on_step: OnStep, stop: Stop) -> Inversion:
    options: dict[str, Any] = {
        "class_ids": task.class_ids,
        "candidates": task.candidates,
        "seed": task.seed,
        "on_step": on_step,
        "stop": stop,
    }
    if task.factor == 1:
        return invert(G, task.image, **options)
    return upscale(G, task.image, factor=task.factor, **options)


def deployed(max_models: int) -> type[Searcher]:
    """A `Searcher` for Ray Serve: models used least recently make room for others."""

    class DeployedSearcher(Searcher):
        @serve.multiplexed(max_num_models_per_replica=max_models)  # type: ignore[untyped-decorator]
        async def model(self, version: str) -> Generator:
            return await asyncio.to_thread(load, version, self.storage, own_device())

    return DeployedSearcher
