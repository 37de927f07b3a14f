"""How a source becomes a dataset: the choices, and which images go into which shard."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from biggan.config import RESOLUTIONS
from biggan.data.images import Fit
from biggan.data.sources import Check, Source, SourceOptions
from biggan.errors import UserError
from biggan.latents import Stream, check_seed, rng

SHARD_IMAGES = 1024
SHARD_BYTES = 64 << 20
"""Most images of a shard, and most bytes of their pixels: what a worker holds at a time."""


class PreparationError(UserError):
    """A dataset that could not be prepared: what was wrong with the images, and the mend."""


@dataclass(frozen=True)
class Preparation:
    """How a source becomes a dataset."""

    source: str
    """`digits`, or a path or URI of labelled images of any kind that `data.sources` knows."""
    resolution: int
    """Side of the square images in pixels: 8, 16, 32, 64, 128, 256 or 512."""
    channels: int | None = None
    """3 (RGB) or 1 (grey); None: grey if a sample of the images shows no colour, else RGB."""
    fit: Fit = "crop"
    """Crop the longer side about the centre, or pad the shorter."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB that shows through transparency and fills padding."""
    max_rejected: float = 0.01
    """Largest part of the files that may be unusable, from 0 to 1."""
    drop_duplicates: bool = False
    """Keep only the first of images with equal pixels."""
    held_out: float = 0.0
    """Part of each class, from 0 (none) to 0.5, that is set aside for reference statistics."""
    seed: int = 0
    """Which images those are."""
    min_class_images: int = 2
    """Fewest images of a class. The classifier behind the reference learns from one and is checked
    on another."""
    min_accuracy: float | None = None
    """Least accuracy of that classifier on images it has not seen, from 0 to 1; below it, its
    features say nothing. None: clearly better than always the largest class."""
    allow: tuple[Check, ...] = ()
    """What may pass that is most likely a mistake."""
    options: SourceOptions = field(default_factory=SourceOptions)
    """How to read a source that does not explain itself."""

    def __post_init__(self) -> None:
        if self.resolution not in RESOLUTIONS:
            raise PreparationError(f"resolution {self.resolution}: must be one of {RESOLUTIONS}")
        if self.channels not in (1, 3, None):
            raise PreparationError(f"channels {self.channels}: must be 1 (grey) or 3 (RGB)")
        if len(self.background) != 3 or not all(0 <= part <= 255 for part in self.background):
            raise PreparationError(f"background {self.background}: must be RGB, 0 to 255 each")
        if not 0 <= self.max_rejected <= 1:
            raise PreparationError(f"max_rejected {self.max_rejected}: must be from 0 to 1")
        if not 0 <= self.held_out <= 0.5:
            raise PreparationError(
                f"held_out {self.held_out}: must be from 0 (none) to 0.5 (half of each class)"
            )
        if self.min_class_images < 1:
            raise PreparationError(f"min_class_images {self.min_class_images}: must be 1 or more")
        for check in set(self.allow) - set(get_args(Check)):
            raise PreparationError(f"allow {check!r}: must be of {', '.join(get_args(Check))}")
        if self.min_accuracy is not None and not 0 <= self.min_accuracy <= 1:
            raise PreparationError(f"min_accuracy {self.min_accuracy}: must be from 0 to 1")
        check_seed(self.seed)

    def settings(self) -> dict[str, Any]:
        """The choices that shape the dataset, for `dataset.json`; those off by default if taken."""
        taken: dict[str, Any] = {"fit": self.fit, "background": list(self.background)}
        if self.drop_duplicates:
            taken["drop_duplicates"] = True
        if self.held_out:
            taken |= {"held_out": self.held_out, "seed": self.seed}
        if "empty-images" in self.allow:
            taken["allow"] = ["empty-images"]
        return taken


class Plan:
    """Which items go into which shard.

    Runs of neighbours that are cheap to read together stay together, and are dealt out shuffled: a
    part file is then a sample of the whole, and who streams the parts sees all classes.
    """

    def __init__(self, n: int, run_length: int, image_bytes: int) -> None:
        """Deal `n` items out, in runs of `run_length`, for images of so many bytes."""
        size = max(1, min(SHARD_IMAGES, SHARD_BYTES // image_bytes))
        pieces = -(-run_length // size)  # A run longer than a shard is dealt in equal pieces.
        self._n, self._run = n, run_length
        self._piece = -(-run_length // pieces)
        starts = np.arange(0, n, run_length)[:, None] + np.arange(0, run_length, self._piece)
        starts = starts[starts < n]
        self._starts = starts[rng(0, Stream.DATA_ORDER).permutation(len(starts))]
        self._each = size // self._piece

    def __len__(self) -> int:
        return -(-len(self._starts) // self._each)

    def items(self, shard: int) -> np.ndarray:
        """The items of a shard, in the order of its rows: int64."""
        starts = self._starts[shard * self._each : (shard + 1) * self._each]
        items = (starts[:, None] + np.arange(self._piece)).ravel()
        ends = np.minimum(starts - starts % self._run + self._run, self._n)
        return items[items < np.repeat(ends, self._piece)]

    def sample(self, size: int) -> np.ndarray:
        """About `size` items from all over: a few neighbours of each of eight shards' firsts."""
        shards = np.unique(np.linspace(0, len(self) - 1, 8).astype(int)).tolist()
        share = -(-size // len(shards))
        return np.concatenate([self.items(shard)[:share] for shard in shards])


def plan_key(preparation: Preparation, source: Source) -> str:
    """Twelve hex digits that name what will be written: the same choices, the same images."""
    total = hashlib.sha256()
    choices = [preparation.resolution, preparation.channels, preparation.settings()]
    total.update(json.dumps([choices, source.description, list(source.classes)]).encode())
    total.update(source.labels.tobytes())
    if source.held_out is not None:
        total.update(np.packbits(source.held_out).tobytes())
    for line in _identity(source):
        total.update(line.encode() + b"\n")
    return total.hexdigest()[:12]


def _identity(source: Source) -> Iterator[str]:
    """What tells a source from one that was changed since, as far as it costs no reading."""
    root = str(source.description.get("uri", ""))
    yield _stamp(root)
    if source.run_length > 1:
        return  # Rows of a container: its own stamp is all there is.
    for start in range(0, len(source), 1 << 16):
        for ref in source.refs(np.arange(start, min(start + (1 << 16), len(source)))):
            yield f"{ref} {_stamp(f'{root}/{ref}')}"


def _stamp(path: str) -> str:
    """Size and time of change of a file on disk."""
    try:
        found = os.stat(path)  # noqa: PTH116  # A million times: Path takes three times as long.
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"
