"""The application: gateways in front of samplers, each scaling on its own.

`serve deploy serving/serve.yaml`, a RayService and `python -m serving` build it from an
`EndpointConfig`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from biggan.directions import Directions
from biggan.inversion import Progress
from biggan.recipe import Recipe
from serving.api import create_api
from serving.batching import SMALL, Busy
from serving.catalogue import Catalogue
from serving.coalescing import Coalescer
from serving.config import EndpointConfig
from serving.door import check_exposure
from serving.keys import Key, Keys
from serving.ledger import Event, Ledger, Reporter
from serving.limits import Admission, Refusal
from serving.loading import MAX_BATCH_IMAGES
from serving.rendering import Rendering
from serving.sampler import deployed as samplers
from serving.scaling import by_work
from serving.schemas import Observed
from serving.searcher import Result, Task
from serving.searcher import deployed as searchers
from serving.service import Service, too_busy
from serving.window import Window

# `/metrics` counts requests; a line each would cost more time than many of them do.
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)

GATEWAY_CPUS = 0.1
SWITCH_SECONDS = 0.0005
"""Python's threads take turns so often in a gateway. With its usual 5 ms every picture that is
encoded waits for the event loop so long, twice."""
BY_WORK = AutoscalingPolicy(policy_function=by_work)


class RemoteSampler:
    """The sampler deployment, as a `serving.service.Painter`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle
        self._versions: dict[str, _Version] = {}

    def full(self, version: str, images: int, others: int) -> Busy | None:
        """That samplers have no room for so many images, as a call to them would only repeat."""
        calls = self._of(version)
        return (calls.window if images <= SMALL else calls.large).full(images, others)

    async def synthesize(self, version: str, recipes: Sequence[Recipe]) -> np.ndarray | Busy:
        """See `Sampler.synthesize`.

        Of a call all are answered together, so that a large request has its own: who asks for an
        image does not wait for an animation.
        """
        calls = self._of(version)
        if len(recipes) <= SMALL:
            return await calls.window.ask(len(recipes), lambda: calls.together.ask(recipes))
        return await calls.large.ask(len(recipes), lambda: calls.alone(recipes))

    async def walk(
        self, version: str, stops: Sequence[Recipe], frames: int, loop: bool
    ) -> list[Recipe]:
        """See `Sampler.walk`."""
        recipes: list[Recipe] = await self._of(version).ask("walk", stops, frames, loop)
        return recipes

    async def embedding(self, version: str, classes: Mapping[int, float]) -> list[float]:
        """See `Sampler.embedding`."""
        y: list[float] = await self._of(version).ask("embedding", classes)
        return y

    async def directions(self, version: str) -> Directions:
        """See `Sampler.directions`."""
        directions: Directions = await self._of(version).ask("directions")
        return directions

    def _of(self, version: str) -> _Version:
        if version not in self._versions:
            self._versions[version] = _Version(version, self.handle)
        return self._versions[version]


class _Version:
    """Calls to the samplers of one model version."""

    def __init__(self, version: str, handle: DeploymentHandle[Any]) -> None:
        self.version, self.any = version, handle
        # The model's id lets Serve choose a replica that has the model in memory.
        self.having = handle.options(multiplexed_model_id=version)
        # Samplers have room for small requests beside large ones, and less for large ones than
        # these have images: in one window an animation would keep all others out until its end.
        self.window, self.large = Window(), Window()
        self.together: Coalescer[Sequence[Recipe], np.ndarray | Busy] = Coalescer(
            partial(self._synthesize, self.window)
        )

    async def alone(self, recipes: Sequence[Recipe]) -> np.ndarray | Busy:
        """The answer to one request; if it is cancelled, so is the call."""
        [answer] = await self._synthesize(self.large, [recipes])
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def _synthesize(
        self, window: Window, wanted: list[Sequence[Recipe]]
    ) -> list[np.ndarray | Busy | BaseException]:
        turned_away, window.turned_away = window.turned_away, 0
        answers: list[np.ndarray | Busy | BaseException]
        answers = await self.ask("synthesize_all", wanted, turned_away)
        return answers

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What a sampler's method gives."""
        for _ in range(2):  # Recipes give the same images elsewhere, if a sampler dies of one.
            # Those who have it may have too much to do: then others are to load it, for they would
            # be left idle else, however many come.
            crowded = self.window.crowded or self.large.crowded
            handle = self.any if crowded else self.having
            try:
                return await getattr(handle, method).remote(self.version, *arguments)
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
        """See `Searcher.search`. If the searcher dies, another begins anew, and finds the same."""
        handle = self.handle.options(multiplexed_model_id=task.version, stream=True)
        for _ in range(2):
            news: Any = handle.search.remote(task)
            try:
                async for item in news:
                    yield item
                return
            except BackPressureError:
                break
            except RayActorError:
                continue
            finally:
                news.cancel()  # Nothing, if it has ended.
        raise too_busy()


class RemoteLedger:
    """The ledger deployment, as a `serving.service.Counts`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle
        self._taking: Coalescer[tuple[Key, int], Admission | Refusal] = Coalescer(self._take)
        self._giving: Coalescer[tuple[Key, int], None] = Coalescer(self._give)

    async def record(self, events: list[Event]) -> None:
        """See `Ledger.record`."""
        await self.handle.record.remote(events)

    async def observed(self) -> dict[str, Observed]:
        """See `Ledger.observed`."""
        observed: dict[str, Observed] = await _of_ledger(self.handle.observed.remote())
        return observed

    async def take(self, key: Key, images: int) -> Admission | Refusal:
        """See `Ledger.take`."""
        return await self._taking.ask((key, images))

    async def _take(self, wanted: list[tuple[Key, int]]) -> list[Admission | Refusal]:
        answers: list[Admission | Refusal]
        answers = await _of_ledger(self.handle.take_all.remote(wanted))
        return answers

    async def give_back(self, key: Key, images: int) -> None:
        """See `Ledger.give_back`."""
        await self._giving.ask((key, images))

    async def _give(self, taken: list[tuple[Key, int]]) -> list[None]:
        with suppress(RayActorError):  # What it had counted of the day is lost with it, anyhow.
            await self.handle.give_back_all.remote(taken)
        return [None] * len(taken)

    async def metrics(self) -> bytes:
        """See `Ledger.metrics`."""
        metrics: bytes = await _of_ledger(self.handle.metrics.remote())
        return metrics


async def _of_ledger(answer: Awaitable[Any]) -> Any:
    """What the ledger answers; raises `ProblemError` 503 if it died, for another is on its way."""
    try:
        return await answer
    except RayActorError:
        raise too_busy() from None


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
        sys.setswitchinterval(SWITCH_SECONDS)
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
        # Serve's 10 and 30 s would let 46 s pass until a second sampler begins to load.
        metrics_interval_s=2,
        look_back_period_s=10,
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


def build(config: EndpointConfig | Mapping[str, Any]) -> serve.Application:
    """The application that serves `config.models`; a file's `args` are a mapping of the same.

    Raises `ValidationError` for what is no `EndpointConfig`, and `UserError` if everybody is let in
    and Serve listens where other machines reach it: behind HAProxy a gateway sees the proxy's
    address, and not whose request it is.
    """
    config = EndpointConfig.model_validate(config)
    controller = _get_global_client(raise_if_no_controller_running=False)
    if config.no_auth and controller:
        check_exposure(controller.http_config.host or "0.0.0.0", config.no_auth)
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
        user_config=config.model_dump(mode="json", include={"models", "canary", "max_models"}),
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
        },
    )(samplers(config.max_models)).bind(
        config.storage,
        ledger,
        Rendering(config.precision, config.compiled),
        threads=max(1, math.floor(2 * config.cpus_per_replica)),
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
