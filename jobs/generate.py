"""Generate images: a sheet to look at, PNG files by class, or Parquet; or a picture again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import PurePath
from typing import Literal

from PIL import Image

from biggan.classes import class_id
from biggan.commands import parse, run_command
from biggan.directions import find_directions
from biggan.errors import UserError
from biggan.generation import draw_sheet, generate
from biggan.interpolation import walk
from biggan.models import find_model, load_generator
from biggan.networks import Generator
from biggan.provenance import compare, describe, read_origin, save_like
from biggan.recipe import Recipe
from biggan.reproduction import remake
from biggan.storage import Folder, absolute


@dataclass(frozen=True)
class Generate:
    """Generate images with a model of the store.

    python jobs/generate.py --model digits@best --output sheet.png

    python jobs/generate.py --model digits@best --output between.png --interpolate 10

    python jobs/generate.py --model digits@best --output images/ --n 10000

    python jobs/generate.py --model digits@best --output s3://bucket/set --format parquet --n 50000

    python jobs/generate.py --reproduce sheet.png
    """

    model: str | None = None
    """NAME@ALIAS, NAME@VERSION, path or URI."""
    output: str | None = None
    """A picture to be, of all images on one sheet (.png, .webp, .jpg, ...), or else a folder; path
    or URI."""
    reproduce: str | None = None
    """A picture from here or from an endpoint, path or URI: instead of anything else, make it again
    from what it says of itself, and tell whether it is the same (status 1: it is not)."""
    n: int = 100
    """Images in all, dealt out evenly among the classes."""
    classes: tuple[str, ...] = ()
    """Classes by name or id; by default all."""
    seed: int = 0
    """Image i has seed SEED + i."""
    truncation: float | None = None
    """Keep latents in [-t, t]: smaller is more typical, less varied; by default not at all."""
    interpolate: int | None = None
    """Frames a row, on a sheet whose rows lead from each image that there would be to the next."""
    format: Literal["png", "parquet"] = "png"
    """What a folder is filled with."""
    gpu: bool | None = None
    """Whether a folder is filled by GPUs; if not said, whether the cluster has one by now."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def main() -> int:
    """Generate what the command line describes."""
    command = parse(Generate)
    if command.reproduce is not None:
        return _reproduce(command, command.reproduce)
    if command.model is None or command.output is None:
        raise UserError("give --model and --output, or --reproduce with a picture")
    if command.n < 1:
        raise UserError(f"--n {command.n}: must be 1 or more")
    folder = find_model(command.model, command.storage)
    G = load_generator(folder.uri)
    # Whether seeds and truncation are in range.
    G.latents([command.seed, command.seed + command.n - 1], command.truncation)
    chosen = [class_id(name, G.class_names) for name in command.classes] or range(G.n_classes)
    ids = [chosen[i % len(chosen)] for i in range(command.n)]
    output = absolute(command.output)
    if image_format := _picture_format(output):
        if command.interpolate is None:
            recipes, columns = _in_turn(command, ids), min(len(chosen), 20)
        else:
            recipes, columns = _rows(G, command, ids), command.interpolate
        _write(output, draw_sheet(folder, G, recipes, columns, image_format))
        n = len(recipes)
    elif command.interpolate is not None:
        raise UserError(f"--output {command.output}: --interpolate makes a picture, such as x.png")
    else:
        n = generate(
            folder.uri,
            output,
            class_ids=ids,
            seed=command.seed,
            truncation=command.truncation,
            file_format=command.format,
            gpu=command.gpu,
        )
    print(f"{n:,} images in {output}")
    return 0


def _picture_format(path: str) -> str | None:
    """Pillow's name of the format that a path ends in; None if it ends in none to be written."""
    found = Image.registered_extensions().get(PurePath(path).suffix.lower())
    return found if found in Image.SAVE else None


def _write(path: str, content: bytes) -> None:
    Folder(path).parent.write_bytes(Folder(path).name, content)


def _in_turn(command: Generate, ids: Sequence[int]) -> list[Recipe]:
    return [
        Recipe(classes={id_: 1.0}, seed=seed, truncation=command.truncation)
        for seed, id_ in enumerate(ids, command.seed)
    ]


def _rows(G: Generator, command: Generate, ids: Sequence[int]) -> list[Recipe]:
    """As many whole rows of frames as `--n` allows."""
    steps = command.interpolate or 0
    if not 2 <= steps <= command.n:
        raise UserError(f"--interpolate {steps}: must be from 2 to --n {command.n}")
    seeds = range(command.seed, command.seed + command.n // steps + 1)
    G.latents([seeds[0], seeds[-1]], command.truncation)  # Tells what is out of range.
    stops = [
        Recipe(classes={i: 1}, seed=seed, truncation=command.truncation)
        for i, seed in zip(ids, seeds, strict=False)
    ]
    directions = find_directions(G)
    ways = [walk(G, pair, steps - 1, directions) for pair in pairwise(stops)]
    return list(chain.from_iterable(ways))


def _reproduce(command: Generate, path: str) -> int:
    """Make a picture again, and say whether it is the same."""
    file = Folder(absolute(path))
    if not file.exists():
        raise UserError(f"--reproduce {path}: there is no such file")
    original = file.parent.read_bytes(file.name)
    if (origin := read_origin(original)) is None:
        raise UserError(f"--reproduce {path}: it says nothing of where it came from")
    remade = remake(origin, command.storage)
    if command.output is not None:
        if (image_format := _picture_format(command.output)) is None:
            raise UserError(f"--output {command.output}: must be a picture, such as x.png")
        _write(absolute(command.output), save_like(original, origin, remade, image_format))
    verdict = compare(origin, original, remade)
    print(f"{describe(origin)}\n{verdict.status}: {verdict.sentence}")
    return 0 if verdict.status == "verified" else 1


if __name__ == "__main__":
    run_command(main)
