"""FID of a generator against a dataset, in training and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from biggan.config import EvalConfig
from biggan.data.dataset import Dataset
from biggan.data.parts import Split
from biggan.latents import ClassSampler
from biggan.metrics.extractors import Extractor, load_extractor
from biggan.metrics.frechet import Moments, frechet_distance
from biggan.metrics.protocol import ROUNDING, Protocol
from biggan.metrics.reference import Reference, open_split
from biggan.networks import Generator
from biggan.parallel import Workers
from biggan.pixels import to_uint8
from biggan.storage import Folder

EVALUATION_SEED = 1 << 40
"""Image i of an evaluation has seed EVALUATION_SEED + i, far from the seeds people type."""
REPEAT_SEEDS = 1 << 32
"""What a repetition's seeds lie beyond those of the one before it."""


@dataclass(frozen=True)
class Draw:
    """The images that a measure is taken over, in batches that do not depend on who makes them.

    Classes occur in the proportions of `counts`. An image comes of the same batch whichever worker
    generates it, so that the measure is the same for any number of them.
    """

    counts: tuple[int, ...]
    """Real images of each class."""
    num_samples: int
    batch_size: int
    truncation: float | None = None
    repeat: int = 0
    """Which of several independent draws."""

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    @cached_property
    def labels(self) -> Tensor:
        """The class of every image, int64 `[num_samples]`, ascending."""
        return ClassSampler(self.counts).spread(self.num_samples)

    def part(self, batch: int) -> slice:
        """The images of a batch."""
        start = batch * self.batch_size
        return slice(start, min(start + self.batch_size, self.num_samples))

    @torch.inference_mode()
    def images(self, G: Generator, batch: int) -> Tensor:
        """A batch's images: uint8 `[n, C, H, W]`, on the generator's device."""
        part = self.part(batch)
        first = EVALUATION_SEED + self.repeat * REPEAT_SEEDS
        device = next(G.parameters()).device
        z = G.latents(range(first + part.start, first + part.stop), self.truncation)
        return to_uint8(G(z.to(device), self.labels[part].to(device), self.truncation))


@dataclass(frozen=True)
class FID:
    """A Frechet distance with the protocol it was measured under."""

    value: float
    protocol: Protocol = field(repr=False)

    def __str__(self) -> str:
        p = self.protocol
        return (
            f"FID {self.value:.3f} ({p.extractor} features, {p.num_samples} samples against"
            f" {p.reference_count} {p.reference_split.replace('_', '-')} images)"
        )


class Evaluator:
    """Measures generators of one dataset with one extractor."""

    def __init__(self, dataset: Dataset, extractor: Extractor, split: Split = "train") -> None:
        """Measures the dataset's reference if it has none yet.

        Raises `StorageError` if the dataset has no such part.
        """
        reals = open_split(dataset, split)
        self.extractor = extractor
        self.reference = Reference.of(reals, extractor)
        self.counts = tuple(reals.counts)
        self.split = split

    def fid(
        self,
        G: Generator,
        workers: Workers,
        *,
        num_samples: int,
        batch_size: int,
        truncation: float | None = None,
        standing_statistics: int = 0,
    ) -> FID:
        """FID of `G` over `num_samples` images, each worker generating every so many'th batch.

        `standing_statistics` is recorded, not applied. Every worker gets the same result, which
        depends on their number only in the order that float64 sums are added.
        """
        draw = Draw(self.counts, num_samples, batch_size, truncation)
        moments = Moments(self.extractor.dim, workers.device)
        for batch in range(workers.rank, len(draw), workers.size):
            moments.update(self.extractor(draw.images(G, batch)).features)
        workers.sum(moments.sums)
        value = frechet_distance(
            moments.mean.cpu(),
            moments.covariance.cpu(),
            self.reference.mean,
            self.reference.covariance,
        )
        return FID(value, self.protocol(G, draw, standing_statistics))

    def protocol(self, G: Generator, draw: Draw, standing_statistics: int) -> Protocol:
        """The protocol of a measure over the images of `draw`."""
        used = G.tables if G.tables and G.tables.used(draw.truncation) else None
        tables: dict[str, Any] | None = used.model_dump(mode="json") if used else None
        return Protocol(
            extractor=self.extractor.name,
            extractor_fingerprint=self.extractor.fingerprint,
            resize=self.extractor.resize,
            rounding=ROUNDING,
            reference_split=self.split,
            reference_fingerprint=self.reference.images_fingerprint,
            reference_count=self.reference.count,
            num_samples=draw.num_samples,
            truncation=draw.truncation,
            standing_statistics=standing_statistics,
            tables=tables,
        )


def open_extractor(config: EvalConfig, dataset: Folder, device: torch.device) -> Extractor:
    """The feature network that a run's settings ask for."""
    weights = config.inception_weights or None
    return load_extractor(config.extractor, dataset, device, inception_weights=weights)


def open_evaluator(dataset: Dataset, config: EvalConfig, device: torch.device) -> Evaluator:
    """The evaluator that a run's settings ask for."""
    extractor = open_extractor(config, dataset.folder, device)
    return Evaluator(dataset, extractor, config.reference)


def measure(
    G: Generator,
    dataset: Dataset,
    config: EvalConfig,
    *,
    num_samples: int,
    batch_size: int | None = None,
    truncation: float | None = None,
    standing: int = 0,
) -> FID:
    """FID alone, by a run's settings, in this process and on the device that the generator is on.

    `standing`: images that its standing statistics were collected over. By default `G.sample_batch`
    images are generated at a time.
    """
    device = next(G.parameters()).device
    return open_evaluator(dataset, config, device).fid(
        G,
        Workers(0, 1, device),
        num_samples=num_samples,
        batch_size=batch_size or G.sample_batch,
        truncation=truncation,
        standing_statistics=standing,
    )


@dataclass(frozen=True)
class Observed:
    """What a pass over generated images leaves: all that measures are computed from."""

    features: Tensor
    """float32 `[n, dim]`."""
    logits: Tensor | None
    """float32 `[n, K]`, where the extractor has classes."""
    judged: Tensor | None
    """float32 `[n, n_classes]`: logits of the dataset's own classifier, where there is one."""

    def among(self, class_ids: Sequence[int]) -> Observed:
        """The same, judged among some of the dataset's classes."""
        judged = None if self.judged is None else self.judged[:, list(class_ids)]
        return replace(self, judged=judged)


@torch.inference_mode()
def observe(
    G: Generator, extractor: Extractor, judge: Extractor | None, draw: Draw, batch: int
) -> Observed:
    """One batch of `draw`, seen by the extractor and by the dataset's classifier."""
    images = draw.images(G, batch)
    seen = extractor(images)
    if judge is None or judge.fingerprint == extractor.fingerprint:
        judged = seen.logits if judge else None
    else:
        judged = judge(images).logits
    logits, judged = (None if t is None else t.cpu() for t in (seen.logits, judged))
    return Observed(seen.features.cpu(), logits, judged)
