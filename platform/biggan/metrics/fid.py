"""FID of a generator against a dataset, and the protocol that makes two FIDs comparable."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from biggan.data.dataset import Dataset
from biggan.latents import ClassSampler
from biggan.metrics.extractors import Extractor
from biggan.metrics.frechet import Moments, frechet_distance
from biggan.networks import Generator
from biggan.parallel import Workers
from biggan.pixels import to_uint8
from biggan.storage import Folder, StorageError

EVALUATION_SEED = 1 << 40
"""Image i of an evaluation has seed EVALUATION_SEED + i, far from the seeds people type."""


@dataclass(frozen=True)
class Reference:
    """The dataset's side of FID: moments of its images' features, taken once at preparation."""

    mean: Tensor
    covariance: Tensor
    count: int
    extractor_fingerprint: str

    @classmethod
    def measure(cls, dataset: Dataset, extractor: Extractor) -> Self:
        """Moments over every image of `dataset`."""
        moments = Moments(extractor.dim)
        for images in dataset.images.split(512):
            moments.update(extractor(images).features)
        return cls(moments.mean, moments.covariance, moments.count, extractor.fingerprint)

    def save(self, folder: Folder, extractor: str) -> None:
        """Write `reference/EXTRACTOR.npz` into a dataset's folder."""
        file = io.BytesIO()
        np.savez(
            file,
            mean=self.mean.numpy(),
            covariance=self.covariance.numpy(),
            count=self.count,
            extractor_fingerprint=self.extractor_fingerprint,
        )
        folder.write_bytes(f"reference/{extractor}.npz", file.getvalue())

    @classmethod
    def load(cls, folder: Folder, extractor: Extractor) -> Self:
        """Read a dataset's reference; raises `StorageError` if absent or of another extractor."""
        file = f"reference/{extractor.name}.npz"
        try:
            content = np.load(io.BytesIO(folder.read_bytes(file)), allow_pickle=False)
        except FileNotFoundError:
            raise StorageError(f"{folder}/{file} is missing: prepare the dataset again") from None
        if str(content["extractor_fingerprint"]) != extractor.fingerprint:
            raise StorageError(
                f"{folder}/{file} was made with another extractor than the dataset now has:"
                " prepare the dataset again with --overwrite"
            )
        mean, covariance = (torch.from_numpy(content[key]) for key in ("mean", "covariance"))
        return cls(mean, covariance, int(content["count"]), extractor.fingerprint)


@dataclass(frozen=True)
class FID:
    """A Frechet distance with the protocol it was measured under."""

    value: float
    extractor: str
    extractor_fingerprint: str
    dataset_fingerprint: str
    reference_count: int
    num_samples: int
    truncation: float | None
    """None: latents were not truncated."""
    standing_statistics: int
    """Images the batch-norm moments were recomputed over; 0: the average kept in training."""
    tables: dict[str, Any] | None
    """The `TruncationTables` whose moments served; None: those of the untruncated latent did."""

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything but the value: two FIDs compare only if this is equal."""
        return {key: value for key, value in asdict(self).items() if key != "value"}

    def __str__(self) -> str:
        return (
            f"FID {self.value:.3f} ({self.extractor} features, {self.num_samples} samples against"
            f" {self.reference_count} images)"
        )


class Evaluator:
    """Measures generators of one dataset with one extractor."""

    def __init__(self, dataset: Dataset, extractor: Extractor) -> None:
        """Raises `StorageError` if the dataset has no reference for the extractor."""
        self.extractor = extractor
        self.reference = Reference.load(dataset.folder, extractor)
        self.class_sampler: ClassSampler = dataset.class_sampler
        self.dataset_fingerprint = dataset.info.fingerprint

    def fid(
        self,
        G: Generator,
        workers: Workers,
        *,
        num_samples: int,
        batch_size: int = 256,
        truncation: float | None = None,
        standing_statistics: int = 0,
    ) -> FID:
        """FID of `G` over `num_samples` images, each worker generating its share.

        Classes occur in the dataset's proportions. `standing_statistics` is recorded, not applied.
        Every worker gets the same result, which does not depend on their number (to rounding).
        """
        moments = Moments(self.extractor.dim, workers.device)
        share = workers.share(num_samples)
        seeds = range(EVALUATION_SEED + share.start, EVALUATION_SEED + share.stop)
        labels = self.class_sampler.spread(num_samples)[share]
        for i in range(0, len(seeds), batch_size):
            z = G.latents(seeds[i : i + batch_size], truncation).to(workers.device)
            images = _generate(G, z, labels[i : i + batch_size].to(workers.device), truncation)
            moments.update(self.extractor(images).features)
        workers.sum(moments.sums)
        reference = self.reference
        tables = G.tables if G.tables and G.tables.used(truncation) else None
        value = frechet_distance(
            moments.mean.cpu(), moments.covariance.cpu(), reference.mean, reference.covariance
        )
        return FID(
            value=value,
            extractor=self.extractor.name,
            extractor_fingerprint=self.extractor.fingerprint,
            dataset_fingerprint=self.dataset_fingerprint,
            reference_count=reference.count,
            num_samples=num_samples,
            truncation=truncation,
            standing_statistics=standing_statistics,
            tables=tables.model_dump(mode="json") if tables else None,
        )


@torch.inference_mode()
def _generate(G: Generator, z: Tensor, labels: Tensor, truncation: float | None) -> Tensor:
    return to_uint8(G(z, labels, truncation))
