"""What an image is made from: enough to make it again. Travels with every image that is served.

Imports neither torch nor Ray, for it is also what applications and the gateway speak of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Finite = Annotated[float, Field(ge=-3.4e38, le=3.4e38, allow_inf_nan=False)]
"""What float32 can hold, for that is what it becomes."""
MAX_SIDE = 1024
"""Pixels of the longer side of what is resized, or enlarged by an endpoint."""
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


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

    model: Annotated[str, Field(max_length=600)]
    """NAME@VERSION in the model store."""
    weights: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the model's weights file."""
    class_names: dict[int, str]
    """Names of the classes that the recipes speak of."""
    recipes: Annotated[tuple[Recipe, ...], Field(min_length=1)]
    """In the order of the images: along the rows of a sheet, or one after another in time."""
    columns: Annotated[int, Field(ge=1)] = 1
    """Images a row, of a sheet; 1 of a picture of one image."""
    gap: Annotated[int, Field(ge=0)] = 0
    """Pixels between and around the images of a sheet."""
    scale: Annotated[int, Field(ge=1)] = 1
    """Pixels of the picture along each side of an image's pixel."""
    size: tuple[Side, Side] | None = None
    """Width and height that a picture of one image was resized to, bicubically."""

    @model_validator(mode="after")
    def _resized_alone(self) -> Origin:
        if self.size and (len(self.recipes), self.columns, self.gap, self.scale) != (1, 1, 0, 1):
            raise ValueError("size is that of a picture of one image, without columns, gap, scale")
        return self

    @classmethod
    def of(
        cls,
        model: str,
        weights: str,
        class_names: Sequence[str],
        recipes: Sequence[Recipe],
        **layout: Any,
    ) -> Origin:
        """The origin of images by a model whose classes have these names; the rest as fields."""
        spoken_of = {i: class_names[i] for recipe in recipes for i in recipe.classes}
        return cls(
            model=model, weights=weights, class_names=spoken_of, recipes=tuple(recipes), **layout
        )

    def named_by(self, class_names: Sequence[str]) -> Origin:
        """The same, with the names that the model has for the classes: a file may say any."""
        spoken_of = {i for recipe in self.recipes for i in recipe.classes if i < len(class_names)}
        return self.model_copy(update={"class_names": {i: class_names[i] for i in spoken_of}})
