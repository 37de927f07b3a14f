"""Interpolation: the images between others, as recipes (arXiv 1809.11096, figure 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from biggan.directions import Directions
from biggan.errors import UserError
from biggan.networks import Generator
from biggan.recipe import Recipe
from biggan.synthesis import embeddings, latents


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """From `a` to `b` (`[D]`) on the great circle through both (Shoemake 1985), at `t` `[T]`.

    The angle and the length change evenly: `[T, D]`. A straight line between two latents would
    pass nearer to the origin than any latent that G was trained on. Between opposites, all ways
    round are equally short; the same one is always taken.
    """
    t, start, end = t.double()[:, None], a.double(), b.double()
    length = torch.lerp(start.norm(), end.norm(), t)
    start, end = (F.normalize(v, dim=0) for v in (start, end))
    start = start if start.any() else end  # Zeros lie in no direction.
    cosine = start @ end
    across = end - cosine * start
    angle = torch.atan2(across.norm(), cosine)
    if across.norm() < 1e-7:  # Parallel or opposite: the axis that start is farthest from.
        axis = start.abs().argmin()
        across = -start[axis] * start
        across[axis] += 1
    turned = torch.cos(t * angle) * start + torch.sin(t * angle) * F.normalize(across, dim=0)
    return (length * turned).to(a.dtype)


def walk(
    G: Generator,
    stops: Sequence[Recipe],
    frames: int,
    directions: Directions,
    *,
    loop: bool = False,
) -> list[Recipe]:
    """The recipes of the images on a way from stop to stop, `frames` to a leg.

    A leg begins with its stop, which stays as it is, and ends before the next: N stops are
    (N - 1) `frames` + 1 recipes, the last of them the last stop. With `loop` a leg leads from there
    to the first stop, so that all can be shown over and over: N `frames`. On the way latents, edits
    included, go by `slerp`; classes, embeddings where a stop gives its own, and truncations evenly.
    Raises `UserError` for fewer than 2 stops, for `frames` below 1, and for a stop that this
    generator has no image for.
    """
    if len(stops) < 2:
        raise UserError(f"a way of {len(stops)} stops: give 2 or more")
    if frames < 1:
        raise UserError(f"{frames} frames from stop to stop: must be 1 or more")
    places = list(zip(stops, latents(G, stops, directions), embeddings(G, stops), strict=True))
    t = torch.arange(1, frames, dtype=torch.double) / frames
    way = []
    for (start, z, y), (end, next_z, next_y) in pairwise(places + places[:1] if loop else places):
        between = slerp(z, next_z, t)
        own = start.y is not None or end.y is not None
        way.append(start)
        for share, frame_z in zip(t.tolist(), between, strict=True):
            way.append(
                Recipe(
                    classes=mixture(start.classes, end.classes, share),
                    z=tuple(frame_z.tolist()),
                    y=tuple(torch.lerp(y, next_y, share).tolist()) if own else None,
                    truncation=_truncation(G, start.truncation, end.truncation, share),
                )
            )
    return way if loop else [*way, stops[-1]]


def mixture(start: Mapping[int, float], end: Mapping[int, float], share: float) -> dict[int, float]:
    """Weights of classes on the way; none between an image of a class and one of none."""
    if not (start and end):
        return dict({0.0: start, 1.0: end}.get(share, {}))
    weights = {i: _lerp(start.get(i, 0), end.get(i, 0), share) for i in {**start, **end}}
    return {class_id: weight for class_id, weight in weights.items() if weight}


def _truncation(G: Generator, start: float | None, end: float | None, share: float) -> float | None:
    """The truncation whose batch-norm moments lie on the way; to a given latent it is no more."""
    if start == end or G.tables is None:
        return start if start == end else None
    whole = G.tables.untruncated
    return _lerp(start or whole, end or whole, share)


def _lerp(start: float, end: float, share: float) -> float:
    return start + share * (end - start)
