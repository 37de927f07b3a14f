"""What the commands in jobs/ have in common: parsing, configuration, and how errors are told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from pydantic import ValidationError

from biggan import presets
from biggan.config import ConfigError, RunConfig, explain
from biggan.data.dataset import DatasetInfo
from biggan.errors import UserError
from biggan.runs import RECORD, RunRecord
from biggan.storage import Kind, locate

T = TypeVar("T")

ConfigFlags = Annotated[RunConfig, tyro.conf.arg(name="")]
"""A command's `config` field: every setting of a run is a flag, such as --optim.lr-g."""

ConfigFile = Annotated[Path | None, tyro.conf.arg(name="config", metavar="FILE")]
"""A command's `config_file` field."""


def parse(command: type[T], default: T | None = None, prog: str | None = None) -> T:
    """Build a command's dataclass from the command line; `default` fills what is not given.

    `prog` is how the command is called, where that is not by the name of its file.
    """
    try:
        if default is None:
            return tyro.cli(command, prog=prog)
        return tyro.cli(command, prog=prog, default=default)
    except ValidationError as error:  # Of several fields together; tyro tells those of one itself.
        raise ConfigError(explain(error)) from None


def base_config(kind: Kind) -> RunConfig:
    """The configuration that a command's flags change.

    It is that of --config, else of --preset, else (for runs) of the run --name if there is one,
    else the standard recipe for the resolution of --dataset. Reads the command line ahead of
    `parse`, which then shows these settings as the flags' defaults.
    """
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--preset", "--name", "--dataset", "--storage"):
        ahead.add_argument(flag)
    given, _ = ahead.parse_known_args()
    if given.config:
        if not Path(given.config).is_file():
            raise ConfigError(f"--config {given.config}: there is no such file")
        return RunConfig.from_yaml(given.config)
    if given.preset:
        return presets.get(given.preset)
    if given.name and kind == "runs":
        run = locate("runs", given.name, given.storage)
        if run.exists(RECORD):
            return RunRecord.read(run).config
    if given.dataset:
        dataset = DatasetInfo.read(locate("datasets", given.dataset, given.storage))
        return presets.standard(dataset.resolution)
    return presets.standard()


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command and exit with its status; 2, and one line, for what the user can mend."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        print("interrupted; the same command takes up where this one left off", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
