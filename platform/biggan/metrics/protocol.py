"""The protocol a number was measured under: two numbers compare only if it is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from biggan.data.parts import Split


@dataclass(frozen=True)
class Protocol:
    """Everything that a measure depends on beside the generator."""

    extractor: str
    extractor_fingerprint: str
    """SHA-256 of the feature network's weights."""
    resize: str
    """How images reach the extractor's size."""
    rounding: str
    """How a generator's output becomes 8 bits."""
    reference_split: Split
    """The images trained on, or those set aside."""
    reference_fingerprint: str
    """Fingerprint of the dataset's images that are compared with."""
    reference_count: int
    num_samples: int
    truncation: float | None
    """None: latents were not truncated."""
    standing_statistics: int
    """Images the batch-norm moments were recomputed over; 0: the average kept in training."""
    tables: dict[str, Any] | None
    """The `TruncationTables` whose moments served; None: those of the untruncated latent did."""

    def as_dict(self) -> dict[str, Any]:
        """As it stands in JSON files."""
        return asdict(self)


ROUNDING = "to nearest"
"""What `pixels.to_uint8` does."""

_EARLIER = {"resize": "none", "rounding": ROUNDING, "reference_split": "train"}
"""What measures of earlier versions had, whose protocols do not say it."""


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Where two protocols differ, for people; empty if their numbers compare.

    A key that one lacks is None in it.
    """
    a, b = _complete(a), _complete(b)
    keys = sorted(a.keys() | b.keys())
    return ", ".join(f"{k}: {a.get(k)} and {b.get(k)}" for k in keys if a.get(k) != b.get(k))


def _complete(protocol: Mapping[str, Any]) -> dict[str, Any]:
    complete = {**_EARLIER, **protocol}
    if "dataset_fingerprint" in complete:  # Its name in earlier versions.
        complete["reference_fingerprint"] = complete.pop("dataset_fingerprint")
    return complete


def digest(protocol: Mapping[str, Any]) -> str:
    """A short name for a protocol: equal exactly where `differences` finds none."""
    known = {key: value for key, value in _complete(protocol).items() if value is not None}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
