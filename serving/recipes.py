"""From what a request says to recipes, checked against the model that is to follow them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from biggan.classes import UnknownClassError, class_id
from biggan.errors import UserError
from biggan.interpolation import mixture as mixture_between
from biggan.recipe import Recipe
from biggan.truncation import TruncationTables
from serving.catalogue import Model
from serving.problems import ProblemError
from serving.schemas import (
    MAX_EDITS,
    MAX_MIXED,
    MAX_SEED,
    MAX_STRENGTH,
    EditRequest,
    FieldProblem,
    GenerateRequest,
    LatentAnswer,
    Point,
)

ClassField = str | int | Mapping[str, float]


def generated(request: GenerateRequest, seed: int, model: Model) -> list[Recipe]:
    """The recipes of images of a class, from consecutive seeds."""
    check_truncation(request.truncation, model)
    if seed + request.n - 1 > MAX_SEED:
        refuse("seed", seed, f"with n = {request.n}, seeds go on beyond {MAX_SEED}")
    classes = mixture("class", request.class_, model)
    edits = directions("edits", request.edits, model)
    return [
        Recipe(classes=classes, seed=seed + i, truncation=request.truncation, edits=edits)
        for i in range(request.n)
    ]


def stops(points: Sequence[Point], truncation: float | None, model: Model) -> list[Recipe]:
    """The recipes of an interpolation's stops."""
    check_truncation(truncation, model)
    recipes = [at(f"stops.{i}", point, truncation, model) for i, point in enumerate(points)]
    _check_classes("stops", {name for recipe in recipes for name in recipe.classes})
    return recipes


def edited(
    request: EditRequest, model: Model, other: Sequence[float] | None = None
) -> list[Recipe]:
    """The recipes on the way from an image to what is asked for, evenly; the last is that.

    An image with a class embedding of its own is morphed towards `other`, the embedding of
    `morph_classes`.
    """
    check_truncation(request.truncation, model)
    start = at("image", request.image, request.truncation, model)
    wanted = directions("edits", request.edits, model)
    morph = morph_classes(request, model)
    amount = request.morph.amount if request.morph else 0.0
    _check_edits("edits", _sum((start.edits, 1.0), (wanted, 1.0)))
    if start.y is None:
        _check_classes("morph", {*start.classes, *morph})
    recipes = []
    for step in range(request.steps):
        part = step / (request.steps - 1) if request.steps > 1 else 1.0
        update: dict[str, Any] = {"edits": _sum((start.edits, 1.0), (wanted, part))}
        if morph:
            update["classes"] = mixture_between(start.classes, morph, part * amount)
        if start.y is not None and other is not None:
            pairs = zip(start.y, other, strict=True)
            update["y"] = tuple((1 - part * amount) * a + part * amount * b for a, b in pairs)
        recipes.append(start.model_copy(update=update))
    return recipes


def morph_classes(request: EditRequest, model: Model) -> dict[int, float]:
    """What an edit morphs towards; empty if it does not."""
    return mixture("morph.class", request.morph.class_, model) if request.morph else {}


def _sum(*weighed: tuple[Mapping[int, float], float]) -> dict[int, float]:
    total: dict[int, float] = {}
    for values, weight in weighed:
        for key, value in values.items():
            total[key] = total.get(key, 0.0) + weight * value
    return {key: value for key, value in total.items() if value}


def at(field: str, point: Point, truncation: float | None, model: Model) -> Recipe:
    """The recipe of an image to start from; raises `ProblemError` for what does not fit."""
    config = model.config.model
    for name, values, length in (
        ("z", point.z, config.z_dim),
        ("y", point.y, config.shared_dim if config.shared else len(model.config.class_names)),
    ):
        if values is not None and len(values) != length:
            refuse(f"{field}.{name}", len(values), f"{model.reference} has {length} numbers in it")
    return Recipe(
        classes=mixture(f"{field}.class", point.class_, model) if point.class_ is not None else {},
        seed=point.seed,
        z=point.z,
        y=point.y,
        truncation=truncation,
        edits=directions(f"{field}.edits", point.edits, model),
    )


def mixture(field: str, wanted: ClassField, model: Model) -> dict[int, float]:
    """Weights of class ids that sum to 1; raises `ProblemError` for a class that is not there."""
    named = {wanted: 1.0} if isinstance(wanted, str | int) else dict(wanted)
    total = sum(named.values())
    found: dict[int, float] = {}
    for name, weight in named.items():
        try:
            index = class_id(name, model.config.class_names)
        except UnknownClassError as error:
            refuse(field, name, str(error))
        found[index] = found.get(index, 0.0) + weight / total
    return found


def directions(field: str, edits: Mapping[str, float], model: Model) -> dict[int, float]:
    """Strengths by index of directions named by index or name; raises `ProblemError`."""
    if not edits:
        return {}
    by_name = {name: index for index, name in model.direction_names.items()}
    last = model.config.model.z_dim - 1
    found: dict[int, float] = {}
    for name, strength in edits.items():
        index = by_name.get(name)
        if index is None:
            if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) <= last):
                refuse(
                    field,
                    name,
                    f"no such direction: indices go from 0 to {last}; see /v1/directions",
                )
            index = int(name)
        found[index] = found.get(index, 0.0) + strength
    _check_edits(field, found)
    return {index: strength for index, strength in found.items() if strength}


def _check_edits(field: str, edits: Mapping[int, float]) -> None:
    """Refuse edits that, being told, could not be sent back."""
    if len(edits) > MAX_EDITS:
        refuse(field, len(edits), f"directions in all: {MAX_EDITS} at most")
    for index, strength in edits.items():
        if abs(strength) > MAX_STRENGTH:
            limit = f"in all along direction {index}: at most {MAX_STRENGTH:g} either way"
            refuse(field, strength, limit)


def _check_classes(field: str, classes: Collection[int]) -> None:
    """Refuse mixtures that, being told, could not be sent back."""
    if len(classes) > MAX_MIXED:
        refuse(field, len(classes), f"classes in all: {MAX_MIXED} at most")


def check_truncation(truncation: float | None, model: Model) -> None:
    """Raise `ProblemError` for a truncation that a model does not know."""
    if truncation is None:
        return
    try:
        (model.config.tables or TruncationTables(truncations=())).latents([], 1, truncation)
    except UserError as error:
        refuse("truncation", truncation, str(error))


def told(recipe: Recipe, model: Model) -> LatentAnswer:
    """A recipe as clients are told it, such that they can send it back."""
    names = model.config.class_names
    # No number is so small that it cannot become 0, as in a mixture's weight among large ones.
    weights = {names[i]: weight for i, weight in recipe.classes.items() if weight}
    return LatentAnswer(
        class_=weights or None,
        seed=recipe.seed,
        z=None if recipe.z is None else list(recipe.z),
        y=None if recipe.y is None else list(recipe.y),
        edits={str(index): strength for index, strength in recipe.edits.items()},
    )


def refuse(field: str, value: Any, limit: str) -> NoReturn:
    """Raise the `ProblemError` for a field that is wrong."""
    raise ProblemError(
        422, f"{field} = {value!r}: {limit}", [FieldProblem(field=field, value=value, limit=limit)]
    )
