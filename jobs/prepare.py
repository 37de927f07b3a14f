"""Prepare a dataset: `python jobs/prepare.py --source FOLDER --name NAME --resolution 64`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from biggan.commands import parse, run_command
from biggan.data.describe import describe
from biggan.data.preparation import Preparation, PreparationError, prepare
from biggan.data.sources import Check, SourceOptions


@dataclass(frozen=True)
class Prepare:
    """Make a dataset of labelled images: standardized, stored as Parquet, with FID's reference.

    The source is a folder with one sub-folder of images a class, on disk or in an object store; a
    ZIP or tar of one; WebDataset shards; Parquet, or Hugging Face datasets on disk; CIFAR's
    batches, MNIST's IDX files, MedMNIST's .npz, BigGAN-PyTorch's HDF5; DICOM files with a table of
    labels; a CSV or Parquet table of paths and labels; a dataset prepared before; or `digits`,
    1,797 handwritten digits that come with the installation. What it is is found out by looking.
    EXIF orientation, transparency, palettes and 16-bit depths are taken care of.

    python jobs/prepare.py --source digits

    python jobs/prepare.py --source ~/pets --name pets --resolution 64 --held-out 0.1

    python jobs/prepare.py --source ~/scans --labels ~/scans.csv --window 40 400 --name ct

    python jobs/prepare.py --describe pets

    It runs on all cores of all machines of the cluster, in memory that does not grow with the
    number of images. Interrupted, it goes on when the same command is run again.

    It stops at what is most likely a mistake: all images of one class (one-class), labels that do
    not match the folders (labels), class ids with gaps (gaps), too few images of a class
    (few-images), colour that grey would lose, or RGB for what is grey (channels). Nearly empty
    images (empty-images) are left out. --allow NAME lets each of them pass.
    """

    source: str = ""
    """Path or URI of labelled images, or `digits`."""
    options: Annotated[SourceOptions, tyro.conf.arg(name="")] = field(default_factory=SourceOptions)
    describe: str = ""
    """Instead of preparing, show a dataset: counts by class, examples, sizes, rejects; on the
    console and as `describe.html` in its folder."""
    name: str = ""
    """Name of the dataset; by default that of the source."""
    resolution: int = 0
    """Side of the square images in pixels: 8, 16, 32, 64, 128, 256 or 512. 0: 16 for the digits,
    64 for anything else."""
    mode: Literal["rgb", "grey", "auto"] = "auto"
    """Colour (3 channels) or grey (1). auto: grey if a sample of 256 images shows no colour."""
    fit: Literal["crop", "pad"] = "crop"
    """Crop the longer side about the centre, or pad the shorter side with the background."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB behind transparent pixels and in padding, 0 to 255 each."""
    held_out: float = 0.0
    """Part of each class, from 0 to 0.5, to set aside for reference statistics: FID against images
    that were not trained on. At least one of each class; copies are never set aside. A source with
    a test split of its own keeps that split instead."""
    seed: int = 0
    """Which images are held out."""
    drop_duplicates: bool = False
    """Keep only the first of images whose pixels are equal. Without it they are only reported."""
    max_rejected: float = 0.01
    """Fail if a larger part of the files, from 0 to 1, is unusable."""
    min_class_images: int = 2
    """Fail if a class has fewer images. The classifier behind the reference learns from one and is
    checked on another; with --held-out, a third is held out."""
    min_accuracy: float | None = None
    """Fail if that classifier gets less of the images it has not seen right, from 0 to 1. By
    default it must be clearly better than always the largest class."""
    allow: tuple[Check, ...] = ()
    """Findings that are to pass: one-class, labels, gaps, few-images, channels, empty-images."""
    overwrite: bool = False
    """Replace a dataset that has the name already."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""

    def preparation(self) -> Preparation:
        """What the flags ask for."""
        return Preparation(
            source=self.source,
            resolution=self.resolution or (16 if self.source == "digits" else 64),
            channels={"rgb": 3, "grey": 1, "auto": None}[self.mode],
            fit=self.fit,
            background=self.background,
            max_rejected=self.max_rejected,
            drop_duplicates=self.drop_duplicates,
            held_out=self.held_out,
            seed=self.seed,
            min_class_images=self.min_class_images,
            min_accuracy=self.min_accuracy,
            allow=self.allow,
            options=self.options,
        )


def default_name(source: str) -> str:
    """The last part of a source's path or URI."""
    if "://" in source:
        return source.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
    # Not `resolve()`: a link goes by its own name.
    return Path(os.path.normpath(Path.cwd() / Path(source).expanduser())).name


def main() -> None:
    """Prepare, or describe, the dataset of the command line."""
    command = parse(Prepare)
    if command.describe and command.source:
        raise PreparationError(
            f"--describe {command.describe} shows a dataset that is there: give it without --source"
        )
    if command.describe:
        describe(command.describe, command.storage)
    elif command.source:
        name = command.name or default_name(command.source)
        prepare(command.preparation(), name, command.storage, overwrite=command.overwrite)
    else:
        raise PreparationError(
            "nothing to prepare: give --source FOLDER (or --source digits), or --describe NAME to"
            " look at a dataset"
        )


if __name__ == "__main__":
    run_command(main)
