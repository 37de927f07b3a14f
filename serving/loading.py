"""Models in memory: warmed up, and knowing how many images they make in the time of a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from biggan.directions import Directions, find_directions
from biggan.models import load_generator
from biggan.networks import Generator
from biggan.recipe import Recipe
from biggan.synthesis import synthesize
from serving.batching import Demand
from serving.rendering import Renderer, Rendering
from serving.schemas import MAX_IMAGES

BATCH_SECONDS = 0.05
"""A batch is as large as the model makes in this time, for a request waits for up to two.

On a CPU it is the time of the core. Where others take it too, smaller batches would only make
images dearer, and have more requests turned away, which takes of the core as well."""
MAX_BATCH_IMAGES = 4 * MAX_IMAGES
LARGE_SECONDS = 0.005
"""A model that takes longer for an image computes with several threads. Two save a part of 10 ms,
and nothing of 1.2: they wait for each other at every layer (`benchmarks/README.md`)."""


@dataclass
class Pace:
    """How many images a model makes in `BATCH_SECONDS`, as it turns out."""

    cost: float = BATCH_SECONDS
    """Seconds that an image takes, in a batch of as many as there should be."""

    @property
    def limit(self) -> int:
        """Images of the largest batch."""
        return min(MAX_BATCH_IMAGES, max(1, int(BATCH_SECONDS / self.cost)))

    def note(self, images: int, seconds: float) -> None:
        """Learn from a batch that is half full at least; a little, for some are slow by chance."""
        if 2 * images >= self.limit:
            self.cost *= (max(seconds, 1e-9) / images / self.cost) ** 0.1


class Loaded:
    """A model version in memory."""

    def __init__(
        self, G: Generator, directions: Directions, renderer: Renderer, version: str = ""
    ) -> None:
        """`renderer` computes images of `G`, which `directions` change.

        `version` is its NAME@VERSION, by which it is counted.
        """
        self.G, self.directions, self.renderer = G, directions, renderer
        self.version = version
        self.pace, self.demand = Pace(), Demand()
        self._clock = time.thread_time if G.device.type == "cpu" else time.perf_counter
        self.threads = 1
        """Batches that are done at once, each in a thread of its own: threads that share a layer
        wait for each other at its end, and for as long as a gateway takes a core from one of
        them."""

    @property
    def limit(self) -> int:
        """Images of the largest batch that the pace allows, padding included."""
        return self.renderer.fits(self.pace.limit)

    @property
    def room(self) -> int:
        """The most images in hand: a batch of each thread, and those that wait.

        These are another batch; of several threads more: their batches end one by one, and those
        who had the images of one are not back for the next. But where more is turned away than made
        there is always somebody, so that nobody need wait for long (`benchmarks/README.md`).
        """
        waiting = max(0.5, (2 * self.threads - 1) / max(1.0, self.demand.excess))
        return math.ceil(self.limit * (self.threads + waiting))

    def make(self, recipes: Sequence[Recipe], threads: int = 1) -> tuple[np.ndarray, float]:
        """The images of a batch, and the seconds that it took; the pace is learned from them."""
        torch.set_num_threads(threads)  # Of the calling thread.
        began = self._clock()
        images = synthesize(self.G, recipes, self.directions, self.renderer)
        seconds = self._clock() - began
        if threads == 1:  # The pace is that of a thread.
            self.pace.note(len(recipes), seconds)
        return images, seconds

    def least_seconds(self, recipes: Sequence[Recipe]) -> float:
        """What a batch takes, at the least of a few times: the first of a size is slow."""
        return min(self.make(recipes)[1] for _ in range(4))


def load_model(
    version: str,
    storage: str | None,
    device: torch.device,
    rendering: Rendering,
    threads: int,
) -> Loaded:
    """Load a model NAME@VERSION, and find out how many images it makes in `BATCH_SECONDS`.

    That also warms it up, and compiles it if `rendering` has it so: the first batch of a size is
    slow. Of later batches none is of a size that was not compiled here. On a CPU a large model
    computes with `threads` threads.
    """
    G = load_generator(version, root=storage, device=device)
    directions = find_directions(G)
    G.freeze()
    # On a CPU, too, 1.2 times as quick in batches of 16 at 64 pixels (`benchmarks/README.md`).
    G.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if G.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # Its 10 bits would be told from float32.
    recipes = [Recipe(classes={0: 1.0}, seed=0)]
    loaded = Loaded(G, directions, Renderer(G, rendering), version)
    plain = G.device.type == "cpu" and not loaded.renderer.compiled
    if plain and loaded.least_seconds(recipes) > LARGE_SECONDS:
        loaded.threads = threads
    while len(recipes) <= MAX_BATCH_IMAGES:
        loaded.renderer.prepare(len(recipes))
        seconds = loaded.least_seconds(recipes)
        loaded.pace.cost = seconds / len(recipes)
        if seconds > BATCH_SECONDS:
            break
        recipes = 2 * recipes
    return loaded
