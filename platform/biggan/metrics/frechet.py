"""The Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017)."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.linalg.lapack import dpstrf, dsygst
from torch import Tensor

Array = NDArray[np.float64]


class Moments:
    """Streaming mean and covariance of feature vectors, in float64.

    Sums over parts can be added, so that several workers each see their share of the images.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        """Moments of no vectors of length `dim`."""
        # One buffer, so that a single all-reduce adds the sums of all workers: count, sum of x,
        # sum of x x^T.
        self.sums = torch.zeros(1 + dim + dim * dim, dtype=torch.float64, device=device)
        self.dim = dim

    def update(self, features: Tensor) -> None:
        """Add feature vectors `[n, dim]`; the more at once, the faster, a few hundred will do."""
        x = features.to(self.sums.device, torch.float64)
        self.sums[0] += len(x)
        self.sums[1 : 1 + self.dim] += x.sum(0)
        # In place: at 2,048 dimensions, a sum made anew is 32 MiB to write and to read again.
        self.sums[1 + self.dim :].view(self.dim, self.dim).addmm_(x.T, x)

    @property
    def count(self) -> int:
        """Vectors seen."""
        return int(self.sums[0])

    @property
    def mean(self) -> Tensor:
        """Mean `[dim]`."""
        return self.sums[1 : 1 + self.dim] / self.sums[0]

    @property
    def covariance(self) -> Tensor:
        """Covariance `[dim, dim]` over count - 1; raises ValueError for fewer than 2 vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.mean
        second = self.sums[1 + self.dim :].view(self.dim, self.dim)
        return (second - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), for float64 means `[d]`, covariances `[d, d]`.

    Singular covariances, such as those of fewer images than dimensions, are as exact as regular
    ones. Raises ValueError if a moment is not finite.
    """
    m1, c1, m2, c2 = (x.double().cpu().numpy() for x in (mean1, cov1, mean2, cov2))
    if not all(np.isfinite(x).all() for x in (m1, c1, m2, c2)):
        raise ValueError("a mean or covariance is not finite: look for NaN among the features")
    traces = np.trace(c1) + np.trace(c2)
    return float(np.square(m1 - m2).sum() + traces - 2 * _trace_of_root(c1, c2))


def _trace_of_root(c1: Array, c2: Array) -> float:
    """Trace of (C1 C2)^(1/2): the sum of the square roots of the eigenvalues of C1 C2.

    For regular covariances LAPACK finds those eigenvalues with one Cholesky factor and one
    symmetric problem. Else, with C1 = A A^T and C2 = B B^T, the roots are the singular values of
    A^T B: nothing is lost by squaring, and no root is taken of what is 0 but for rounding.
    """
    # A feature that never varies on one side adds nothing, and would make that side singular.
    alive = (c1.diagonal() > 0) & (c2.diagonal() > 0)
    if not alive.any():
        return 0.0
    if not alive.all():
        c1, c2 = (np.ascontiguousarray(c[alive][:, alive]) for c in (c1, c2))
    if _cholesky(c1) is not None and (lower := _cholesky(c2)) is not None:
        symmetric, _ = dsygst(c1, lower, itype=2, lower=1)  # L^T C1 L, where C2 = L L^T.
        eigenvalues: Array = scipy.linalg.eigvalsh(symmetric, check_finite=False)
        return float(np.sqrt(eigenvalues.clip(min=0)).sum())
    product = torch.from_numpy(_factor(c1).T @ _factor(c2))
    return float(torch.linalg.svdvals(product).sum())


def _cholesky(covariance: Array) -> Array | None:
    """L with L L^T = covariance; None if rounding alone could explain the variance of a feature."""
    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(covariance))
    left = lower.diagonal().square().numpy() / covariance.diagonal()
    return None if failed or not (left > _rounding(covariance)).all() else lower.numpy()


def _factor(covariance: Array) -> Array:
    """A `[d, rank]` with A A^T = covariance to rounding: Cholesky with complete pivoting.

    It works on correlations, so that features of small and of large scale count alike.
    """
    scale = np.sqrt(covariance.diagonal())
    correlation = covariance / np.outer(scale, scale)
    lower, pivots, rank, _ = dpstrf(correlation, tol=_rounding(covariance), lower=1)
    factor = np.empty((len(scale), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor * scale[:, None]


def _rounding(covariance: Array) -> float:
    """How far rounding may move a correlation in a factorization of this size."""
    return len(covariance) * float(np.finfo(np.float64).eps)
