"""scikit-learn's handwritten digits, which come with the installation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from biggan.data.sources.source import Sample, Source


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8), labels


def _scan(number: int) -> np.ndarray:
    scan: np.ndarray = _digits()[0][number]
    return scan


class DigitsSource(Source):
    """1,797 scans of 8x8 pixels in ten classes.

    (Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", test part; CC BY
    4.0.)
    """

    def __init__(self) -> None:
        self.classes = [str(digit) for digit in range(10)]
        self.labels = _digits()[1].astype(np.int32)

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        return {"kind": "digits"}

    def read(self, items: np.ndarray) -> Iterator[Sample]:
        """Scans by number."""
        for item in items.tolist():
            yield Sample(str(item), partial(_scan, item))
