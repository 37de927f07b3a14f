"""Which models an endpoint serves, and which version a request gets.

A request names NAME, NAME@ALIAS or NAME@VERSION. Aliases are followed as they move in the store: a
new version is loaded before it takes over, so that nobody waits for it. Of a NAME alone, a canary
may send a share of the requests to another alias; which, the request's seed decides, so that a
repeated request goes the same way.

A version's weights never change, but its card does (FID, licence), and so do the names of its
directions: these are read again as often as aliases are followed.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from biggan.directions import read_names
from biggan.errors import UserError
from biggan.latents import Stream, rng
from biggan.models import (
    GeneratorConfig,
    ModelCard,
    ModelStore,
    load_card,
    noted_sha256,
    read_generator_config,
    split_reference,
)
from biggan.storage import Folder, StorageError
from serving import background
from serving.problems import ProblemError
from serving.schemas import FieldProblem

logger = logging.getLogger("ray.serve")

FRESH_SECONDS = 1.0
"""So long an alias is taken to point where it did, and a card to say what it said."""
STALE_SECONDS = 5.0
"""So long it is still followed while it is looked up anew; after that a request waits for that, and
for the version that it leads to by then: for as long at the most each, should the store hang, or
that take long to load."""
KEEP_SECONDS = 5.0
"""Between two looks of who follows aliases without being asked (`Catalogue.keep`)."""
AGAIN_SECONDS = 10.0
"""After which a version that could not be loaded is tried again."""
READERS = 4
"""Threads that read the store."""
T = TypeVar("T")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""Of an alias or a version: no path that leads out of the store."""


@dataclass(frozen=True)
class Model:
    """A model version that is served: all that is to be known without its weights."""

    name: str
    card: ModelCard
    config: GeneratorConfig
    weights: str
    """SHA-256 of the weights file."""
    direction_names: dict[int, str]

    @classmethod
    def read(cls, folder: Folder) -> Model:
        """The model version of a folder; raises `StorageError` if it is damaged."""
        return cls(
            folder.parent.name,
            load_card(folder),
            read_generator_config(folder),
            noted_sha256(folder),
            read_names(folder),
        )

    def read_again(self, folder: Folder) -> Model:
        """The same with what may have changed since; raises `StorageError` if that is damaged."""
        return replace(self, card=load_card(folder), direction_names=read_names(folder))

    @property
    def reference(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.card.version}"


@dataclass
class _Followed:
    model: Model
    looked: float
    refresh: asyncio.Task[None] | None = None
    loading: asyncio.Task[None] | None = None
    """Of the version that is to take over."""
    began: float = 0.0
    """When that did."""
    failed: str = ""
    """Version that could not be loaded, at `began`."""

    def may_load(self, version: str) -> bool:
        """Whether a version is to be loaded now."""
        waited = time.monotonic() - self.began
        return self.loading is None and (version != self.failed or waited > AGAIN_SECONDS)


@dataclass(frozen=True)
class _Known:
    model: Model
    looked: float


class Catalogue:
    """The models that an endpoint serves."""

    def __init__(
        self,
        references: Sequence[str],
        canary: Mapping[str, float],
        root: str | None,
        warm: Callable[[str], Awaitable[object]],
    ) -> None:
        """Serve the models of `references`, NAME or NAME@ALIAS, the first by default.

        All versions of their NAMEs may be asked for. `canary` gives NAME@ALIAS weights, by which
        requests for NAME alone are shared. `warm` loads a NAME@VERSION into the sampler.
        """
        self.root, self.warm = root, warm
        self.shares: dict[str, dict[str, float]] = {}
        for reference in references:
            name, alias = split_reference(reference)
            self.shares.setdefault(name, {alias: 1.0})
        drawn: dict[str, dict[str, float]] = {}
        for reference, weight in canary.items():
            name, alias = split_reference(reference)
            drawn.setdefault(name, {})[alias] = weight
        self.shares.update(drawn)
        # Of its own: where the store hangs, nothing else is to wait for a thread.
        self._readers = ThreadPoolExecutor(READERS, "store")
        self._followed: dict[str, _Followed] = {}
        self._versions: dict[str, _Known] = {}

    @property
    def names(self) -> list[str]:
        """Names of the models, the default first."""
        return list(self.shares)

    def choose(self, reference: str | None, seed: int) -> str:
        """NAME@ALIAS or NAME@VERSION for what a request names; raises `ProblemError` 404."""
        name, at, version = (reference or self.names[0]).partition("@")
        if name not in self.shares:
            served = f"served are: {', '.join(self.names)}"
            detail = f"model {name} is not served here; {served}"
            raise ProblemError(404, detail, [_wrong(reference, served)])
        if at and not _VERSION.fullmatch(version):
            raise _missing(reference, f"{name}@{version}")
        return f"{name}@{version or self._draw(name, seed)}"

    def _draw(self, name: str, seed: int) -> str:
        shares = self.shares[name]
        if len(shares) == 1:
            return next(iter(shares))
        weights = np.array(list(shares.values()))
        at = rng(seed, Stream.CANARY).random()
        return list(shares)[int(np.searchsorted(weights.cumsum() / weights.sum(), at, "right"))]

    async def current(self) -> dict[str, str]:
        """NAME@VERSION of what requests get that name none, by NAME@ALIAS, the default first.

        What is not there, or damaged, is left out: who asks for it is told.
        """
        found: dict[str, str] = {}
        for reference in (f"{name}@{alias}" for name in self.names for alias in self.shares[name]):
            try:
                found[reference] = (await self.find(reference)).reference
            except (ProblemError, UserError):
                logger.exception("%s cannot be served", reference)
        return found

    async def keep(self, references: Sequence[str]) -> None:
        """Follow what was found of these, whether or not anybody asks for it; never ends."""
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            for reference in references:
                await self.find(reference)

    async def find(self, reference: str | None, seed: int = 0) -> Model:
        """The version that a request gets; raises `ProblemError` 404 if there is none."""
        chosen = self.choose(reference, seed)
        if followed := self._followed.get(chosen):
            age = time.monotonic() - followed.looked
            if age > FRESH_SECONDS and (followed.refresh is None or followed.refresh.done()):
                followed.refresh = background.begin(self._follow(chosen, followed))
            if age > STALE_SECONDS and followed.refresh:
                await asyncio.wait([followed.refresh], timeout=STALE_SECONDS)
                left = followed.began + STALE_SECONDS - time.monotonic()
                if followed.loading and left > 0:
                    await asyncio.wait([followed.loading], timeout=left)
            return followed.model
        try:
            model = await self._in_thread(self._read, chosen)
        except StorageError as error:  # Which names the store: not to be told to strangers.
            logger.info("%s: %s", chosen, error)
            raise _missing(reference, chosen) from None
        self._followed[chosen] = _Followed(model, time.monotonic())
        return model

    async def _follow(self, chosen: str, followed: _Followed) -> None:
        """Look up an alias anew; a store that cannot be read must not end the service."""
        try:
            model = await self._in_thread(self._read, chosen)
            if model.reference == followed.model.reference:
                followed.model = model
            elif followed.may_load(model.reference):
                followed.began = time.monotonic()
                followed.loading = background.begin(self._load(chosen, followed, model))
        except Exception:
            logger.exception("cannot follow %s; still serving %s", chosen, followed.model.reference)
        followed.looked = time.monotonic()

    async def _load(self, chosen: str, followed: _Followed, model: Model) -> None:
        """Let a version take over once it is loaded: minutes, where it is compiled."""
        try:
            await self.warm(model.reference)
            followed.model, followed.failed = model, ""
            logger.info("%s is %s now", chosen, model.reference)
        except Exception:
            followed.failed = model.reference
            logger.exception("cannot load %s; still serving %s", model.reference, chosen)
        finally:
            followed.loading = None

    def _read(self, chosen: str) -> Model:
        name, version = split_reference(chosen)
        store = ModelStore(name, self.root)
        return self._version(store.folder / store.resolve(version))

    def _version(self, folder: Folder) -> Model:
        """The model version of a folder, its card as of `FRESH_SECONDS` ago at the earliest."""
        known, now = self._versions.get(folder.uri), time.monotonic()
        if known and now - known.looked < FRESH_SECONDS:
            return known.model
        try:
            model = known.model.read_again(folder) if known else Model.read(folder)
        except (UserError, OSError):
            if not known:
                raise
            logger.exception("cannot read %s again; it stays as it was", known.model.reference)
            model = known.model
        self._versions[folder.uri] = _Known(model, now)
        return model

    async def all(self) -> list[tuple[Model, list[str], float]]:
        """Every version of the served names, its aliases, and its share of requests for NAME."""
        return await self._in_thread(self._all)

    def _in_thread(self, read: Callable[..., T], *arguments: str) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._readers, read, *arguments)

    def _all(self) -> list[tuple[Model, list[str], float]]:
        found = []
        for name, shares in self.shares.items():
            store = ModelStore(name, self.root)
            aliases = store.aliases()
            for version in store.versions():
                pointing = [alias for alias, place in aliases.items() if place == version]
                share = sum(
                    w for alias, w in shares.items() if aliases.get(alias, alias) == version
                )
                try:
                    model = self._version(store.folder / version)
                except (UserError, OSError):  # The others are there all the same.
                    logger.exception("%s@%s is damaged", name, version)
                    continue
                found.append((model, pointing, share / sum(shares.values())))
        return found


def _missing(reference: str | None, chosen: str) -> ProblemError:
    detail = f"no model {chosen}; see /v1/models"
    return ProblemError(404, detail, [_wrong(reference, "must be one that /v1/models lists")])


def _wrong(reference: str | None, limit: str) -> FieldProblem:
    return FieldProblem(field="model", value=reference, limit=limit)
