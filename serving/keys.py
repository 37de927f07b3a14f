"""API keys: who may use the endpoint, which models, and how much of them.

A key is `bg_` and 256 random bits. It is shown once, when it is made; the storage root keeps its
SHA-256 and its limits in `keys/NAME.json`, a file a key, so that keys made at once cannot undo each
other. `keys/NAME.revoked` revokes it. Every gateway reads them again every few seconds.

    python -m serving.keys make alice --quota 10000
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Annotated, Any, TypedDict

import tyro
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from biggan.claim import claimed
from biggan.config import explain
from biggan.errors import UserError
from biggan.storage import Folder, StorageError, storage_root
from serving.problems import ProblemError
from serving.schemas import MAX_IMAGES

logger = logging.getLogger("ray.serve")

PREFIX = "bg_"
LEAST_BURST = MAX_IMAGES
"""Every key may take so many images at once: a request for images."""
REFRESH_SECONDS = 3.0
"""A revoked key is refused after these, and the time that it takes to read the keys."""
STALE_SECONDS = 300.0
"""How long keys that were read stay good while the store cannot be read; then nobody gets in."""
NO_KEY = "send an API key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Limits(BaseModel):
    """What a key may do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: int = Field(600, ge=1)
    """Images a minute. So many may be taken at once, or 64 if that is more."""
    quota: int | None = Field(None, ge=1)
    """Images a day, which begins at midnight UTC; None: as many as the rate allows."""
    models: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the models that it may use, such as digits; None: all."""

    @field_validator("models")
    @classmethod
    def _check_models(cls, models: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in models or ():
            if not _MODEL.fullmatch(name):
                raise ValueError(f"{name!r} must be a model's name alone, such as 'digits'")
        return models

    @property
    def burst(self) -> int:
        """Images that may be taken at once; for more, as of frames, see `Meter.take`."""
        return max(self.rate, LEAST_BURST)

    def __str__(self) -> str:
        quota = f"{self.quota} a day" if self.quota else "any number a day"
        models = " ".join(self.models) if self.models else "all models"
        return f"{self.rate} images a minute, {quota}, of {models}"


class Key(Limits):
    """A key as it is stored, by its hash."""

    name: str
    sha256: str
    created: str
    revoked: bool = False

    def may_use(self, name: str) -> bool:
        """Whether the key is for model NAME."""
        return self.models is None or name in self.models

    def check_model(self, model: str) -> None:
        """Raise a 403 unless the key may use a model, given as NAME, NAME@ALIAS or NAME@VERSION."""
        name = model.partition("@")[0]
        if not self.may_use(name):
            raise ProblemError(403, f"this API key may not use model {name}")


def hashed(secret: str) -> str:
    """What is stored of a secret.

    A plain hash is enough: bcrypt and its like slow down who guesses passwords, and nobody guesses
    256 random bits (NIST SP 800-63B, 5.1.2.2, asks for no more from 112 bits on).
    """
    return hashlib.sha256(secret.encode()).hexdigest()


def check_name(name: str) -> str:
    """Return `name` if it can name a key; raises `UserError` otherwise."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"key name {name!r}: use at most 64 lower-case letters, digits, '_' and '-', beginning"
            " with a letter or digit"
        )
    return name


class KeyStore:
    """The keys under a storage root, and what was used of their quotas."""

    def __init__(self, root: str | None = None) -> None:
        """`root` is as everywhere: by default $BIGGAN_STORAGE, else ./storage."""
        self.folder = Folder(storage_root(root)) / "keys"
        self._read: dict[str, tuple[tuple[int, int], Key]] = {}

    def make(self, name: str, limits: Limits | None = None) -> str:
        """Make a key; returns its secret, which is nowhere else. A name is used only once."""
        secret = PREFIX + secrets.token_hex(32)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        with claimed(self.folder / check_name(name), "made") as claim:
            if {f"{name}.json", f"{name}.revoked"} & set(self.folder.children()):
                raise UserError(
                    f"there is a key {name!r} already: choose another name, or change its limits"
                    f" with `python -m serving.keys limit {name}`"
                )
            given = (limits or Limits()).model_dump()
            self._write(Key(name=name, sha256=hashed(secret), created=created, **given))
            claim.check()  # Or another's key of that name may have taken the place of this one.
        return secret

    def change(self, name: str, changes: Mapping[str, Any]) -> Key:
        """Change some of a key's limits; returns the key."""
        self._require(name)
        with claimed(self.folder / name, "changed"):
            key = self._load(name)
            try:
                changed = Key.model_validate(key.model_dump() | dict(changes))
            except ValidationError as error:
                raise UserError(explain(error)) from None
            self._write(changed)
        return changed

    def revoke(self, name: str) -> None:
        """Revoke a key for good.

        That is a file of its own: it waits for nobody, and no change of limits can undo it.
        """
        self._require(name)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self.folder.write_json(f"{name}.revoked", {"revoked": when})

    def all(self) -> list[Key]:
        """All keys by name. A damaged file is logged and is no key; the others are.

        Only files that are new or have changed are read. Two changes of a key are further apart
        than time stamps are coarse: the claim sees to that.
        """
        selector = fs.FileSelector(self.folder.path, allow_not_found=True)
        files = {
            info.base_name: (info.mtime_ns, info.size)
            for info in self.folder.filesystem.get_file_info(selector)
        }
        found = {}
        for name in sorted(f.removesuffix(".json") for f in files if f.endswith(".json")):
            stamp = files[f"{name}.json"]
            known, key = self._read.get(name, (None, None))
            if known != stamp:
                key = self._try_load(name)
            if key is not None:
                found[name] = stamp, key
        self._read = found
        return [
            key.model_copy(update={"revoked": f"{name}.revoked" in files})
            for name, (_, key) in found.items()
        ]

    def usage(self, day: date) -> dict[str, int]:
        """Images that were made on a day (UTC), by key."""
        try:
            found: dict[str, int] = (self.folder / "usage").read_json(f"{day}.json")
        except FileNotFoundError:
            return {}
        return found

    def write_usage(self, day: date, images: Mapping[str, int]) -> None:
        """Keep what was used on a day."""
        (self.folder / "usage").write_json(f"{day}.json", dict(images))

    def _write(self, key: Key) -> None:
        self.folder.write_json(f"{key.name}.json", key.model_dump(exclude={"name", "revoked"}))

    def _load(self, name: str) -> Key:
        try:
            return Key.model_validate(self.folder.read_json(f"{name}.json") | {"name": name})
        except (ValidationError, TypeError) as error:
            raise StorageError(f"{self.folder}/{name}.json is damaged: {error}") from None

    def _try_load(self, name: str) -> Key | None:
        try:
            return self._load(name)
        except (StorageError, FileNotFoundError, PermissionError) as error:
            logger.error("key %s is not usable: %s", name, error)
            return None

    def _require(self, name: str) -> None:
        if not self.folder.exists(f"{check_name(name)}.json"):
            known = ", ".join(key.name for key in self.all()) or "none yet"
            raise UserError(f"there is no key {name!r} in {self.folder}; there is: {known}")


class Keys:
    """The keys as a gateway knows them."""

    def __init__(
        self, root: str | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Read the keys; raises OSError if the store cannot be read. `clock` gives seconds."""
        self.store, self.clock = KeyStore(root), clock
        self._stop = threading.Event()
        self._take_in()

    def start(self) -> None:
        """Read the keys again every `REFRESH_SECONDS` from now on, in a thread."""
        repeat(self._stop, REFRESH_SECONDS, self.refresh)

    def close(self) -> None:
        """Read no more."""
        self._stop.set()

    def refresh(self) -> None:
        """Read the keys again; those that were read before stay for a while if that fails."""
        try:
            self._take_in()
        except Exception as error:  # Storage raises several kinds; none may end the service.
            age = self.clock() - self._read_at
            logger.warning(
                "keys cannot be read; those of %.0f s ago hold for %.0f s: %s",
                *(age, STALE_SECONDS, error),
            )

    def _take_in(self) -> None:
        began = self.clock()
        # Found by its hash, a key gives nothing away by how long that takes: who sends guesses does
        # not choose their hashes.
        self._by_hash = {key.sha256: key for key in self.store.all()}
        self._read_at = began

    def authenticate(self, secret: str | None) -> Key:
        """The key with a secret.

        Raises a `ProblemError`: 401 without a secret or with one that is none of ours, whether or
        not it looks like one; 403 if it is revoked, which only who has the secret gets to hear; 503
        if the store could not be read for `STALE_SECONDS`.
        """
        if self.clock() - self._read_at > STALE_SECONDS:
            wait = {"Retry-After": str(round(REFRESH_SECONDS))}
            raise ProblemError(503, "the endpoint cannot read its API keys", headers=wait)
        if not secret:
            raise _unauthorized(NO_KEY)
        key = self._by_hash.get(hashed(secret))
        if key is None:
            raise _unauthorized("this is no API key of this endpoint")
        if key.revoked:
            raise ProblemError(403, "this API key is revoked")
        return key


def _unauthorized(detail: str) -> ProblemError:
    return ProblemError(401, detail, headers={"WWW-Authenticate": "Bearer"})


def repeat(stop: threading.Event, seconds: float, action: Callable[[], None]) -> None:
    """Do something every so many seconds, in a thread, until `stop` is set."""

    def loop() -> None:
        while not stop.wait(seconds):
            action()

    threading.Thread(target=loop, daemon=True).start()


@dataclass(frozen=True, kw_only=True)
class _Stored:
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True, kw_only=True)
class Make(_Stored):
    """Make a key, and print it: that is the only time it is shown.

    python -m serving.keys make alice --rate 100 --quota 10000 --models digits pets
    """

    name: Name
    """Whose key it is: at most 64 lower-case letters, digits, '_' and '-', beginning with a letter
    or digit."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)

    def run(self) -> None:
        """Do so."""
        secret = KeyStore(self.storage).make(self.name, self.limits)
        print(
            f"key {self.name}: {self.limits}. It is shown this once; clients send it as"
            " `Authorization: Bearer KEY` or `X-API-Key: KEY`:",
            file=sys.stderr,
            flush=True,
        )
        print(secret)


@dataclass(frozen=True, kw_only=True)
class List(_Stored):
    """List all keys, their limits, and the images that each had today (UTC).

    python -m serving.keys list
    """

    def run(self) -> None:
        """Do so."""
        store = KeyStore(self.storage)
        today = store.usage(datetime.now(UTC).date())
        keys = store.all()
        for key in keys:
            state = "; revoked" if key.revoked else ""
            made = f"made {key.created[:10]}, {today.get(key.name, 0)} images today"
            print(f"{key.name}: {key}; {made}{state}")
        if not keys:
            print(f"no keys in {store.folder}; make one: make api-key NAME", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Revoke(_Stored):
    """Revoke a key for good; running endpoints refuse it within seconds.

    python -m serving.keys revoke alice
    """

    name: Name
    """Whose key."""

    def run(self) -> None:
        """Do so."""
        KeyStore(self.storage).revoke(self.name)
        print(f"key {self.name} is revoked; endpoints refuse it within {REFRESH_SECONDS:g} s")


class Changes(TypedDict, total=False):
    """Limits to change."""

    rate: int
    """Images a minute."""
    quota: int | None
    """Images a day (UTC); None: as many as the rate allows."""
    models: tuple[str, ...] | None
    """Names of the models that it may use; None: all."""


@dataclass(frozen=True, kw_only=True)
class Limit(_Stored):
    """Change limits of a key, those alone that are given; running endpoints follow within seconds.

    python -m serving.keys limit alice --rate 1000 --quota None
    """

    name: Name
    """Whose key."""
    changes: Annotated[Changes, tyro.conf.arg(name="")]

    def run(self) -> None:
        """Do so."""
        print(f"key {self.name}: {KeyStore(self.storage).change(self.name, self.changes)}")


@dataclass(frozen=True)
class Command:
    """Make, list, revoke and limit the API keys to the endpoint.

    python -m serving.keys make alice --quota 10000

    python -m serving.keys revoke alice
    """

    do: Annotated[Make | List | Revoke | Limit, tyro.conf.arg(name="")]


def main() -> None:
    """Do what the command line says."""
    # Brings torch along, which what checks and counts can do without.
    from biggan.commands import parse, run_command

    run_command(lambda: parse(Command, prog="python -m serving.keys").do.run())


if __name__ == "__main__":
    main()
