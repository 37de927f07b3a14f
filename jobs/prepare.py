"""Prepare a dataset: `python jobs/prepare.py --source FOLDER --name NAME --resolution 64`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from biggan.commands import parse, run_command
from biggan.data.preparation import Preparation, prepare


@dataclass(frozen=True)
class Prepare:
    """Make a dataset of labelled images: standardized, stored as Parquet, with FID's reference.

    The source is a folder with one sub-folder of images a class, on disk or in an object store,
    or `digits`: 1,797 handwritten digits that come with the installation. Whatever Pillow opens is
    an image; EXIF orientation, transparency, palettes and 16-bit depths are taken care of.

    python jobs/prepare.py --source digits

    python jobs/prepare.py --source ~/pets --name pets --resolution 64
    """

    source: str
    """`digits`, or a folder (path or URI) with one sub-folder of images a class."""
    name: str = ""
    """Name of the dataset; by default that of the source."""
    resolution: int = 0
    """Side of the square images in pixels: 8, 16, 32, 64, 128, 256 or 512. 0: 16 for the digits,
    64 for anything else."""
    mode: Literal["rgb", "grey", "auto"] = "auto"
    """Colour (3 channels) or grey (1). auto: grey for the digits, rgb for anything else."""
    fit: Literal["crop", "pad"] = "crop"
    """Crop the longer side about the centre, or pad the shorter side with the background."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB behind transparent pixels and in padding, 0 to 255 each."""
    max_rejected: float = 0.01
    """Fail if a larger part of the files, from 0 to 1, is unusable."""
    overwrite: bool = False
    """Replace a dataset that has the name already."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def default_name(source: str) -> str:
    """The last part of a source's path or URI."""
    if "://" in source:
        return source.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
    # Not `resolve()`: a link goes by its own name.
    return Path(os.path.normpath(Path.cwd() / Path(source).expanduser())).name


def main() -> None:
    """Prepare the dataset that the command line describes."""
    command = parse(Prepare)
    digits = command.source == "digits"
    grey = digits if command.mode == "auto" else command.mode == "grey"
    preparation = Preparation(
        source=command.source,
        resolution=command.resolution or (16 if digits else 64),
        channels=1 if grey else 3,
        fit=command.fit,
        background=command.background,
        max_rejected=command.max_rejected,
    )
    name = command.name or default_name(command.source)
    prepare(preparation, name, command.storage, overwrite=command.overwrite)


if __name__ == "__main__":
    run_command(main)
