"""All measures of a generator from one pass over its images, and the report that holds them.

FID, KID, Inception Score, precision and recall, density and coverage, and intra-class FID compare
the extractor's features; class accuracy is judged by the classifier that was trained on the
dataset's own labels and has never seen a generated image.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from biggan.metrics.fid import Draw, Observed
from biggan.metrics.frechet import Moments, frechet_distance
from biggan.metrics.measures import (
    class_accuracy,
    inception_score,
    intra_class_fid,
    kernel_distance,
    manifold,
)
from biggan.metrics.protocol import Protocol
from biggan.metrics.reference import Reference

MANIFOLD_IMAGES = 10_000
"""Images on either side, spread evenly, that precision, recall, density and coverage are taken
over: their cost grows with the square."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
SCORE_SPLITS = 10
NEIGHBOURS_PR, NEIGHBOURS_DC = 3, 5

LOWER_IS_BETTER = {"fid", "kid", "intra_class_fid"}


class Measure(BaseModel):
    """One number, and what it was measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    """Mean over repetitions, each from images of its own."""
    deviation: float | None
    """Standard deviation over repetitions: the noise of the measure. None: there was one."""
    values: list[float]
    """Each repetition's."""
    protocol: dict[str, Any]
    """Two numbers compare only if this is equal."""
    details: dict[str, Any] = {}
    """What else came out, of the first repetition."""


class Evaluation(BaseModel):
    """What `evaluation.json` holds: every measure of one generator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    """What was measured: `runs/NAME/checkpoint_...` or `NAME@VERSION`."""
    created: str
    repeats: int
    measures: dict[str, Measure]

    @property
    def value(self) -> float:
        """The FID."""
        return self.measures["fid"].value

    @property
    def protocol(self) -> dict[str, Any]:
        """The FID's protocol."""
        return self.measures["fid"].protocol

    def __str__(self) -> str:
        p = self.protocol
        reals = f"{p['reference_count']} {p['reference_split'].replace('_', '-')} images"
        fid = f"FID {self.value:.3f}" + _plus_minus(self.measures["fid"])
        return f"{fid} ({p['extractor']} features, {p['num_samples']} samples against {reals}" + (
            f", {self.repeats} repetitions)" if self.repeats > 1 else ")"
        )


def _plus_minus(measure: Measure) -> str:
    return "" if measure.deviation is None else f" +- {measure.deviation:.3f}"


def summary(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """A row a measure: name, value, standard deviation, and which way is better."""
    return [
        (
            name.replace("_", " "),
            f"{measure.value:.4f}",
            "-" if measure.deviation is None else f"{measure.deviation:.4f}",
            "lower" if name in LOWER_IS_BETTER else "higher",
        )
        for name, measure in evaluation.measures.items()
    ]


def report(
    subject: str, passes: Sequence[tuple[Draw, Observed]], reference: Reference, protocol: Protocol
) -> Evaluation:
    """Every measure of the images that one or several passes observed."""
    found = [measure_all(observed, draw.labels, reference) for draw, observed in passes]
    measures = {}
    for name, (_, settings, details) in found[0].items():
        values = [one[name][0] for one in found]
        measures[name] = Measure(
            value=statistics.fmean(values),
            deviation=statistics.stdev(values) if len(values) > 1 else None,
            values=values,
            protocol=protocol.as_dict() | settings,
            details=details,
        )
    return Evaluation(
        subject=subject,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        repeats=len(passes),
        measures=measures,
    )


Found = dict[str, tuple[float, dict[str, Any], dict[str, Any]]]
"""By name: value, the settings that belong to its protocol, and details."""


def measure_all(observed: Observed, labels: Tensor, reference: Reference) -> Found:
    """Every measure of one pass; those that this extractor or dataset has no ground for lack."""
    fakes, reals = observed.features, reference.features
    found: Found = {"fid": (fid_of(fakes, reference), {}, {})}
    size = min(KID_SUBSET_SIZE, len(reals), len(fakes))
    kid, within = kernel_distance(reals, fakes, KID_SUBSETS, size)
    settings = {"subsets": KID_SUBSETS, "subset_size": size, "reference_features": len(reals)}
    found["kid"] = kid, settings, {"deviation_of_subsets": within}
    if observed.logits is not None:
        score, spread = inception_score(observed.logits, SCORE_SPLITS)
        found["inception_score"] = score, {"splits": SCORE_SPLITS}, {"deviation_of_splits": spread}
    found |= _manifold_measures(_thin(reals), _thin(fakes))
    found |= _by_class(observed, labels, reference)
    return found


def fid_of(features: Tensor, reference: Reference) -> float:
    """FID from features `[n, dim]`."""
    moments = Moments(features.shape[1])
    for part in features.split(1024):
        moments.update(part)
    return frechet_distance(moments.mean, moments.covariance, reference.mean, reference.covariance)


def _thin(features: Tensor) -> Tensor:
    """At most `MANIFOLD_IMAGES` of them, spread evenly."""
    n = len(features)
    if n <= MANIFOLD_IMAGES:
        return features
    return features[torch.linspace(0, n - 1, MANIFOLD_IMAGES).round().long()]


def _manifold_measures(reals: Tensor, fakes: Tensor) -> Found:
    at = {"manifold_images": [len(reals), len(fakes)]}
    of = manifold(reals, fakes, NEIGHBOURS_PR, NEIGHBOURS_DC)
    return {
        "precision": (of.precision, at | {"neighbours": NEIGHBOURS_PR}, {}),
        "recall": (of.recall, at | {"neighbours": NEIGHBOURS_PR}, {}),
        "density": (of.density, at | {"neighbours": NEIGHBOURS_DC}, {}),
        "coverage": (of.coverage, at | {"neighbours": NEIGHBOURS_DC}, {}),
    }


def _by_class(observed: Observed, labels: Tensor, reference: Reference) -> Found:
    """Intra-class FID, and accuracy as judged by the dataset's classifier."""
    n_classes = int(max(labels.max(), reference.labels.max())) + 1
    found: Found = {}
    within = intra_class_fid(
        reference.features, reference.labels, observed.features, labels, n_classes
    )
    if within.mean is not None:
        classes = sum(value is not None for value in within.per_class)
        at = {"classes": classes, "reference_features": len(reference.features)}
        found["intra_class_fid"] = within.mean, at, {"by_class": list(within.per_class)}
    if observed.judged is not None:
        found["class_accuracy"] = class_accuracy(observed.judged, labels), {}, {}
    return found


def joined(parts: Sequence[Observed]) -> Observed:
    """What a whole pass observed, from its batches in order."""

    def join(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None])

    features = torch.cat([part.features for part in parts])
    return Observed(features, join([p.logits for p in parts]), join([p.judged for p in parts]))
