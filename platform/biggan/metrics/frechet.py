"""The Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor


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
        """Add feature vectors `[n, dim]`."""
        x = features.to(self.sums.device, torch.float64)
        self.sums[0] += len(x)
        self.sums[1 : 1 + self.dim] += x.sum(0)
        self.sums[1 + self.dim :] += (x.T @ x).flatten()

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

    The trace of (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric
    C1^(1/2) C2 C1^(1/2), which are those of C1 C2. That holds for singular covariances too.
    """
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root @ cov2 @ root)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return float(distance)
