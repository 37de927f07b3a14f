"""Imports of others' weights into the model store, and exports from it.

The formats are those of `biggan.interop` and `biggan.interop_hf`. Files are read with
`weights_only`: a pickle that holds anything but tensors is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import torch
from torch import Tensor

from biggan.code_version import code_version
from biggan.errors import UserError
from biggan.interop import (
    BN_EPS,
    WeightsError,
    is_discriminator,
    original_flags,
    read_discriminator,
    read_generator,
    write_discriminator,
    write_generator,
)
from biggan.interop_hf import read_deep_hf
from biggan.models import (
    BEST,
    D_CONFIG,
    ModelCard,
    ModelStore,
    find_model,
    load_card,
    load_discriminator,
    load_generator,
)
from biggan.networks import Discriminator, Generator
from biggan.parallel import Workers
from biggan.promotion import class_columns
from biggan.storage import Folder, absolute

Format = Literal["biggan-pytorch", "biggan-deep-hf"]
G_FILE, D_FILE = "G_ema.pth", "D.pth"


@dataclass(frozen=True)
class WeightFiles:
    """What to import: paths or URIs."""

    format: Format
    """biggan-pytorch: ajbrock/BigGAN-PyTorch; biggan-deep-hf: pytorch-pretrained-BigGAN."""
    weights: str
    """The generator's file."""
    config: str | None = None
    """Of biggan-deep-hf: its config; by default `config.json` beside the weights."""
    discriminator: str | None = None
    """Of biggan-pytorch: the discriminator's file."""
    classes: str | None = None
    """A text file with a class name a line; by default classes are named by their numbers."""
    bn_eps: float | None = None
    """Of biggan-pytorch: its `--BN_eps`, 1e-5 if not given."""

    def __post_init__(self) -> None:
        """Raises `UserError` for what the format does not have."""
        hf = self.format == "biggan-deep-hf"
        unfit = ("discriminator", "bn_eps") if hf else ("config",)
        for field in unfit:
            if getattr(self, field) is not None:
                raise UserError(f"{field} = {getattr(self, field)}: {self.format} has none")


@dataclass(frozen=True)
class Import:
    """What came of an import."""

    folder: Folder
    """The model version."""
    card: ModelCard
    G: Generator
    D: Discriminator | None
    is_best: bool
    """Whether `best` points to it now."""


def import_weights(
    files: WeightFiles,
    name: str,
    *,
    licence: str = "",
    force: bool = False,
    root: str | None = None,
) -> Import:
    """Put others' weights into the store, as a version of model `name`.

    The first version becomes `best`; a later one only with `force`, as nothing is known about its
    FID. Files that are in the store already are not imported twice. Raises `UserError` if a file
    does not fit.
    """
    origin: dict[str, str] = {"format": files.format}
    if files.bn_eps is not None:
        origin["bn_eps"] = f"{files.bn_eps:g}"
    G, D = _read_networks(files, origin)
    store = ModelStore(name, root)
    card = _already_there(store, origin)
    if card is None:
        card = ModelCard(
            name=store.name,
            version=store.next_version(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            imported=origin,
            code=code_version(),
            licence=licence,
        )
        samples, columns = class_columns(G.to(Workers.current().device))
        store.add(G, card, samples, columns, D)
    elif licence and licence != card.licence:
        card = store.relicense(card.version, licence)
    own = {None, card.version}
    is_best = store.set_alias(BEST, card.version, unless=lambda now: not force and now not in own)
    return Import(store.folder / card.version, card, G, D, is_best)


def export_weights(model: str, output: str, root: str | None = None) -> dict[str, str]:
    """Write a model in BigGAN-PyTorch's format: `G_ema.pth` and, if it has a D, `D.pth`.

    Returns what is worth knowing about each file. Raises `UserError` if the format has no place
    for the model.
    """
    folder = Folder(absolute(output))
    G = load_generator(model, root=root)
    states = {G_FILE: write_generator(G)}
    if find_model(model, root).exists(D_CONFIG):
        states[D_FILE] = write_discriminator(load_discriminator(model, root=root))
    for file, state in states.items():
        content = io.BytesIO()
        torch.save(state, content)
        folder.write_bytes(file, content.getvalue())
    said = dict.fromkeys(states, "")
    said[G_FILE] = original_flags(G)
    return said


def _config_beside(weights: Folder) -> Folder:
    """The config of a file of pytorch-pretrained-BigGAN, by either name that it goes by."""
    stem = weights.name.removesuffix("pytorch_model.bin")  # biggan-deep-128-, as downloaded.
    named = f"{stem}config.json"
    found = stem != weights.name and weights.parent.exists(named)
    return weights.parent / (named if found else "config.json")


def _read_networks(
    files: WeightFiles, origin: dict[str, str]
) -> tuple[Generator, Discriminator | None]:
    """G and D; notes name and SHA-256 of every file in `origin`."""
    weights = Folder(absolute(files.weights))
    state = read_state(_read(weights, "weights", origin), str(weights))
    D = None
    if files.format == "biggan-deep-hf":
        place = Folder(absolute(files.config)) if files.config else _config_beside(weights)
        config = _read_json(_read(place, "config", origin), place)
        with _of_file(weights):
            G = read_deep_hf(state, config)
    else:
        if is_discriminator(state):
            raise UserError(
                f"{weights} holds a discriminator: give it as --discriminator, and the generator"
                f" that belongs to it ({G_FILE} or G.pth) as --weights"
            )
        with _of_file(weights):
            G = read_generator(state, BN_EPS if files.bn_eps is None else files.bn_eps)
        if files.discriminator:
            place = Folder(absolute(files.discriminator))
            state = read_state(_read(place, "discriminator", origin), str(place))
            with _of_file(place):
                D = read_discriminator(state)
                _check_pair(G, D)
    if files.classes:
        place = Folder(absolute(files.classes))
        G.class_names = _class_names(_read(place, "classes", origin), place, G.n_classes)
    return G, D


def read_state(content: bytes, file: str) -> dict[str, Tensor]:
    """The weights in what `torch.save` wrote; names come without DataParallel's `module.`.

    Raises `UserError`, which calls it `file`, unless it holds nothing but tensors.
    """
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # Torch raises several kinds, in paragraphs.
        found = re.search(
            r"(?:Unsupported|GLOBAL|Trying|Invalid|Cannot)[^\n.]*[^\n]{0,60}", str(error)
        )
        raise UserError(
            f"{file} is refused: it is no file of tensors alone, and unpickling anything else could"
            f" run code ({found[0].strip() if found else type(error).__name__})"
        ) from None
    states = [loaded, *loaded.values()] if isinstance(loaded, dict) else []
    states = [state for state in states if _is_state(state)]
    if len(states) != 1:
        raise UserError(
            f"{file} holds {len(states) or 'no'} sets of weights: expected one, a mapping of names"
            " to tensors, by itself or in a dictionary"
        )
    return {key.removeprefix("module."): tensor for key, tensor in states[0].items()}


def _is_state(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _read(place: Folder, what: str, origin: dict[str, str]) -> bytes:
    """A file's content; notes its name and SHA-256 in `origin`."""
    try:
        content = place.parent.read_bytes(place.name)
    except OSError as error:
        raise UserError(f"--{what} {place}: cannot be read: {error}") from None
    origin[what] = place.name
    origin["sha256" if what == "weights" else f"{what}_sha256"] = hashlib.sha256(
        content
    ).hexdigest()
    return content


def _read_json(content: bytes, place: Folder) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise UserError(f"{place} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{place} holds a {type(config).__name__}, not settings by name")
    return config


@contextmanager
def _of_file(place: Folder) -> Iterator[None]:
    """Name the file in what is said about its weights."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{place}: {error}") from None


def _check_pair(G: Generator, D: Discriminator) -> None:
    for what in ("resolution", "n_classes", "channels"):
        if getattr(G, what) != getattr(D, what):
            raise WeightsError(
                f"this discriminator's {what} is {getattr(D, what)}, the generator's is"
                f" {getattr(G, what)}"
            )


def _class_names(content: bytes, place: Folder, n_classes: int) -> list[str]:
    try:
        names = [line.strip() for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is no UTF-8 text: {error}") from None
    if len(names) != n_classes:
        raise UserError(f"{place} names {len(names)} classes; the generator has {n_classes}")
    return names


def _already_there(store: ModelStore, origin: dict[str, str]) -> ModelCard | None:
    """The card of the version that was imported from these very files."""
    cards = [load_card(store.folder / version) for version in store.versions()]
    return next((card for card in cards if card.imported == origin), None)
