"""Write a model in BigGAN-PyTorch's format: `G_ema.pth`, and `D.pth` where there is one."""

from __future__ import annotations

from dataclasses import dataclass

from biggan.commands import parse, run_command
from biggan.exchange import export_weights
from biggan.storage import absolute


@dataclass(frozen=True)
class ExportWeights:
    """Write a model of the store as weights that ajbrock/BigGAN-PyTorch reads.

    python jobs/export_weights.py --model pets@best --output weights/pets
    """

    model: str
    """NAME@ALIAS, NAME@VERSION, path or URI."""
    output: str
    """Folder, path or URI."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def main() -> None:
    """Export what the command line names."""
    command = parse(ExportWeights)
    for file, flags in export_weights(command.model, command.output, command.storage).items():
        print(f"{absolute(command.output)}/{file}" + (f", for {flags}" if flags else ""))


if __name__ == "__main__":
    run_command(main)
