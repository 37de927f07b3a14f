"""From recipes to images: what all that the endpoint does comes down to, and `--reproduce`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from biggan.directions import Directions
from biggan.errors import UserError
from biggan.networks import Generator
from biggan.recipe import Recipe

Render = Callable[[Tensor, Tensor, Sequence[float | None]], np.ndarray]
"""From latents, class embeddings and truncations to images, as `Generator.render_embedded`."""


def latents(G: Generator, recipes: Sequence[Recipe], directions: Directions) -> Tensor:
    """The latents of recipes, edits included: float32 `[N, z_dim]`.

    Raises `UserError` for a truncation that the model does not know, a `z` of another length, and
    an edit along a direction that there is not.
    """
    z = torch.empty(len(recipes), G.z_dim)
    seeded: dict[float | None, list[int]] = {}
    for i, recipe in enumerate(recipes):
        # Truncations of given latents are checked too.
        places = seeded.setdefault(recipe.truncation, [])
        if recipe.seed is not None:
            places.append(i)
        else:
            z[i] = _vector("z", recipe.z or (), G.z_dim)
    for truncation, places in seeded.items():
        z[places] = G.latents([recipes[i].seed or 0 for i in places], truncation)
    for i, recipe in enumerate(recipes):
        if recipe.edits:
            z[i] = directions.apply(z[i], recipe.edits)
    return z


def embeddings(G: Generator, recipes: Sequence[Recipe]) -> Tensor:
    """The class embeddings of recipes: `[N, shared_dim]`.

    Of a model without a shared embedding they are mixtures, `[N, n_classes]`. Raises
    `UserError` for a class that is not there, and for a `y` of another length.
    """
    mixtures = torch.zeros(len(recipes), G.n_classes)
    for mixture, recipe in zip(mixtures, recipes, strict=True):
        G.check_classes(list(recipe.classes))
        for class_id, weight in recipe.classes.items():
            mixture[class_id] = weight
    y = G.embed(mixtures.to(G.device)).clone()
    for i, recipe in enumerate(recipes):
        if recipe.y is not None:
            y[i] = _vector("y", recipe.y, y.shape[1])
    return y


@torch.inference_mode()
def synthesize(
    G: Generator, recipes: Sequence[Recipe], directions: Directions, render: Render | None = None
) -> np.ndarray:
    """The images of recipes: uint8 `[N, H, W, C]`; raises `UserError` as `latents` does.

    A recipe gives the same image, to within one grey level, whatever others it travels with.
    `render` computes in the place of `G.render_embedded`.
    """
    z, y = latents(G, recipes, directions), embeddings(G, recipes)
    return (render or G.render_embedded)(z, y, [recipe.truncation for recipe in recipes])


def _vector(name: str, values: Sequence[float], length: int) -> Tensor:
    if len(values) != length:
        raise UserError(f"{name} has {len(values)} numbers: this model's has {length}")
    return torch.tensor(values)
