"""What features and class logits say of generated images, beside FID.

All take what one pass of an extractor has found, features `[N, dim]` and logits `[N, K]`, and
compute in float64, in blocks, so that 50,000 images of 2,048 features fit. Where subsets are drawn,
they are a function of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from biggan.errors import UserError
from biggan.latents import Stream, rng
from biggan.metrics.frechet import Moments, frechet_distance

BLOCK = 2**24
"""Distances held at once: 128 MiB of float64."""
TILE = 1024
"""Rows brought to float64 at once to be multiplied."""


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance, KID from Inception features: its mean and deviation over subsets.

    The unbiased estimate of the squared MMD (Binkowski et al. 2018, arXiv 1801.01401, section 4.1;
    Gretton et al. 2012, eq. 3) under the kernel (x . y / dim + 1)^3, so it may lie below 0. Of
    `subset_size`, no more are drawn than there are; one that takes all has a deviation of 0. Tables
    often show it times 1,000.
    """
    size = min(subset_size, len(real), len(fake))
    if size < 2 or subsets < 1:
        raise UserError(
            f"a kernel distance of {len(fake)} images against {len(real)}, in {subsets} subsets of"
            f" {subset_size}: needs 2 images or more on each side, and 1 subset or more"
        )
    draws = rng(seed, Stream.MEASURES)
    if size == len(real) == len(fake):
        subsets = 1  # All of them are the same.
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        x, y = (
            side[torch.from_numpy(draws.choice(len(side), size, replace=False)).to(side.device)]
            for side in (real, fake)
        )
        values[i] = _mmd(x.double(), y.double())
    return values.mean().item(), values.std(correction=0).item()


def _mmd(x: Tensor, y: Tensor) -> float:
    n = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
    return float(within / (n * (n - 1)) - 2 * kernel(x, y).mean())


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = 0) -> tuple[float, float]:
    """Inception Score, exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, arXiv 1606.03498).

    From 1 to the number of classes: mean and deviation over `splits` parts of the images, or as
    many as there are images. They are shuffled by `seed` first, because samples often come ordered
    by class; None takes them as they come.
    """
    n = len(logits)
    splits = min(splits, n)
    if splits < 1:
        raise UserError(f"an Inception Score of {n} images in {splits} parts: needs 1 or more")
    log_p = logits.double().log_softmax(1)
    if seed is not None:
        log_p = log_p[torch.from_numpy(rng(seed, Stream.MEASURES).permutation(n)).to(log_p.device)]
    scores = torch.empty(splits, dtype=torch.float64)
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        log_q = part.logsumexp(0) - math.log(len(part))
        scores[i] = (part.exp() * (part - log_q)).sum(1).mean().exp()
    return scores.mean().item(), scores.std(correction=0).item()


@dataclass(frozen=True)
class Manifold:
    """How fakes lie among the balls around reals that reach to a near neighbour, and conversely."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: Tensor, fake: Tensor, k: int = 3, k_coverage: int = 5) -> Manifold:
    """`precision_recall(k)` and `density_coverage(k_coverage)` for less than both."""
    precision, density, coverage = _balls(real, fake, k, k_coverage)
    recall, _, _ = _balls(fake, real, k, k)
    return Manifold(precision, recall, density, coverage)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).

    Precision is the part of the fakes in any ball around a real image that reaches to its k-th
    nearest other; recall is the same with the sides exchanged. Raises `UserError` for k images or
    fewer on a side.
    """
    return _balls(real, fake, k, k)[0], _balls(fake, real, k, k)[0]


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, eq. 3 and 4).

    Density is the number of real balls that a fake lies in, over k, in the mean; coverage is the
    part of the real balls with a fake in them. As in the authors' code a ball lacks its surface, so
    that a set has density 1 in itself. Raises `UserError` for k real images or fewer.
    """
    return _balls(real, fake, k, k)[1:]


def _balls(
    centres: Tensor, points: Tensor, k_closed: int, k_open: int
) -> tuple[float, float, float]:
    """Part of the points in any closed ball; density and coverage of the points in open ones."""
    n, m, most = len(centres), len(points), max(k_closed, k_open)
    if min(k_closed, k_open) < 1 or n <= most or m < 1:
        raise UserError(
            f"{most} nearest neighbours among {n} images, for {m}: needs at least {most + 1} and 1;"
            " take more samples"
        )
    inside = torch.zeros(m, dtype=torch.bool, device=points.device)
    hits = covered = 0
    for rows, squared in _squared_distances(centres, centres):
        diagonal = torch.arange(rows.start, rows.stop, device=squared.device)
        squared[diagonal - rows.start, diagonal] = torch.inf
        radii = squared.topk(most, largest=False).values
        across = _block(centres[rows], points)
        inside |= (across <= radii[:, k_closed - 1 : k_closed]).any(0)
        near = across < radii[:, k_open - 1 : k_open]
        hits += int(near.sum())
        covered += int(near.any(1).sum())
    return inside.double().mean().item(), hits / (k_open * m), covered / n


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x, and their squared distances `[rows, len(y)]` to all of y, block by block."""
    rows = max(1, BLOCK // len(y))
    for start in range(0, len(x), rows):
        here = slice(start, min(start + rows, len(x)))
        yield here, _block(x[here], y)


def _block(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances `[len(x), len(y)]` in float64: |x|^2 + |y|^2 - 2 x . y."""
    x = x.double()
    out = torch.empty(len(x), len(y), dtype=torch.float64, device=x.device)
    for start in range(0, len(y), TILE):
        tile = y[start : start + TILE].double()
        columns = out[:, start : start + TILE]
        torch.addmm(tile.square().sum(1), x, tile.T, alpha=-2, out=columns)
    return out.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


@dataclass(frozen=True)
class IntraClassFID:
    """Frechet distances between the real and the generated images of each class."""

    mean: float | None
    """Over the classes that have one; None if none has."""
    per_class: tuple[float | None, ...]
    """None for a class with fewer than 2 images on a side, which has no covariance."""


def intra_class_fid(
    real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor, n_classes: int
) -> IntraClassFID:
    """FID within each class (Miyato and Koyama 2018, arXiv 1802.05637, section 4)."""
    values: list[float | None] = []
    for class_id in range(n_classes):
        x, y = real[real_labels == class_id], fake[fake_labels == class_id]
        values.append(_distance(x, y) if min(len(x), len(y)) > 1 else None)
    known = [value for value in values if value is not None]
    return IntraClassFID(sum(known) / len(known) if known else None, tuple(values))


def _distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of features. For fewer images than dimensions, without covariances.

    With X, Y the centred features over (N - 1)^(1/2), tr (C1 C2)^(1/2) is the sum of the singular
    values of X Y^T, which is only as large as there are images.
    """
    x, y = x.double(), y.double()
    if min(len(x), len(y)) > x.shape[1]:
        sides = [Moments(x.shape[1], x.device) for _ in range(2)]
        for moments, features in zip(sides, (x, y), strict=True):
            moments.update(features)
        a, b = sides
        return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    means = x.mean(0), y.mean(0)
    a, b = (
        (side - mean) / (len(side) - 1) ** 0.5 for side, mean in zip((x, y), means, strict=True)
    )
    cross = torch.linalg.svdvals(a @ b.T).sum()
    gap = (means[0] - means[1]).square().sum()
    return float(gap + a.square().sum() + b.square().sum() - 2 * cross)


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Part of the images, in [0, 1], that a classifier gives the class they were made for.

    The judge is the dataset's own classifier, which has been trained on real images alone.
    """
    if len(labels) == 0 or len(logits) != len(labels):
        raise UserError(f"{len(logits)} logits for {len(labels)} labels: must be as many, not 0")
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()
