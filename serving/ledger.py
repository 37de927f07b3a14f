"""What goes through the endpoint: counted in one place, whatever the number of gateways.

A gateway asks here, before images are made, whether the key may have them. Gateways and samplers
send what they saw once a second; `/metrics` gives it to Prometheus, and `/v1/models` the latency
and error rate of each model version, by which a canary is judged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving import background
from serving.keys import Key
from serving.limits import Admission, Meter, Refusal
from serving.schemas import Observed

logger = logging.getLogger("ray.serve")

REMEMBERED = 1000
"""Newest requests of a model version that its latency and error rate are taken over."""
SEND_SECONDS = 1.0
SILENT_SECONDS = 60.0
"""A sampler that makes nothing for so long has no backlog, or is no more."""
JUDGED = {"/v1/generate", "/v1/interpolate", "/v1/edit", "/v1/images/generations"}
"""Operations by which a model version is judged: a search takes as long as it is given."""
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Served:
    """One request that was answered."""

    operation: str
    """The route: `/v1/generate`."""
    key: str
    """Name of the API key; empty without one."""
    model: str
    """NAME@VERSION; empty where no model was asked."""
    status: int
    seconds: float
    images: int


@dataclass(frozen=True)
class TurnedAway:
    """Requests that did not come as far as a gateway, for there was no room for them."""

    operation: str
    """The route."""
    requests: int


@dataclass(frozen=True)
class Batch:
    """One batch of a sampler."""

    replica: str
    model: str
    """NAME@VERSION."""
    images: int
    backlog: int
    """Images of the model that were left waiting."""


Event = Served | TurnedAway | Batch


class Ledger:
    """Counts requests, images and batches."""

    def __init__(self, root: str | None = None) -> None:
        """Quotas are kept under the storage root `root`."""
        self.meter = Meter(root)
        self.meter.start()
        self.registry = CollectorRegistry()
        # Each combination of labels that occurs is a series, and stays one until the ledger ends.
        # No client makes one up: operations are routes, keys are those that were made, models are
        # versions that are served, and strangers have empty names. Of `biggan_request_seconds` each
        # is 17 series: 100 keys that use 3 operations of 2 models are 10,000, which Prometheus
        # bears; with thousands of keys, let it sum `key` away when it scrapes.
        self.requests = Counter(
            "biggan_requests",
            "Requests answered.",
            ("operation", "key", "model", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "biggan_request_seconds",
            "Time from a request's arrival at the gateway to the end of its answer.",
            ("operation", "key", "model"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.images = Counter(
            "biggan_images", "Images made.", ("key", "model"), registry=self.registry
        )
        self.batches = Histogram(
            "biggan_batch_images",
            "Images a batch.",
            ("model",),
            buckets=IMAGES,
            registry=self.registry,
        )
        self.backlog = Gauge(
            "biggan_backlog_images",
            "Images that wait for a batch.",
            ("model", "replica"),  # Replicas come and go, and are forgotten; see `metrics`.
            registry=self.registry,
        )
        self._heard: dict[tuple[str, str], float] = {}
        """When a model of a replica last made a batch."""
        self._newest: dict[str, deque[tuple[float, bool]]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED)
        )

    async def record(self, events: Sequence[Event]) -> None:
        """Count what a gateway or a sampler saw."""
        for event in events:
            if isinstance(event, Batch):
                labels = (event.model, event.replica)
                self._heard[labels] = time.monotonic()
                self.backlog.labels(*labels).set(event.backlog)
                self.batches.labels(event.model).observe(event.images)
            elif isinstance(event, TurnedAway):
                self.requests.labels(event.operation, "", "", "503").inc(event.requests)
            else:
                self._serve(event)

    def _serve(self, request: Served) -> None:
        labels = (request.operation, request.key, request.model, str(request.status))
        self.requests.labels(*labels).inc()
        self.seconds.labels(*labels[:3]).observe(request.seconds)
        if request.images:
            self.images.labels(request.key, request.model).inc(request.images)
        answered = request.status < 400  # Else the model was not asked, unless it failed.
        if request.operation in JUDGED and request.model and (answered or request.status >= 500):
            self._newest[request.model].append((request.seconds, answered))

    async def take(self, key: Key, images: int) -> Admission | Refusal:
        """Count images to be made with a key, or refuse them."""
        return self.meter.take(key, images)

    async def take_all(self, wanted: Sequence[tuple[Key, int]]) -> list[Admission | Refusal]:
        """The answers of `take` to several requests, in their order."""
        return [self.meter.take(key, images) for key, images in wanted]

    async def give_back(self, key: Key, images: int) -> None:
        """Count no more what was taken for work that failed."""
        self.meter.give_back(key, images)

    async def give_back_all(self, taken: Sequence[tuple[Key, int]]) -> None:
        """`give_back` for several requests."""
        for key, images in taken:
            self.meter.give_back(key, images)

    async def metrics(self) -> bytes:
        """All counts in Prometheus' text format."""
        now = time.monotonic()
        for labels in [own for own, heard in self._heard.items() if now - heard > SILENT_SECONDS]:
            self.backlog.remove(*labels)
            del self._heard[labels]
        return generate_latest(self.registry)

    async def observed(self) -> dict[str, Observed]:
        """How each model version fared over its newest requests, by NAME@VERSION."""
        return {model: _observed(list(newest)) for model, newest in self._newest.items()}


def _observed(newest: list[tuple[float, bool]]) -> Observed:
    good = [1000 * seconds for seconds, ok in newest if ok]
    p50, p95 = np.percentile(good, [50, 95]).tolist() if good else (None, None)
    rate = 1 - len(good) / len(newest)
    return Observed(requests=len(newest), error_rate=rate, p50_ms=p50, p95_ms=p95)


class Reporter:
    """Sends events to a ledger once a second; what cannot be sent is kept for the next time."""

    def __init__(self, send: Callable[[list[Event]], Awaitable[None]]) -> None:
        """`send` is `Ledger.record`, here or behind a handle."""
        self.send = send
        self._events: list[Event] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, event: Event) -> None:
        """Note an event; there must be a running loop."""
        self._events.append(event)
        if self._task is None or self._task.done():
            self._task = background.begin(self._send_soon())

    async def _send_soon(self) -> None:
        await asyncio.sleep(SEND_SECONDS)
        events, self._events = self._events, []
        try:
            await self.send(events)
        except Exception:
            logger.exception("the ledger does not answer; %d events are kept", len(events))
            self._events = (events + self._events)[-10_000:]
