"""The application: gateways in front of samplers, each scaling on its own.

`serve run serving.app:build models='[digits@best]'`, `serve deploy serving/serve.yaml` and
`python -m serving` all build it from an `EndpointConfig`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from biggan.directions import Directions
from biggan.inversion import Progress
from biggan.models import split_reference
from biggan.recipe import Recipe
from serving.api import create_api
from serving.batching import Busy
from serving.catalogue import Catalogue
from serving.keys import Key, Keys
from serving.ledger import Batch, Ledger, Reporter, Served
from serving.limits import Admission, Refusal
from serving.rendering import Precision, Rendering
from serving.sampler import MAX_BATCH_IMAGES
from serving.sampler import deployed as samplers
from serving.scaling import by_work
from serving.schemas import Observed
from serving.searcher import Result, Task
from serving.searcher import deployed as searchers
from serving.service import Service, too_busy


class EndpointConfig(BaseModel):
    """What an endpoint serves, and how far it scales."""

    model_config = ConfigDict(extra="forbid")

    models: tuple[str, ...] = Field(("digits@best",), min_length=1)
    """NAME or NAME@ALIAS in the model store, the first for requests that name none. Aliases are
    followed when they move; every version of a NAME can be asked for."""
    canary: dict[str, float] = {}
    """Weights of NAME@ALIAS by which requests for NAME alone are shared: digits@best 95
    digits@candidate 5."""
    no_auth: bool = False
    """Let everybody in who reaches the endpoint; only where it listens on this machine alone."""
    storage: str | None = None
    """Storage root; by default $BIGGAN_STORAGE, else ./storage."""
    max_models: int = Field(3, ge=1)
    """Models that a replica keeps in memory; those used least recently make room."""
    min_replicas: int = Field(1, ge=0)
    """Samplers at rest; with 0 the first request after a rest waits until one has started."""
    max_replicas: int = Field(4, ge=1)
    """Samplers under load."""
    cpus_per_replica: float = Field(1.0, gt=0)
    """CPU cores that a sampler computes with."""
    gpus_per_replica: float = Field(0.0, ge=0)
    """GPUs, or the part of one, that a sampler takes."""
    precision: Precision = "float32"
    """What samplers compute in. float32 makes every image again to within one grey level, as
    /v1/verify and `jobs/generate.py --reproduce` expect; bf16 is off by more here and there, so
    that they may call its images altered."""
    compiled: bool | None = None
    """Whether samplers compile models before they serve them; None: on a GPU. On a CPU it takes
    minutes and costs more than it gives."""
    min_searchers: int = Field(0, ge=0)
    """Searchers at rest, for inversion and super-resolution; with 0 the first search waits."""
    max_searchers: int = Field(2, ge=1)
    """Searchers under load, which have half the cores of a sampler, and as much of a GPU."""
    idle_seconds: float = Field(300.0, gt=0)
    """After so long with less load, copies that are not needed leave."""
    max_gateways: int = Field(4, ge=1)
    """Gateways under load; there is always one."""

    @model_validator(mode="after")
    def _check(self) -> EndpointConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas = {self.min_replicas}: must not exceed max_replicas ="
                f" {self.max_replicas}"
            )
        served = {split_reference(reference)[0] for reference in self.models}
        for reference, weight in self.canary.items():
            if split_reference(reference)[0] not in served:
                raise ValueError(f"canary {reference}: none of models is of that name")
            if not 0 < weight < float("inf"):
                raise ValueError(f"canary {reference} = {weight}: must be above 0")
        return self


# `/metrics` counts requests; a line each would cost more time than many of them do.
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)

GATEWAY_CPUS = 0.1
BY_WORK = AutoscalingPolicy(policy_function=by_work)


class RemoteSampler:
    """The sampler deployment, as a `serving.service.Painter`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle

    async def synthesize(self, version: str, recipes: Sequence[Recipe]) -> np.ndarray | Busy:
        """See `Sampler.synthesize`."""
        images: np.ndarray | Busy = await self._ask("synthesize", version, recipes)
        return images

    async def walk(
        self, version: str, stops: Sequence[Recipe], frames: int, loop: bool
    ) -> list[Recipe]:
        """See `Sampler.walk`."""
        recipes: list[Recipe] = await self._ask("walk", version, stops, frames, loop)
        return recipes

    async def embedding(self, version: str, classes: Mapping[int, float]) -> list[float]:
        """See `Sampler.embedding`."""
        y: list[float] = await self._ask("embedding", version, classes)
        return y

    async def directions(self, version: str) -> Directions:
        """See `Sampler.directions`."""
        directions: Directions = await self._ask("directions", version)
        return directions

    async def _ask(self, method: str, version: str, *arguments: Any) -> Any:
        # The model's id lets Serve choose a replica that has the model in memory.
        handle = self.handle.options(multiplexed_model_id=version)
        for _ in range(2):  # Recipes give the same images elsewhere, if a sampler dies of one.
            try:
                return await getattr(handle, method).remote(version, *arguments)
            except BackPressureError:
                break
            except RayActorError:
                continue
        raise too_busy()


class RemoteSearcher:
    """The searcher deployment, as a `serving.service.Seeker`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle

    async def search(self, task: Task) -> AsyncGenerator[Progress | Result, None]:
        """See `Searcher.search`."""
        handle = self.handle.options(multiplexed_model_id=task.version, stream=True)
        news: Any = handle.search.remote(task)
        try:
            async for item in news:
                yield item
        except BackPressureError:
            raise too_busy() from None
        finally:
            news.cancel()  # Nothing, if it has ended.


class RemoteLedger:
    """The ledger deployment, as a `serving.service.Counts`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle

    async def record(self, events: list[Served | Batch]) -> None:
        """See `Ledger.record`."""
        await self.handle.record.remote(events)

    async def observed(self) -> dict[str, Observed]:
        """See `Ledger.observed`."""
        observed: dict[str, Observed] = await self.handle.observed.remote()
        return observed

    async def take(self, key: Key, images: int) -> Admission | Refusal:
        """See `Ledger.take`."""
        answer: Admission | Refusal = await self.handle.take.remote(key, images)
        return answer

    async def give_back(self, key: Key, images: int) -> None:
        """See `Ledger.give_back`."""
        await self.handle.give_back.remote(key, images)

    async def metrics(self) -> bytes:
        """See `Ledger.metrics`."""
        metrics: bytes = await self.handle.metrics.remote()
        return metrics


@serve.deployment(max_ongoing_requests=1024, logging_config=QUIET)
@serve.ingress()
class Gateway:
    """Checks requests, has them sampled, and encodes the images. Holds no model."""

    def __init__(
        self,
        config: EndpointConfig,
        sampler: DeploymentHandle[Any],
        searcher: DeploymentHandle[Any],
        ledger: DeploymentHandle[Any],
    ) -> None:
        """`sampler`, `searcher` and `ledger` are the handles of those deployments."""
        painter, counts = RemoteSampler(sampler), RemoteLedger(ledger)
        catalogue = Catalogue(config.models, config.canary, config.storage, painter.directions)
        self.service = Service(catalogue, painter, RemoteSearcher(searcher), counts)
        self.reporter = Reporter(counts.record)
        self.keys = None if config.no_auth else Keys(config.storage)
        if self.keys:
            self.keys.start()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The HTTP interface."""
        return create_api(self.service, self.reporter, self.keys)


def _scaling(
    config: EndpointConfig, least: int, most: int, ongoing: int = 1, **policy: Any
) -> AutoscalingConfig:
    """From `least` to `most` copies, so that each has about `ongoing` requests in hand."""
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=ongoing,
        upscale_delay_s=5,
        downscale_delay_s=config.idle_seconds,
        **policy,
    )


def _surge(config: EndpointConfig) -> int:
    """Of copies, the percentage that an update may start before it ends those that they replace.

    Rounded up, 1 is one: the only copy serves until another does. Where the cluster has no room
    for one, it has to leave first, and requests wait for its successor.
    """
    if not ray.is_initialized():
        return 1
    room = ray.available_resources()
    return int(
        room.get("CPU", 0) >= config.cpus_per_replica + GATEWAY_CPUS
        and room.get("GPU", 0) >= config.gpus_per_replica
    )


def build(config: EndpointConfig) -> serve.Application:
    """The application that serves `config.models`."""
    surge = _surge(config)
    # Never two at once: quotas are counted in one place.
    ledger = serve.deployment(ray_actor_options={"num_cpus": 0}, logging_config=QUIET)(Ledger).bind(
        config.storage
    )
    sampler = serve.deployment(
        name="Sampler",
        logging_config=QUIET,
        max_ongoing_requests=2 * MAX_BATCH_IMAGES,
        max_queued_requests=4 * MAX_BATCH_IMAGES,
        autoscaling_config=_scaling(
            config, config.min_replicas, config.max_replicas, policy=BY_WORK
        ),
        max_surge_percent=surge,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
        },
    )(samplers(config.max_models)).bind(
        config.storage, ledger, Rendering(config.precision, config.compiled)
    )
    searcher = serve.deployment(
        name="Searcher",
        logging_config=QUIET,
        max_ongoing_requests=2,  # One that is worked on, and one that waits.
        max_queued_requests=8,
        autoscaling_config=_scaling(config, config.min_searchers, config.max_searchers, 1),
        ray_actor_options={
            # Less than a core, for two cores to hold a sampler, a searcher and a gateway.
            "num_cpus": config.cpus_per_replica / 2,
            "num_gpus": config.gpus_per_replica,
        },
    )(searchers(config.max_models)).bind(config.storage)
    gateway = Gateway.options(  # type: ignore[attr-defined]  # The decorator hides its type.
        autoscaling_config=_scaling(config, 1, config.max_gateways, 64),
        max_surge_percent=surge,
        ray_actor_options={"num_cpus": GATEWAY_CPUS},
    )
    application: serve.Application = gateway.bind(config, sampler, searcher, ledger)
    return application
