"""Interpolation: the images between two latents and two classes (arXiv 1809.11096, figure 8)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from biggan.errors import UserError
from biggan.networks import Generator


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """From `a` to `b` (`[D]`) on the great circle through both (Shoemake 1985), at `t` `[T]`.

    The angle and the length change evenly: `[T, D]`. A straight line between two latents would
    pass nearer to the origin than any latent that G was trained on. Between opposites, all ways
    round are equally short; the same one is always taken.
    """
    t, start, end = t.double()[:, None], a.double(), b.double()
    length = torch.lerp(start.norm(), end.norm(), t)
    start, end = (F.normalize(v, dim=0) for v in (start, end))
    cosine = start @ end
    across = end - cosine * start
    angle = torch.atan2(across.norm(), cosine)
    if across.norm() < 1e-7:  # Parallel or opposite: the axis that start is farthest from.
        axis = start.abs().argmin()
        across = -start[axis] * start
        across[axis] += 1
    turned = torch.cos(t * angle) * start + torch.sin(t * angle) * F.normalize(across, dim=0)
    return (length * turned).to(a.dtype)


def interpolate(
    G: Generator,
    start: tuple[int, int],
    end: tuple[int, int],
    steps: int = 8,
    truncation: float | None = None,
) -> np.ndarray:
    """Images on the way between two (seed, class id) pairs: uint8 `[steps, H, W, channels]`.

    The first and last are what `G.sample` gives for the pairs. Latents are interpolated by `slerp`,
    class embeddings linearly. Raises `UserError` for a seed, class or truncation out of range, and
    for fewer than 2 steps.
    """
    if steps < 2:
        raise UserError(f"{steps} steps: must be 2 or more, for both ends are among them")
    seeds, ids = zip(start, end, strict=True)
    G.check_classes(ids)
    t = torch.linspace(0, 1, steps)
    z_start, z_end = G.latents(seeds, truncation)
    class_start, class_end = F.one_hot(torch.tensor(ids), G.n_classes).float()
    mixtures = torch.lerp(class_start, class_end, t[:, None])
    return G.render(slerp(z_start, z_end, t), mixtures, [truncation] * steps)
