"""The dataset's side of every measure: features of its images, taken once and kept with it.

`reference/EXTRACTOR.npz` holds mean, covariance, count and the fingerprints of extractor and
images; `reference/EXTRACTOR.features.npz` the features and labels of up to `FEATURES_KEPT` images,
for the measures that need more than moments. A held-out part's files are named
`EXTRACTOR.held_out`, those of a selection of classes by its fingerprint too.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from biggan.data.dataset import Dataset
from biggan.data.parts import Split
from biggan.metrics.extractors import Extractor
from biggan.metrics.frechet import Moments
from biggan.storage import Folder, StorageError

FEATURES_KEPT = 50_000
"""Images whose features are kept, spread evenly over the dataset: all of CIFAR's."""
BATCH = 256


@dataclass(frozen=True)
class Reference:
    """Features of a dataset's images: their moments, and those of some of the images."""

    mean: Tensor
    """float64 `[dim]`."""
    covariance: Tensor
    """float64 `[dim, dim]`."""
    count: int
    features: Tensor
    """float32 `[n, dim]`, of n images of the dataset."""
    labels: Tensor
    """int64 `[n]`."""
    extractor_fingerprint: str
    images_fingerprint: str

    @classmethod
    def measure(cls, dataset: Dataset, extractor: Extractor) -> Self:
        """Features of every image of `dataset`."""
        moments = Moments(extractor.dim)
        n = len(dataset)
        kept = np.linspace(0, n - 1, min(n, FEATURES_KEPT)).round().astype(np.int64)
        features = torch.empty(len(kept), extractor.dim)
        for start in range(0, n, BATCH):
            found = extractor(dataset.images[start : start + BATCH]).features.cpu()
            moments.update(found)
            rows = np.flatnonzero((kept >= start) & (kept < start + BATCH))
            features[rows] = found[kept[rows] - start]
        return cls(
            moments.mean,
            moments.covariance,
            moments.count,
            features,
            dataset.labels[torch.from_numpy(kept)],
            extractor.fingerprint,
            dataset.fingerprint,
        )

    def save(self, folder: Folder, name: str) -> None:
        """Write `reference/NAME.npz` and `reference/NAME.features.npz` into a dataset's folder."""
        _write(folder, f"{name}.features", features=self.features, labels=self.labels)
        _write(
            folder,
            name,
            mean=self.mean,
            covariance=self.covariance,
            count=self.count,
            extractor_fingerprint=self.extractor_fingerprint,
            images_fingerprint=self.images_fingerprint,
        )

    @classmethod
    def load(cls, dataset: Dataset, extractor: Extractor) -> Self | None:
        """A dataset's reference, if there is one of these images by this extractor."""
        name = reference_name(dataset, extractor.name)
        try:
            moments, some = (_read(dataset.folder, part) for part in (name, f"{name}.features"))
        except FileNotFoundError:
            return None
        made_with = str(moments["extractor_fingerprint"]), str(moments["images_fingerprint"])
        if made_with != (extractor.fingerprint, dataset.fingerprint):
            return None
        mean, covariance = (torch.from_numpy(moments[key]) for key in ("mean", "covariance"))
        features, labels = (torch.from_numpy(some[key]) for key in ("features", "labels"))
        return cls(mean, covariance, int(moments["count"]), features, labels, *made_with)

    @classmethod
    def of(cls, dataset: Dataset, extractor: Extractor) -> Self:
        """A dataset's reference, measured and kept with the dataset if there is none yet."""
        if (found := cls.load(dataset, extractor)) is not None:
            return found
        measured = cls.measure(dataset, extractor)
        measured.save(dataset.folder, reference_name(dataset, extractor.name))
        return measured


def reference_name(dataset: Dataset, extractor: str) -> str:
    """What the files of a dataset's reference are called."""
    parts = [extractor]
    if dataset.info.is_subset:
        parts.append(dataset.fingerprint[:12])
    if dataset.split != "train":
        parts.append(dataset.split)
    return ".".join(parts)


def open_split(dataset: Dataset, split: Split) -> Dataset:
    """The part of a dataset that measures compare with; raises `StorageError` if it has none."""
    if split == dataset.split:
        return dataset
    if split == "held_out" and not sum(dataset.info.held_out):
        raise StorageError(
            f"dataset {dataset.folder.name} has no held-out images to compare with: prepare it with"
            " --held-out 0.1, or compare with its training images (--reference train)"
        )
    return dataset.of_split(split)


def _write(folder: Folder, name: str, **arrays: Any) -> None:
    file = io.BytesIO()
    np.savez(file, **arrays)
    folder.write_bytes(f"reference/{name}.npz", file.getvalue())


def _read(folder: Folder, name: str) -> dict[str, np.ndarray]:
    file = f"reference/{name}.npz"
    content = folder.read_bytes(file)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError) as error:
        raise StorageError(
            f"{folder}/{file} is damaged ({error}): delete it, and it is measured again"
        ) from None
