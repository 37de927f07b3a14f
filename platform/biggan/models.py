"""The model store: generators exported from runs, versioned, and named by aliases.

`models/NAME/VERSION/` holds `config.json` and `model.safetensors` (the Hugging Face convention),
`card.json` (a `ModelCard`), `samples.png` and the weights' SHA-256; no pickle is on this path. A
discriminator that was imported too is kept in `discriminator.json` and `discriminator.safetensors`.
`models/NAME/aliases.json` maps `best`, and others, to a version; `history.json` holds what they
were before. `NAME@ALIAS` and `NAME@VERSION` name a model everywhere; `NAME` alone is `NAME@best`.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load, save
from torch import nn

from biggan.claim import claimed
from biggan.config import ModelConfig, RunConfig
from biggan.metrics.protocol import differences
from biggan.metrics.report import Evaluation
from biggan.networks import Discriminator, Generator
from biggan.pixels import sheet
from biggan.storage import Folder, StorageError, check_name, locate
from biggan.truncation import TruncationTables

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "model.safetensors.sha256"
D_CONFIG = "discriminator.json"
D_WEIGHTS = "discriminator.safetensors"
CARD = "card.json"
SAMPLES = "samples.png"
ALIASES = "aliases.json"
HISTORY = "history.json"
BEST = "best"


class GeneratorConfig(BaseModel):
    """What a model's `config.json` holds: all that is needed to build its generator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig
    resolution: int
    channels: int
    class_names: list[str]
    tables: TruncationTables | None = None
    """Truncations that there are batch-norm moments for, beside the untruncated ones."""
    folded: bool = False
    """Whether the weights are normalized already, and no spectral norm is left to estimate."""


class DiscriminatorConfig(BaseModel):
    """What a model's `discriminator.json` holds: all that is needed to build its discriminator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig
    resolution: int
    channels: int
    n_classes: int


class ModelCard(BaseModel):
    """What a model's `card.json` holds: where it came from and how good it is.

    A model with imported weights has no run of ours behind it, and no FID until it is measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    created: str
    fid: float | None = None
    fid_protocol: dict[str, Any] = {}
    """Extractor and its fingerprint, dataset fingerprint, sample count, truncation, and so on."""
    evaluations: list[Evaluation] = []
    """What `jobs/evaluate.py` found since: the newest of each protocol."""
    dataset: str | None = None
    dataset_fingerprint: str | None = None
    run: str | None = None
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    step: int | None = None
    kimg: float | None = None
    hyperparameters: RunConfig | None = None
    imported: dict[str, str] | None = None
    """Of imported weights: the format, and the name and SHA-256 of each file."""
    code: dict[str, str]
    licence: str


class ModelStore:
    """All versions of one model, and the aliases that name some of them."""

    def __init__(self, name: str, root: str | None = None) -> None:
        """The store of model `name`, which need not exist yet."""
        self.folder = locate("models", name, root)
        self.name = self.folder.name

    def versions(self) -> list[str]:
        """Whole versions, oldest first."""
        names = [name for name in self.folder.children() if re.fullmatch(r"v[0-9]+", name)]
        whole = [name for name in names if (self.folder / name).exists(CARD)]
        return sorted(whole, key=lambda name: int(name[1:]))

    def aliases(self) -> dict[str, str]:
        """Versions by alias."""
        if not self.folder.exists(ALIASES):
            return {}
        aliases: dict[str, str] = self.folder.read_json(ALIASES)
        return aliases

    def set_alias(
        self,
        alias: str,
        version: str,
        unless: Callable[[str | None], bool] = lambda _current: False,
    ) -> bool:
        """Point an alias at a version, in one atomic step; returns whether it does.

        It stays if `unless` says so of the version that it points to, which no other command can
        change in between. Raises `StorageError`, and `ClaimError` while another command points the
        model's aliases.
        """
        if re.fullmatch(r"v[0-9]+", check_name(alias)):
            raise StorageError(
                f"alias {alias!r} would hide the version of that name: choose another"
            )
        if version not in self.versions():
            raise StorageError(f"model {self.name} has no version {version}")
        # All aliases are in one file: of two that write theirs at once, one would undo the other's.
        with claimed(self.folder, "given an alias") as claim:
            aliases, history = self.aliases(), self._history()
            current = aliases.get(alias)
            if unless(current):
                return False
            claim.check()
            if current not in (None, version):
                # Before the alias moves: what is noted in vain does no harm, what is missing would.
                history[alias] = [*history.get(alias, []), current]
                self.folder.write_json(HISTORY, history)
            self.folder.write_json(ALIASES, aliases | {alias: version})
        return True

    def roll_back(self, alias: str) -> tuple[str, str]:
        """Point an alias back at the version that it pointed to before.

        Returns the version that it leaves and the one that it returns to. Again, it goes back
        further. Raises `StorageError` if there is no such alias, or it never pointed elsewhere, and
        `ClaimError` as `set_alias` does.
        """
        if alias not in self.aliases():
            known = ", ".join(self.aliases()) or "none"
            raise StorageError(f"model {self.name} has no alias {alias!r}; there is: {known}")
        with claimed(self.folder, "rolled back") as claim:
            aliases, history = self.aliases(), self._history()
            current, versions = aliases[alias], self.versions()
            earlier = history.get(alias, [])
            while earlier and (earlier[-1] == current or earlier[-1] not in versions):
                earlier = earlier[:-1]
            if not earlier:
                raise StorageError(
                    f"{self.name}@{alias} is {current}, and was never another version that is still"
                    f" there: there are {', '.join(versions)}"
                )
            claim.check()
            self.folder.write_json(ALIASES, aliases | {alias: earlier[-1]})
            self.folder.write_json(HISTORY, history | {alias: earlier[:-1]})
        return current, earlier[-1]

    def _history(self) -> dict[str, list[str]]:
        """Versions that each alias pointed to before, the latest last."""
        if not self.folder.exists(HISTORY):
            return {}
        history: dict[str, list[str]] = self.folder.read_json(HISTORY)
        return history

    def resolve(self, version: str) -> str:
        """The version that a version or alias names; raises `StorageError` if there is none."""
        versions = self.versions()
        found = self.aliases().get(version, version)
        if found not in versions:
            known = ", ".join([*self.aliases(), *versions]) or "none: promote a run first"
            raise StorageError(
                f"model {self.name}@{version} is not in the store at {self.folder}; there is:"
                f" {known}"
            )
        return found

    def add(
        self,
        G: Generator,
        card: ModelCard,
        samples: np.ndarray,
        columns: int,
        D: Discriminator | None = None,
    ) -> Folder:
        """Write a version, `card.version`, which comes into being whole or not at all.

        Raises `StorageError` if it is there, which another promotion at the same time can bring
        about.
        """
        folder = self.folder / card.version
        with folder.created_whole(marker=CARD, replace=False) as draft:
            draft.write_json(CONFIG, describe(G).model_dump(mode="json"))
            weights = weights_of(G)
            draft.write_bytes(WEIGHTS, weights)
            draft.write_bytes(WEIGHTS_SHA256, hashlib.sha256(weights).hexdigest().encode())
            if D is not None:
                draft.write_json(D_CONFIG, describe_discriminator(D).model_dump(mode="json"))
                draft.write_bytes(D_WEIGHTS, weights_of(D))
            picture = io.BytesIO()
            sheet(samples, columns).save(picture, "PNG")
            draft.write_bytes(SAMPLES, picture.getvalue())
            draft.write_json(CARD, card.model_dump(mode="json"))
        return folder

    def relicense(self, version: str, licence: str) -> ModelCard:
        """Write a licence onto a version's card; returns the card. Raises `ClaimError`."""
        return self._rewrite(version, lambda _card: {"licence": licence})

    def note(self, version: str, evaluation: Evaluation) -> ModelCard:
        """Write an evaluation onto a version's card; returns the card. Raises `ClaimError`.

        It takes the place of an earlier one of the same protocol. A model without an FID, such as
        an imported one, has it for its own from then on.
        """

        def noted(card: ModelCard) -> dict[str, Any]:
            others = [e for e in card.evaluations if differences(e.protocol, evaluation.protocol)]
            update: dict[str, Any] = {"evaluations": [*others, evaluation]}
            if card.fid is None:
                update |= {"fid": evaluation.value, "fid_protocol": evaluation.protocol}
            return update

        return self._rewrite(version, noted)

    def _rewrite(self, version: str, change: Callable[[ModelCard], dict[str, Any]]) -> ModelCard:
        """Change fields of a version's card as it is by now, for others may have written it."""
        folder = self.folder / version
        with claimed(folder, "noted on") as claim:
            card = load_card(folder)
            card = card.model_copy(update=change(card))
            claim.check()
            folder.write_json(CARD, card.model_dump(mode="json"))
        return card

    def next_version(self) -> str:
        """The name of the version that comes after the newest: v1, v2, ..."""
        versions = self.versions()
        return f"v{int(versions[-1][1:]) + 1 if versions else 1}"


def load_card(folder: Folder) -> ModelCard:
    """The card of a model version; raises `StorageError` if it is damaged."""
    try:
        return ModelCard.model_validate(folder.read_json(CARD))
    except ValueError as error:
        raise StorageError(f"{folder}/{CARD} is damaged: {error}") from None


def describe(G: Generator) -> GeneratorConfig:
    """What is needed to build a generator like `G`."""
    return GeneratorConfig(
        model=G.config,
        resolution=G.resolution,
        channels=G.channels,
        class_names=G.class_names,
        tables=G.tables,
        folded=G.conv_out.u is None,
    )


def describe_discriminator(D: Discriminator) -> DiscriminatorConfig:
    """What is needed to build a discriminator like `D`."""
    return DiscriminatorConfig(
        model=D.config, resolution=D.resolution, channels=D.channels, n_classes=D.n_classes
    )


def weights_of(network: nn.Module) -> bytes:
    """A network's state as the content of a safetensors file."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    return save(state)


def blank_generator(config: GeneratorConfig) -> Generator:
    """A generator as described, whose weights are still to be filled in."""
    G = Generator(
        _quick_to_draw(config.model),
        resolution=config.resolution,
        channels=config.channels,
        n_classes=len(config.class_names),
    )
    G.config, G.class_names = config.model, list(config.class_names)
    if config.tables:
        G.add_tables(config.tables)
    if config.folded:
        G.fold_spectral_norms()
    return G


def blank_discriminator(config: DiscriminatorConfig) -> Discriminator:
    """A discriminator as described, whose weights are still to be filled in."""
    D = Discriminator(
        _quick_to_draw(config.model),
        resolution=config.resolution,
        channels=config.channels,
        n_classes=config.n_classes,
    )
    D.config = config.model
    return D


def _quick_to_draw(config: ModelConfig) -> ModelConfig:
    # Orthogonal weights take longer to draw than to load; here they are overwritten anyway.
    return config.model_copy(update={"init": "normal"})


def split_reference(reference: str) -> tuple[str, str]:
    """Name and version of a reference such as `digits@v3`; `digits` alone is `digits@best`."""
    name, at, version = reference.rpartition("@")
    return (name, version) if at and "/" not in version else (reference, BEST)


def find_model(reference: str, root: str | None = None) -> Folder:
    """The folder of a model version, by `NAME@VERSION`, `NAME@ALIAS`, `NAME`, path or URI.

    Raises `StorageError` if there is none.
    """
    name, version = split_reference(reference)
    folder = locate("models", name, root)
    if folder.exists(CARD):  # A path that leads to one version.
        return folder
    return folder / ModelStore(name, root).resolve(version)


def read_generator_config(folder: Folder) -> GeneratorConfig:
    """What a version's generator is like, without its weights; raises `StorageError` if damaged."""
    return _read_config(folder, CONFIG, GeneratorConfig)


def model_name(folder: Folder) -> str:
    """NAME@VERSION of a model version's folder."""
    return f"{folder.parent.name}@{folder.name}"


def weights_sha256(folder: Folder) -> str:
    """SHA-256 of a model version's weights file; reads it all, so keep the answer."""
    return hashlib.sha256(folder.read_bytes(WEIGHTS)).hexdigest()


def noted_sha256(folder: Folder) -> str:
    """The same as noted when the version was made, where there is such a note."""
    if folder.exists(WEIGHTS_SHA256):
        return folder.read_bytes(WEIGHTS_SHA256).decode().strip()
    return weights_sha256(folder)


def load_generator(
    reference: str, *, root: str | None = None, device: torch.device | str = "cpu"
) -> Generator:
    """A generator from the model store, in evaluation mode.

    `reference` is `NAME@ALIAS` (`digits@best`), `NAME@VERSION`, `NAME` (the best), or the path or
    URI of a version's folder. ``G(z, class_ids)`` gives images in [-1, 1], `[N, C, H, W]`;
    ``G.sample(class_ids, seed=0, truncation=0.5)`` gives uint8 `[N, H, W, C]`. Class names are in
    ``G.class_names``. Raises `StorageError` if there is no such model or its files are damaged.
    """
    folder = find_model(reference, root)
    G = blank_generator(read_generator_config(folder))
    _fill(G, folder, WEIGHTS, CONFIG)
    return G.to(device).eval().requires_grad_(False)


def load_discriminator(
    reference: str, *, root: str | None = None, device: torch.device | str = "cpu"
) -> Discriminator:
    """The discriminator that was imported with a model, in evaluation mode.

    ``D(images, class_ids)`` gives logits. Raises `StorageError` if there is no such model, or none
    came with it.
    """
    folder = find_model(reference, root)
    if not folder.exists(D_CONFIG):
        raise StorageError(
            f"model {reference} has no discriminator: only jobs/import_weights.py --discriminator"
            " puts one into the store"
        )
    D = blank_discriminator(_read_config(folder, D_CONFIG, DiscriminatorConfig))
    _fill(D, folder, D_WEIGHTS, D_CONFIG)
    return D.to(device).eval().requires_grad_(False)


C = TypeVar("C", bound=BaseModel)


def _read_config(folder: Folder, file: str, kind: type[C]) -> C:
    try:
        return kind.model_validate(folder.read_json(file))
    except ValueError as error:
        raise StorageError(f"{folder}/{file} is damaged: {error}") from None


def _fill(network: nn.Module, folder: Folder, file: str, config: str) -> None:
    try:
        network.load_state_dict(load(folder.read_bytes(file)))
    except Exception as error:  # safetensors raises its own kind, torch RuntimeError.
        raise StorageError(f"{folder}/{file} does not fit its {config}: {error}") from None
