"""Pictures made again from what they carry, and whether they came from the models of this store.

The part of provenance that needs the generator; what a file says is `biggan.provenance`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from biggan.directions import Directions, find_directions
from biggan.errors import UserError
from biggan.models import ModelStore, load_generator, weights_sha256
from biggan.networks import Generator
from biggan.provenance import Verdict, altered, compare, compare_size, read_origin
from biggan.recipe import Origin, Recipe
from biggan.synthesis import synthesize

REFERENCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,199})@(v[0-9]{1,9})")
"""NAME@VERSION, as every picture of ours names its model; no path."""


class UnknownModelError(UserError):
    """An origin whose model the store does not have, or has with other weights."""


def make(G: Generator, recipes: Sequence[Recipe]) -> np.ndarray:
    """The images of recipes: uint8 `[N, H, W, C]`; raises `UserError` as `synthesize` does.

    Directions are looked for only if a recipe goes along them.
    """
    edited = any(recipe.edits for recipe in recipes)
    none = Directions(torch.empty(0, G.z_dim), torch.empty(0), ())
    return synthesize(G, recipes, find_directions(G) if edited else none)


def find_generator(origin: Origin, root: str | None = None) -> Generator:
    """The very generator of an origin, out of the store; raises `UnknownModelError`.

    A stranger's file may name anything, so that only NAME@VERSION is looked for, and no path.
    """
    found = REFERENCE.fullmatch(origin.model)
    store = ModelStore(found[1], root) if found else None
    if not (found and store and found[2] in store.versions()):
        raise UnknownModelError(f"model {origin.model[:100]} is not in the store")
    folder = store.folder / found[2]
    if (weights := weights_sha256(folder)) != origin.weights:
        raise UnknownModelError(
            f"{origin.model} of this store has other weights than the picture names: their SHA-256"
            f" is {weights[:16]}..., not {origin.weights[:16]}..."
        )
    return load_generator(folder.uri)


def remake(origin: Origin, root: str | None = None) -> np.ndarray:
    """The images of an origin, made again: uint8 `[N, H, W, C]`.

    Raises `UnknownModelError`, and `UserError` for recipes that the model cannot follow.
    """
    return make(find_generator(origin, root), origin.recipes)


def verify(data: bytes, root: str | None = None) -> Verdict:
    """Whether a picture, the content of a file, came from a model of the store at `root`."""
    origin = read_origin(data)
    if origin is None:
        return Verdict(status="no origin", sentence="says nothing of where it came from")
    try:
        G = find_generator(origin, root)
    except UnknownModelError as error:
        return Verdict(status="unknown model", origin=origin, sentence=str(error))
    origin = origin.named_by(G.class_names)
    if verdict := compare_size(origin, data, G.resolution):
        return verdict
    try:
        remade = make(G, origin.recipes)
    except UserError as error:
        return altered(origin, f"that model cannot have made it: {error}")
    return compare(origin, data, remade)
