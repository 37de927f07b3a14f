"""Search hyper-parameters: `python jobs/sweep.py --preset digits --name lr --num-trials 8`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console

from biggan.commands import ConfigFile, ConfigFlags, base_config, parse, run_command
from biggan.config import ConfigError, RunConfig
from biggan.search import Search, sweep
from biggan.trials import render


@dataclass(frozen=True)
class Sweep:
    r"""Search hyper-parameters with trials that stop early on FID, or take up a sweep again.

    By default the learning rates of G and D, the batch size and the strength of orthogonal
    regularization are searched, around the settings that the flags below describe; those settings
    are the first trial. --space names other fields and what values they may take:

    python jobs/sweep.py --preset digits --name first --num-trials 8

    python jobs/sweep.py --preset digits --name second \
      --space "optim.lr_g=loguniform(1e-4, 1e-2)" "model.ch_d=choice([8, 16])"
    """

    name: str
    """Name of the sweep. The same name takes it up again: finished trials are kept."""
    config: ConfigFlags = field(default_factory=RunConfig)
    search: Annotated[Search, tyro.conf.arg(name="")] = field(default_factory=Search)
    space: tuple[str, ...] = ()
    """Fields to search: FIELD=loguniform(low, high), uniform(low, high), randint(low, high) or
    choice([...])."""
    preset: str | None = None
    """A recipe to start from: digits, laptop, standard, cifar10, imagenet64, imagenet128,
    imagenet128_deep, imagenet256, imagenet512 (see biggan.presets)."""
    config_file: ConfigFile = None
    """A YAML file to start from."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def parse_space(entries: tuple[str, ...]) -> dict[str, str] | None:
    """Split FIELD=VALUES entries; None if there are none."""
    for entry in entries:
        if "=" not in entry:
            raise ConfigError(f"--space {entry!r}: write FIELD=loguniform(low, high) or the like")
    pairs = [entry.partition("=") for entry in entries]
    return {name.strip(): values for name, _, values in pairs} or None


def main() -> int:
    """Run the sweep that the command line describes; status 1 if no trial has an FID."""
    command = parse(Sweep, default=Sweep(name=tyro.MISSING, config=base_config("sweeps")))
    outcome = sweep(
        command.config,
        command.name,
        parse_space(command.space),
        search=command.search,
        root=command.storage,
    )
    console = Console()
    console.print(render(outcome.trials, f"sweep {command.name}, best first"))
    console.print(str(outcome), highlight=False)
    if outcome.best_config is None:
        return 1
    print(f"next: python jobs/promote.py --sweep {command.name}")
    return 0


if __name__ == "__main__":
    run_command(main)
