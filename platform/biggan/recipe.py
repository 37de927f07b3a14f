"""What an image is made from: enough to make it again. Travels with every image that is served.

Imports neither torch nor Ray, for it is also what applications and the gateway speak of.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Recipe(BaseModel):
    """One image. A latent comes from `seed` and `truncation`, or is given as `z`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: dict[int, Finite]
    """Weights of class ids: ``{3: 1.0}`` is class 3, ``{3: 0.5, 8: 0.5}`` half-way between two."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    z: tuple[Finite, ...] | None = None
    """The latent itself, in the place of a seed: of frames between two seeds, of inversions."""
    y: tuple[Finite, ...] | None = None
    """A class embedding in the place of that of `classes`, as `Generator.embed` gives them."""
    truncation: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """What the latent was truncated at, and the batch-norm moments are chosen by."""
    edits: dict[int, Finite] = {}
    """Steps along the generator's directions, by their index (`biggan.directions`)."""

    @model_validator(mode="after")
    def _one_latent(self) -> Recipe:
        if (self.seed is None) == (self.z is None):
            raise ValueError("give either seed or z")
        return self


class Origin(BaseModel):
    """Where a picture came from: the model, and the recipe of each image on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """NAME@VERSION in the model store."""
    weights: str
    """SHA-256 of the model's weights file."""
    class_names: dict[int, str]
    """Names of the classes that the recipes speak of."""
    recipes: tuple[Recipe, ...]
    """In the order of the images: along the rows of a sheet, or one after another in time."""
    columns: int = 1
    """Images a row, of a sheet; 1 of a picture of one image."""
    gap: int = 0
    """Pixels between and around the images of a sheet."""
    correction: bool = False
    """Whether pixels were changed after G made them, so that the recipe alone gives others."""
