"""Truncated latents, and the batch-norm moments that belong to them (section 3.1 and appendix D).

Narrower latents shift the statistics of every layer, so a generator is best sampled with moments
collected at the very truncation. A model therefore carries tables of them, one a truncation, and
mixes the two nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from biggan.errors import UserError
from biggan.latents import check_truncation, sample_z


class TruncationTables(BaseModel):
    """The truncations that a generator has tables of moments for, and what they mean to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    truncations: tuple[float, ...]
    """Ascending; a table each, before the moments of the untruncated latent."""
    convention: Literal["threshold", "scale"] = "threshold"
    """threshold: components are resampled until they lie in [-t, t]. scale: they are t times a
    normal within [-2, 2], as in the BigGAN-deep that its authors released."""
    images: int = 0
    """Images that each table was collected over; 0: not known."""

    def latents(self, seeds: Sequence[int], z_dim: int, truncation: float | None) -> torch.Tensor:
        """Latents for sampling, one a seed: float32 `[len(seeds), z_dim]`; raises `UserError`."""
        if self.convention == "threshold":
            return sample_z(seeds, z_dim, truncation)
        scale = 1.0 if truncation is None else check_truncation(truncation)
        if scale > 1:
            raise UserError(
                f"truncation is {truncation}: this model scales its latents by it, at most by 1"
            )
        return scale * sample_z(seeds, z_dim, 2.0)

    @property
    def untruncated(self) -> float:
        """The truncation that has the moments of None."""
        # From twice the last threshold on, nothing is cut off any more.
        return 1.0 if self.convention == "scale" else 2 * self.truncations[-1]

    def mix(self, truncations: Sequence[float | None]) -> torch.Tensor:
        """Weights of the tables, and last of the untruncated moments: float `[N, tables + 1]`."""
        row = self._threshold_row if self.convention == "threshold" else self._scale_row
        rows = {t: row(t) for t in set(truncations)}
        return torch.tensor([rows[t] for t in truncations])

    def used(self, truncation: float | None) -> bool:
        """Whether a table has a part in the moments for a truncation."""
        return bool(self.mix([truncation])[0, -1] < 1)

    def _threshold_row(self, truncation: float | None) -> list[float]:
        places = [*self.truncations, self.untruncated]
        t = places[-1] if truncation is None else min(max(truncation, places[0]), places[-1])
        above = next(i for i, place in enumerate(places) if t <= place)
        weights = [0.0] * len(places)
        below = max(above - 1, 0)
        share = (t - places[below]) / (places[above] - places[below]) if above else 1.0
        weights[below] += 1 - share
        weights[above] += share
        return weights

    def _scale_row(self, truncation: float | None) -> list[float]:
        # The released code's arithmetic, in which the two weights are swapped, rounding included.
        n = len(self.truncations)
        t = self.untruncated if truncation is None else truncation
        fraction, whole = math.modf(t / (1.0 / (n - 1)))
        weights = [0.0] * (n + 1)
        if fraction:
            weights[int(whole)], weights[int(whole) + 1] = fraction, 1 - fraction
        else:
            weights[int(whole)] = 1.0
        return weights
