"""The deployment that holds generators and makes images of recipes, in batches."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from biggan.cluster import own_device
from biggan.directions import Directions
from biggan.errors import UserError
from biggan.interpolation import walk
from biggan.memory import keep_freed_memory
from biggan.parallel import CPU
from biggan.recipe import Recipe
from biggan.synthesis import embeddings
from serving import background
from serving.batching import Batcher, Busy
from serving.catalogue import Catalogue
from serving.ledger import Batch, Reporter
from serving.loading import Loaded, load_model
from serving.rendering import DEFAULT, Rendering

logger = logging.getLogger("ray.serve")


class Sampler:
    """Makes images with the models of a store. Needs no Ray: `deployed` is what Serve runs."""

    def __init__(
        self,
        storage: str | None,
        reporter: Reporter | None = None,
        rendering: Rendering = DEFAULT,
        threads: int = 1,
    ) -> None:
        """`storage` is the root of the store; `reporter` is told of every batch.

        On a CPU models compute with up to `threads` threads.
        """
        self.storage, self.reporter = storage, reporter
        self.rendering, self.threads = rendering, threads
        self.name = uuid.uuid4().hex[:8]
        self._models: dict[str, Loaded] = {}
        self._loading = asyncio.Lock()
        self._batcher: Batcher[Loaded, Recipe] = Batcher(_make, self._note)
        self._work, self._since = 0.0, time.monotonic()
        self._following: asyncio.Task[None] | None = None

    def _note(self, model: Loaded, images: int, backlog: int, seconds: float) -> None:
        # A batch that is half full is half the work: as many again would take little longer.
        self._work += min(1.0, images / model.limit) * seconds / model.threads
        model.demand.make(images)
        if self.reporter:
            self.reporter.add(Batch(self.name, model.version, images, backlog))

    def _turned_away(self, model: Loaded, images: int) -> None:
        self._work += self._batcher.last_seconds * images / (model.limit * model.threads)
        model.demand.turn_away(images)

    async def model(self, version: str) -> Loaded:
        """A model NAME@VERSION, loaded when first asked for."""
        async with self._loading:
            if version not in self._models:
                self._models[version] = await self._load(version, CPU)
        return self._models[version]

    async def _whole(self, version: str) -> Loaded:
        """A model, which is loaded to the end though whoever asked may leave.

        The next who asks would have it loaded anew, and beside the former.
        """
        return await background.finish(self.model(version))

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Load what most requests will want; Serve calls this before it sends the first.

        And, from then on, the versions that aliases move to. A gateway lets one take over when the
        first sampler has it, and where it is compiled that takes minutes, for which the requests
        that the others get would wait. `config` has `models`, `canary` and `max_models` as an
        `EndpointConfig` has them.
        """
        catalogue = Catalogue(config["models"], config["canary"], self.storage, self.model)
        current = await catalogue.current()
        versions = list(dict.fromkeys(current.values()))[: config["max_models"]]
        for version in reversed(versions):
            try:
                await self.model(version)
            except UserError:
                logger.exception("%s is not loaded", version)
        if self._following:
            self._following.cancel()
        kept = [alias for alias, version in current.items() if version in versions]
        self._following = background.begin(catalogue.keep(kept))

    async def _load(self, version: str, device: torch.device) -> Loaded:
        # In a thread that ends: as long as it lives OpenMP keeps workers for it, and lets those of
        # all threads sleep at barriers, being more than cores: images then take twice as long.
        thread = ThreadPoolExecutor(1, "load")
        try:
            return await asyncio.get_running_loop().run_in_executor(
                thread, load_model, version, self.storage, device, self.rendering, self.threads
            )
        finally:
            thread.shutdown(wait=False)

    def full(self, version: str, images: int, others: int) -> Busy | None:  # noqa: ARG002
        """Nothing: whether there is room shows when `synthesize` is asked."""
        return None

    async def synthesize(self, version: str, recipes: Sequence[Recipe]) -> np.ndarray | Busy:
        """The images of recipes, by model NAME@VERSION: uint8 `[N, H, W, C]`; or `Busy`.

        Raises `UserError` for what the model cannot do, `StorageError` if it is not there.
        """
        return await self._submit(await self._whole(version), recipes)

    async def _submit(self, model: Loaded, recipes: Sequence[Recipe]) -> np.ndarray | Busy:
        images = await self._batcher.submit(model, recipes)
        if isinstance(images, Busy):
            self._turned_away(model, len(recipes))
        return images

    async def synthesize_all(
        self, version: str, wanted: Sequence[Sequence[Recipe]], turned_away: int = 0
    ) -> list[np.ndarray | Busy | BaseException]:
        """The answers, or errors, of `synthesize` to several requests, in their order.

        `turned_away` images were wanted too, but not asked for: they count as work.
        """
        model = await self._whole(version)  # Once, for all; its error is that of all.
        self._turned_away(model, turned_away)
        requests = (self._submit(model, recipes) for recipes in wanted)
        return await asyncio.gather(*requests, return_exceptions=True)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """`work` asked for since the last call, turned away or not, as part of what can be done."""
        now = time.monotonic()
        work, since = self._work, self._since
        self._work, self._since = 0.0, now
        return {"work": work / max(now - since, 1e-3)}

    async def directions(self, version: str) -> Directions:
        """The directions of a model NAME@VERSION, which is loaded by then."""
        return (await self._whole(version)).directions

    async def walk(
        self, version: str, stops: Sequence[Recipe], frames: int, loop: bool
    ) -> list[Recipe]:
        """The recipes of the frames between images (`biggan.interpolation.walk`)."""
        model = await self._whole(version)
        return walk(model.G, stops, frames, model.directions, loop=loop)

    async def embedding(self, version: str, classes: Mapping[int, float]) -> list[float]:
        """The embedding of a mixture of classes."""
        recipe = Recipe(classes=dict(classes), seed=0)
        y: list[float] = embeddings((await self._whole(version)).G, [recipe])[0].tolist()
        return y


def _make(model: Loaded, recipes: list[Recipe], threads: int) -> np.ndarray:
    images, _ = model.make(recipes, threads)
    return images


def deployed(max_models: int) -> type[Sampler]:
    """A `Sampler` for Ray Serve: models used least recently make room for others.

    Serve routes a request to a replica that has its model, where there is one.
    """

    class DeployedSampler(Sampler):
        def __init__(
            self,
            storage: str | None,
            ledger: DeploymentHandle[Any],
            rendering: Rendering,
            threads: int,
        ) -> None:
            super().__init__(storage, Reporter(ledger.record.remote), rendering, threads)
            if own_device().type == "cpu":
                keep_freed_memory()  # Page faults took a fifth of some batches.

        @serve.multiplexed(max_num_models_per_replica=max_models)  # type: ignore[untyped-decorator]
        async def model(self, version: str) -> Loaded:
            return await self._load(version, own_device())

    return DeployedSampler
