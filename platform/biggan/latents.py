"""Random numbers: which latents, labels, flips and data order a seed stands for.

All draws come from Philox, a counter-based generator (Salmon et al. 2011), keyed by what they are
for. There is no hidden state: step t's draws are a function of (seed, t), and an image's latent is
a function of its own seed. So a resumed run draws what the uninterrupted one would have drawn, any
number of workers draws what one would have drawn, and an image does not depend on its neighbours
in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

from biggan.errors import UserError

MAX_SEED = 2**63 - 1


class Stream(IntEnum):
    """What a draw is for. Streams of one seed are independent of each other."""

    SAMPLE = 0
    DATA_ORDER = 1
    FLIPS = 2
    D_LATENTS = 3
    G_LATENTS = 4
    STANDING_STATISTICS = 5
    SPLIT = 6
    CLASSIFIER = 7
    D_NOISE = 8
    G_NOISE = 9
    GUARD = 10
    CLASS_ORDER = 11
    MEASURES = 12
    WINDOW_ORDER = 13
    CANARY = 14


def rng(seed: int, stream: Stream, counter: int = 0) -> np.random.Generator:
    """The generator for draw number `counter` of a stream; a pure function of its arguments."""
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter << 128))


def sample_z(seeds: Sequence[int], z_dim: int, truncation: float | None = None) -> torch.Tensor:
    """Latents for sampling, one a seed: float32 `[len(seeds), z_dim]`.

    With `truncation` t > 0 each component is a standard normal conditioned on |z| <= t, which is
    what resampling until it fits gives (paper, section 3.1). It is drawn by inverting the
    distribution function, so that z moves smoothly as t does. None is the untruncated normal.
    Raises `UserError` for a seed or truncation out of range.
    """
    draws = np.empty((len(seeds), z_dim))
    for row, seed in zip(draws, seeds, strict=True):
        rng(check_seed(seed), Stream.SAMPLE).random(out=row)
    uniform = torch.from_numpy(draws)
    if truncation is not None:
        below = torch.special.ndtr(torch.tensor(-check_truncation(truncation)).double())
        uniform = below + uniform * (1 - 2 * below)
    # random() includes 0, whose normal quantile is minus infinity.
    z: torch.Tensor = torch.special.ndtri(uniform.clamp(min=torch.finfo(torch.float64).tiny))
    return z.float()


def check_seed(seed: int) -> int:
    """Return `seed` if it is usable; raises `UserError` otherwise."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed {seed}: must be from 0 to {MAX_SEED}")
    return seed


def check_truncation(truncation: float) -> float:
    """Return `truncation` if it is usable; raises `UserError` otherwise."""
    if not 0 < truncation < np.inf:
        raise UserError(
            f"truncation is {truncation}, must be a finite number above 0 (0.5 gives typical,"
            " 2 varied images), or None for no truncation"
        )
    return truncation


class ClassSampler:
    """Draws class ids in the proportions in which the classes occur in the dataset."""

    def __init__(self, counts: Sequence[int]) -> None:
        """`counts` are the images of each class; at least one must be positive."""
        self._cumulative = np.cumsum(counts) / np.sum(counts)

    def draw(self, generator: np.random.Generator, n: int) -> torch.Tensor:
        """`n` independent class ids: int64 `[n]`."""
        ids = np.searchsorted(self._cumulative, generator.random(n), side="right")
        return torch.from_numpy(ids.astype(np.int64))

    def spread(self, n: int) -> torch.Tensor:
        """`n` class ids in the classes' proportions without sampling noise, ascending."""
        quantiles = (np.arange(n) + 0.5) / n
        ids = np.searchsorted(self._cumulative, quantiles, side="right")
        return torch.from_numpy(ids.astype(np.int64))
