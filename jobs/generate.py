"""Generate images: a sheet to look at, PNG files by class, or Parquet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from typing import Literal

import numpy as np
from PIL import Image

from biggan.classes import class_id
from biggan.commands import parse, run_command
from biggan.errors import UserError
from biggan.generation import generate
from biggan.interpolation import interpolate
from biggan.models import load_generator
from biggan.networks import Generator
from biggan.pixels import sheet
from biggan.storage import Folder, absolute


@dataclass(frozen=True)
class Generate:
    """Generate images with a model of the store.

    python jobs/generate.py --model digits@best --output sheet.png

    python jobs/generate.py --model digits@best --output between.png --interpolate 10

    python jobs/generate.py --model digits@best --output images/ --n 10000

    python jobs/generate.py --model digits@best --output s3://bucket/set --format parquet --n 50000
    """

    model: str
    """NAME@ALIAS, NAME@VERSION, path or URI."""
    output: str
    """A picture to be, of all images on one sheet (.png, .webp, .jpg, ...), or else a folder; path
    or URI."""
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


def main() -> None:
    """Generate what the command line describes."""
    command = parse(Generate)
    if command.n < 1:
        raise UserError(f"--n {command.n}: must be 1 or more")
    G = load_generator(command.model, root=command.storage)
    chosen = [class_id(name, G.class_names) for name in command.classes] or range(G.n_classes)
    ids = [chosen[i % len(chosen)] for i in range(command.n)]
    output = absolute(command.output)
    picture_format = Image.registered_extensions().get(PurePath(output).suffix.lower())
    if picture_format in Image.SAVE:
        if command.interpolate is None:
            images, columns = G.sample(ids, command.seed, command.truncation), min(len(chosen), 20)
        else:
            images, columns = _rows(G, command, ids), command.interpolate
        picture = sheet(images, columns)
        file = io.BytesIO()
        picture.save(file, picture_format)
        Folder(output).parent.write_bytes(Folder(output).name, file.getvalue())
        n = len(images)
    elif command.interpolate is not None:
        raise UserError(f"--output {command.output}: --interpolate makes a picture, such as x.png")
    else:
        n = generate(
            command.model,
            output,
            class_ids=ids,
            seed=command.seed,
            truncation=command.truncation,
            file_format=command.format,
            gpu=command.gpu,
            root=command.storage,
        )
    print(f"{n:,} images in {output}")


def _rows(G: Generator, command: Generate, ids: Sequence[int]) -> np.ndarray:
    """As many whole rows of frames as `--n` allows."""
    steps = command.interpolate or 0
    if not 2 <= steps <= command.n:
        raise UserError(f"--interpolate {steps}: must be from 2 to --n {command.n}")
    ends = list(enumerate(ids, command.seed))[: command.n // steps + 1]
    rows = [interpolate(G, a, b, steps, command.truncation) for a, b in pairwise(ends)]
    return np.concatenate(rows)


if __name__ == "__main__":
    run_command(main)
