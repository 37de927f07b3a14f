"""Train a BigGAN, or resume a run: `python jobs/train.py --preset digits --name first`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import tyro

from biggan.commands import ConfigFile, ConfigFlags, base_config, parse, run_command
from biggan.config import RunConfig
from biggan.distributed import Scaling, train
from biggan.storage import StorageError


@dataclass(frozen=True)
class Train:
    """Train a BigGAN as a run of its own, or resume the run of that name where it left off.

    Every setting of the run is a flag below. Its starting point is a preset, a YAML file, the run
    itself if it exists, or else the standard recipe for the dataset's resolution.

    python jobs/train.py --preset digits --name first

    python jobs/train.py --dataset pets --name pets --optim.batch-size 128

    python jobs/train.py --name pets --total-kimg 8000   (resumes, and trains longer)
    """

    name: str
    """Name of the run. The same name resumes."""
    config: ConfigFlags = field(default_factory=RunConfig)
    preset: str | None = None
    """A recipe to start from: digits, laptop, standard, cifar10, imagenet64, imagenet128,
    imagenet128_deep, imagenet256, imagenet512 (see biggan.presets)."""
    config_file: ConfigFile = None
    """A YAML file to start from, such as a sweep's best.yaml."""
    scaling: Scaling = field(default_factory=Scaling)
    """What the run is spread over."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def main() -> int:
    """Train the run that the command line describes; status 1 if it diverged or collapsed."""
    command = parse(Train, default=Train(name=tyro.MISSING, config=base_config("runs")))
    result = train(command.config, command.name, root=command.storage, scaling=command.scaling)
    try:
        folder, info = result.best
        print(f"best checkpoint: {folder} (FID {info.fid:.3f}, {info.images_seen / 1000:g} kimg)")
    except StorageError as error:
        print(error)
    if result.diverged or result.collapsed:
        print(
            f"error: run {command.name} {result.stop_reason}; try lower learning rates",
            file=sys.stderr,
        )
        return 1
    print(f"next: python jobs/promote.py --run {command.name}")
    return 0


if __name__ == "__main__":
    run_command(main)
