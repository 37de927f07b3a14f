"""Are generated digits readable? Asks a classifier that has nothing to do with FID.

A support-vector classifier is fitted on the real scans. `make quickstart` ends with this check, and
tests use it: `python tests/readability.py --model digits@best`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.svm import SVC

from biggan.commands import parse, run_command
from biggan.data.dataset import Dataset
from biggan.models import load_generator

NEEDED = 0.85
SAMPLES = 1000


def fit_svm(dataset: Dataset) -> SVC:
    """A support-vector classifier of a dataset's images, as flat vectors in [0, 1]."""
    return SVC(C=10).fit(flat(dataset.images.numpy()), dataset.labels.numpy())


def flat(images: np.ndarray) -> np.ndarray:
    """Images (uint8) as vectors in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


def recognized(svm: SVC, images: np.ndarray, labels: np.ndarray) -> float:
    """Part of the images, from 0 to 1, to which the classifier gives the class they should be."""
    return float((svm.predict(flat(images)) == labels).mean())


@dataclass(frozen=True)
class Readability:
    """Check that samples of a digits model are read as the digits they should be."""

    model: str = "digits@best"
    """NAME@ALIAS or NAME@VERSION."""
    dataset: str = "digits"
    """The prepared digits."""
    storage: str | None = None
    """Storage root."""


def main() -> int:
    """Print the verdict; status 1 if too few samples are recognized."""
    command = parse(Readability)
    G = load_generator(command.model, root=command.storage)
    labels = np.arange(SAMPLES) % G.n_classes
    images = G.sample(labels.tolist(), seed=0, truncation=1.0)
    right = recognized(fit_svm(Dataset.open(command.dataset, command.storage)), images, labels)
    print(
        f"a classifier fitted on the real digits reads {right:.1%} of {SAMPLES:,} samples as what"
        f" they should be ({NEEDED:.0%} needed)"
    )
    return 0 if right >= NEEDED else 1


if __name__ == "__main__":
    run_command(main)
