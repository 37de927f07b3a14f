"""Show what a model's directions do to its images, and name them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from biggan.classes import class_id
from biggan.commands import parse, run_command
from biggan.directions import Directions, find_directions, read_names, write_names
from biggan.errors import UserError
from biggan.models import find_model, load_generator
from biggan.networks import Generator
from biggan.pixels import to_pil
from biggan.recipe import Recipe
from biggan.storage import Folder, absolute
from biggan.synthesis import synthesize

COLUMNS = 7
"""Strengths on the sheet, from -S to S; the middle one is 0."""
TILE = 64
"""Pixels that an image on the sheet has at least."""
TOP = 34
"""Pixels above the first band."""


@dataclass(frozen=True)
class ShowDirections:
    """List the directions in which a model's images change most, draw them, and give them names.

    python jobs/directions.py --model digits@best --output directions.png

    python jobs/directions.py --model digits@best --names 0=thickness 3=tilt
    """

    model: str
    """NAME@ALIAS, NAME@VERSION, path or URI."""
    output: str | None = None
    """A picture to be (.png, .webp, .jpg, ...), path or URI: a band for each direction, in it a row
    a seed and a column a strength."""
    count: int = 8
    """Directions, those with the greatest effect first."""
    stages: tuple[int, ...] = ()
    """Only directions of these stages: 0 the first layer, which sees to the whole image, k the k-th
    block; by default all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A row of each band each."""
    classes: tuple[str, ...] = ()
    """Classes of the rows in turn, by name or id; by default all."""
    strength: float = 3.0
    """How far the columns go either way; a latent's components have a deviation of 1."""
    truncation: float | None = None
    """Keep latents in [-t, t] before they are moved; by default not at all."""
    names: tuple[str, ...] = ()
    """INDEX=NAME of directions to name in the model's folder; INDEX= takes a name away."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def main() -> None:
    """Name, list and draw what the command line describes."""
    command = parse(ShowDirections)
    folder = find_model(command.model, command.storage)
    G = load_generator(folder.uri)
    directions = find_directions(G)
    chosen = _chosen(command, directions)
    rows = _rows(command, G)
    target = _target(command.output) if command.output is not None else None
    if command.names:
        write_names(folder, _parsed(command.names))
    names = read_names(folder)
    Console().print(_table(command.model, chosen, names, directions))
    if target:
        strengths = np.linspace(-command.strength, command.strength, COLUMNS).tolist()
        images = _moved(G, directions, chosen, rows, strengths)
        file = io.BytesIO()
        _sheet(images, _labels(G, directions, chosen, names, rows, strengths)).save(file, target[1])
        target[0].parent.write_bytes(target[0].name, file.getvalue())
        print(f"picture: {target[0]}")


def _chosen(command: ShowDirections, directions: Directions) -> list[int]:
    """Indices of the directions to show."""
    if command.count < 1:
        raise UserError(f"--count {command.count}: must be 1 or more")
    known = set(directions.stages)
    if not known.issuperset(command.stages):
        given = " ".join(map(str, command.stages))
        raise UserError(f"--stages {given}: this model has stages 0 to {max(known)}")
    stages = command.stages or known
    found = [i for i, stage in enumerate(directions.stages) if stage in stages]
    return found[: command.count]


def _rows(command: ShowDirections, G: Generator) -> list[Recipe]:
    """The images that are moved."""
    if not command.seeds:
        raise UserError("--seeds: give 1 or more")
    if not 0 < command.strength < math.inf:
        raise UserError(f"--strength {command.strength}: must be a finite number above 0")
    G.latents(command.seeds, command.truncation)  # Tells what is out of range.
    ids = [class_id(name, G.class_names) for name in command.classes] or range(G.n_classes)
    return [
        Recipe(classes={ids[row % len(ids)]: 1}, seed=seed, truncation=command.truncation)
        for row, seed in enumerate(command.seeds)
    ]


def _target(output: str) -> tuple[Folder, str]:
    """Where the picture goes, and its format."""
    picture_format = Image.registered_extensions().get(PurePath(output).suffix.lower())
    if picture_format not in Image.SAVE:
        raise UserError(f"--output {output}: name a picture, such as directions.png")
    return Folder(absolute(output)), picture_format


def _parsed(words: Sequence[str]) -> dict[int, str]:
    """`INDEX=NAME` by index."""
    names: dict[int, str] = {}
    for word in words:
        index, mark, name = word.partition("=")
        if not (mark and index.isascii() and index.isdecimal() and len(index) < 10):
            raise UserError(f"--names {word}: must be INDEX=NAME, such as 0=thickness")
        if int(index) in names:
            raise UserError(f"--names {word}: direction {int(index)} has a name already")
        names[int(index)] = name
    return names


def _table(
    model: str, chosen: Sequence[int], names: dict[int, str], directions: Directions
) -> Table:
    shown = Table(title=f"directions of {model}", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("index", "stage", "effect"):
        shown.add_column(heading, justify="right")
    shown.add_column("name")
    for i in chosen:
        name = names[i] if names[i] != str(i) else ""
        shown.add_row(str(i), str(directions.stages[i]), f"{directions.effects[i]:.3f}", name)
    return shown


def _moved(
    G: Generator,
    directions: Directions,
    chosen: Sequence[int],
    rows: Sequence[Recipe],
    strengths: Sequence[float],
) -> np.ndarray:
    """Images moved along directions: `[directions, rows, strengths, H, W, C]`."""
    recipes = [
        row.model_copy(update={"edits": {i: strength}})
        for i in chosen
        for row in rows
        for strength in strengths
    ]
    images = synthesize(G, recipes, directions)
    return images.reshape(len(chosen), len(rows), len(strengths), *images.shape[1:])


@dataclass(frozen=True)
class _Labels:
    """What stands around the images of a sheet."""

    titles: list[str]
    notes: list[str]
    shares: list[float]
    """Effects as parts of the greatest."""
    captions: list[str]
    """Of the rows of every band."""
    headings: list[str]


def _labels(
    G: Generator,
    directions: Directions,
    chosen: Sequence[int],
    names: dict[int, str],
    rows: Sequence[Recipe],
    strengths: Sequence[float],
) -> _Labels:
    effects = directions.effects
    return _Labels(
        titles=[str(i) if names[i] == str(i) else f"{i}  {names[i]}" for i in chosen],
        notes=[f"stage {directions.stages[i]} · effect {effects[i]:.2f}" for i in chosen],
        shares=[float(effects[i] / effects[0]) for i in chosen],
        captions=[f"class {G.class_names[min(row.classes)]}, seed {row.seed}" for row in rows],
        headings=[f"{strength:+.3g}" if strength else "0" for strength in strengths],
    )


def _sheet(images: np.ndarray, labels: _Labels) -> Image.Image:
    """A band a direction, in it a row an image and a column a strength; the unmoved on grey."""
    large, small, grey = _font(17), _font(12), "#666666"
    bands, rows, columns, height = images.shape[:4]
    side, step, band = _side(height), _side(height) + 2, rows * (_side(height) + 2) + 14
    texts = [(large, labels.titles), (small, labels.notes)]
    left = 24 + math.ceil(max(font.getlength(t) for font, lines in texts for t in lines))
    right = left + columns * step + 8
    width = right + 12 + math.ceil(max(small.getlength(caption) for caption in labels.captions))
    page = Image.new("RGB", (width, TOP + bands * band), "white")
    draw = ImageDraw.Draw(page)
    middle = left + columns // 2 * step
    draw.rectangle((middle - 4, 6, middle + side + 3, page.height), "#dddddd")
    for column, heading in enumerate(labels.headings):
        draw.text((left + column * step + side / 2, TOP / 2), heading, "black", large, "mm")
    for k in range(bands):
        y = TOP + k * band
        draw.text((12, y), labels.titles[k], "black", large)
        draw.text((12, y + 24), labels.notes[k], grey, small)
        draw.rectangle((12, y + 43, 12 + (left - 24) * labels.shares[k], y + 46), "#3b7dd8")
        for row, caption in enumerate(labels.captions):
            at = y + row * step
            for column, image in enumerate(images[k, row]):
                tile = to_pil(image).resize((side, side), Image.Resampling.NEAREST)
                page.paste(tile, (left + column * step, at))
            draw.text((right, at + side / 2), caption, grey, small, "lm")
    return page


def _side(height: int) -> int:
    """An image's side on the sheet: a whole multiple of its own."""
    return height * -(-TILE // height)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: letters of more languages than Pillow's own has."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


if __name__ == "__main__":
    run_command(main)
