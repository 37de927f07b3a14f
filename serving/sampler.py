"""The deployment that holds the model: samples in batches, and follows the store's aliases."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass

import numpy as np
import torch
from ray import serve

from biggan.classes import UnknownClassError, class_id
from biggan.cluster import own_device
from biggan.errors import UserError
from biggan.models import ModelCard, find_model, load_card, load_generator
from biggan.networks import Generator
from biggan.storage import Folder
from serving.schemas import MAX_IMAGES

logger = logging.getLogger("ray.serve")

MAX_BATCH_IMAGES = 4 * MAX_IMAGES
BATCH_WAIT_SECONDS = 0.002
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class SampleRequest:
    """Images of one class, from consecutive seeds."""

    class_: str | int
    seed: int
    n: int
    truncation: float | None


@dataclass(frozen=True)
class Samples:
    """Images, and what they were made with."""

    images: np.ndarray
    """uint8 `[n, H, W, C]`."""
    model: str
    class_id: int
    class_name: str


@dataclass(frozen=True)
class Refusal:
    """Why the model that is served cannot do a request."""

    field: str
    value: str | int | float | None
    reason: str


@dataclass(frozen=True)
class Description:
    """What is to be known of the model that is served."""

    card: ModelCard
    resolution: int
    channels: int
    class_names: list[str]

    @property
    def name(self) -> str:
        """NAME@VERSION."""
        return f"{self.card.name}@{self.card.version}"


@dataclass(frozen=True)
class Served:
    """A model version in memory."""

    folder: Folder
    G: Generator
    description: Description


@dataclass(frozen=True)
class Draw:
    """What the images of a request are made from."""

    z: torch.Tensor
    """`[n, z_dim]`."""
    class_id: int
    truncation: float | None


def _total(requests: list[SampleRequest]) -> int:
    return sum(request.n for request in requests)


@serve.deployment
class Sampler:
    """Generates images with the model that a reference such as `digits@best` names by now."""

    def __init__(self, model: str, storage: str | None) -> None:
        """Load the model, and watch for the reference to name another version."""
        self.model, self.storage = model, storage
        self.served = self._load()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._stop = threading.Event()
        self._watcher.start()

    def __del__(self) -> None:
        if hasattr(self, "_stop"):
            self._stop.set()

    def _load(self) -> Served:
        folder = find_model(self.model, self.storage)
        G = load_generator(folder.uri, device=own_device())
        G.sample([0], truncation=None)  # The first call is slow; better here than for a client.
        about = Description(load_card(folder), G.resolution, G.channels, G.class_names)
        return Served(folder, G, about)

    def _watch(self) -> None:
        """Swap in another version once the alias names one; requests in flight keep theirs."""
        while not self._stop.wait(POLL_SECONDS):
            try:
                if find_model(self.model, self.storage) != self.served.folder:
                    self.served = self._load()
                    logger.info("now serving %s", self.served.description.name)
            except Exception:  # A store that cannot be read for a while must not end the service.
                logger.exception(
                    "cannot follow %s; still serving %s", self.model, self.served.description.name
                )

    async def sample(self, request: SampleRequest) -> Samples | Refusal:
        """Generate images, together with what other requests ask for at the moment."""
        return await self._batch(request)

    @serve.batch(
        max_batch_size=MAX_BATCH_IMAGES,
        batch_wait_timeout_s=BATCH_WAIT_SECONDS,
        batch_size_fn=_total,
    )
    async def _batch(self, requests: list[SampleRequest]) -> list[Samples | Refusal]:
        return await asyncio.to_thread(self._generate, requests)

    def _generate(self, requests: list[SampleRequest]) -> list[Samples | Refusal]:
        served = self.served
        drawn = [_draw(served.G, request) for request in requests]
        groups = iter(_images(served.G, [draw for draw in drawn if isinstance(draw, Draw)]))
        return [
            draw
            if isinstance(draw, Refusal)
            else Samples(
                next(groups),
                served.description.name,
                draw.class_id,
                served.G.class_names[draw.class_id],
            )
            for draw in drawn
        ]

    def describe(self) -> Description:
        """What is served by now."""
        return self.served.description


def _draw(G: Generator, request: SampleRequest) -> Draw | Refusal:
    """What a request comes down to with this model."""
    try:
        found = class_id(request.class_, G.class_names)
    except UnknownClassError as error:
        return Refusal("class", request.class_, str(error))
    try:
        z = G.latents(range(request.seed, request.seed + request.n), request.truncation)
    except UserError as error:  # Seeds in the schema's bounds fit every model.
        return Refusal("truncation", request.truncation, str(error))
    return Draw(z, found, request.truncation)


def _images(G: Generator, draws: list[Draw]) -> list[np.ndarray]:
    """The images of several requests, made together."""
    if not draws:
        return []
    z = torch.cat([draw.z for draw in draws])
    ids = torch.cat([torch.full((len(draw.z),), draw.class_id) for draw in draws])
    truncations = [draw.truncation for draw in draws for _ in draw.z]
    ends = np.cumsum([len(draw.z) for draw in draws])[:-1]
    return np.split(G.render(z, ids, truncations), ends)
