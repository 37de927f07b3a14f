"""The deployment that holds generators and makes images of recipes, in batches."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from biggan.cluster import own_device
from biggan.directions import Directions, find_directions
from biggan.interpolation import walk
from biggan.models import load_generator
from biggan.networks import Generator
from biggan.parallel import CPU
from biggan.recipe import Recipe
from biggan.synthesis import embeddings, synthesize
from serving.batching import Batcher, Busy
from serving.ledger import Batch, Reporter
from serving.rendering import DEFAULT, Renderer, Rendering
from serving.schemas import MAX_IMAGES

BATCH_SECONDS = 0.1
"""A batch is as large as the model makes in this time, for a request waits for up to two."""
MAX_BATCH_IMAGES = 4 * MAX_IMAGES


@dataclass
class Pace:
    """How many images a model makes in `BATCH_SECONDS`, as it turns out."""

    limit: int = 1
    """Images of the largest batch; a request of more is a batch of its own."""

    def note(self, images: int, seconds: float) -> None:
        """Learn from a batch: a tenth less after a slow one, more after one at least half full."""
        if seconds > BATCH_SECONDS:
            self.limit = max(1, min(self.limit, int(0.9 * self.limit)))
        elif 2 * images >= self.limit:
            self.limit = min(MAX_BATCH_IMAGES, max(self.limit + 1, int(1.1 * self.limit)))


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model version in memory."""

    G: Generator
    directions: Directions
    pace: Pace
    renderer: Renderer

    @property
    def limit(self) -> int:
        """Images of the largest batch that the pace allows, padding included."""
        return self.renderer.fits(self.pace.limit)


class Sampler:
    """Makes images with the models of a store. Needs no Ray: `deployed` is what Serve runs."""

    def __init__(
        self,
        storage: str | None,
        reporter: Reporter | None = None,
        rendering: Rendering = DEFAULT,
    ) -> None:
        """`storage` is the root of the store; `reporter` is told of every batch."""
        self.storage, self.reporter, self.rendering = storage, reporter, rendering
        self.name = uuid.uuid4().hex[:8]
        self._models: dict[str, Loaded] = {}
        self._batcher: Batcher[tuple[str, Loaded], Recipe] = Batcher(
            self._make, lambda model: model[1].limit, self._note
        )
        self._work, self._since = 0.0, time.monotonic()

    def _note(self, images: int, backlog: int) -> None:
        if self.reporter:
            self.reporter.add(Batch(self.name, images, backlog))

    async def model(self, version: str) -> Loaded:
        """A model NAME@VERSION, loaded when first asked for."""
        if version not in self._models:
            self._models[version] = await self._load(version, CPU)
        return self._models[version]

    async def _load(self, version: str, device: torch.device) -> Loaded:
        return await asyncio.to_thread(load_model, version, self.storage, device, self.rendering)

    async def synthesize(self, version: str, recipes: Sequence[Recipe]) -> np.ndarray | Busy:
        """The images of recipes, by model NAME@VERSION: uint8 `[N, H, W, C]`; or `Busy`.

        Raises `UserError` for what the model cannot do, `StorageError` if it is not there.
        """
        model = await self.model(version)
        images = await self._batcher.submit((version, model), recipes)
        if isinstance(images, Busy):
            self._work += images.seconds * len(recipes) / model.limit
        return images

    def _make(self, model: tuple[str, Loaded], recipes: list[Recipe]) -> np.ndarray:
        # A batch that is half full is half the work: as many again would take little longer.
        full = min(1.0, len(recipes) / model[1].limit)
        began = time.monotonic()
        images = _make(model, recipes)
        self._work += full * (time.monotonic() - began)
        return images

    def record_autoscaling_stats(self) -> dict[str, float]:
        """`work` asked for since the last call, turned away or not, as part of what can be done."""
        now = time.monotonic()
        work, since = self._work, self._since
        self._work, self._since = 0.0, now
        return {"work": work / max(now - since, 1e-3)}

    async def directions(self, version: str) -> Directions:
        """The directions of a model NAME@VERSION, which is loaded by then."""
        return (await self.model(version)).directions

    async def walk(
        self, version: str, stops: Sequence[Recipe], frames: int, loop: bool
    ) -> list[Recipe]:
        """The recipes of the frames between images (`biggan.interpolation.walk`)."""
        model = await self.model(version)
        return walk(model.G, stops, frames, model.directions, loop=loop)

    async def embedding(self, version: str, classes: Mapping[int, float]) -> list[float]:
        """The embedding of a mixture of classes."""
        recipe = Recipe(classes=dict(classes), seed=0)
        y: list[float] = embeddings((await self.model(version)).G, [recipe])[0].tolist()
        return y


def load_model(
    version: str, storage: str | None, device: torch.device, rendering: Rendering
) -> Loaded:
    """Load a model NAME@VERSION, and find out how many images it makes in `BATCH_SECONDS`.

    That also warms it up, and compiles it if `rendering` has it so: the first batch of a size is
    slow. Of later batches none is of a size that was not compiled here.
    """
    G = load_generator(version, root=storage, device=device)
    directions = find_directions(G)
    G.fold_spectral_norms()  # Nothing is left to be estimated in a forward.
    if G.device.type == "cuda":
        G.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.backends.cudnn.allow_tf32 = False  # Its 10 bits would be told from float32.
    loaded = Loaded(G, directions, Pace(), Renderer(G, rendering))
    recipes = [Recipe(classes={0: 1.0}, seed=0)]
    while len(recipes) <= MAX_BATCH_IMAGES:
        loaded.renderer.prepare(len(recipes))
        _make((version, loaded), recipes)  # The first of a size is slow, and the second counts.
        loaded.pace.limit = len(recipes)
        began = time.perf_counter()
        _make((version, loaded), recipes)
        if time.perf_counter() - began > BATCH_SECONDS:
            break
        recipes = 2 * recipes
    return loaded


def _make(model: tuple[str, Loaded], recipes: list[Recipe]) -> np.ndarray:
    began = time.perf_counter()
    loaded = model[1]
    images = synthesize(loaded.G, recipes, loaded.directions, loaded.renderer)
    loaded.pace.note(len(recipes), time.perf_counter() - began)
    return images


def deployed(max_models: int) -> type[Sampler]:
    """A `Sampler` for Ray Serve: models used least recently make room for others.

    Serve routes a request to a replica that has its model, where there is one.
    """

    class DeployedSampler(Sampler):
        def __init__(
            self, storage: str | None, ledger: DeploymentHandle[Any], rendering: Rendering
        ) -> None:
            super().__init__(storage, Reporter(ledger.record.remote), rendering)

        @serve.multiplexed(max_num_models_per_replica=max_models)  # type: ignore[untyped-decorator]
        async def model(self, version: str) -> Loaded:
            return await self._load(version, own_device())

    return DeployedSampler
