"""Put the best generator of a run or a sweep into the model store: `--run NAME`, `--sweep NAME`."""

from __future__ import annotations

from dataclasses import dataclass

from biggan.commands import parse, run_command
from biggan.errors import UserError
from biggan.models import ModelStore, split_reference
from biggan.promotion import promote


@dataclass(frozen=True)
class Promote:
    """Export the generator with the lowest FID as a model version; point `best` to it if it is.

    The checkpoint's averaged generator gets standing statistics and its FID is measured anew.
    `best` moves only if that FID, of the same protocol, beats the one it points to. An endpoint
    that serves the model picks a new best up by itself.

    python jobs/promote.py --run first

    python jobs/promote.py --sweep first --name digits

    python jobs/promote.py --run bold --name digits --alias candidate

    python jobs/promote.py --rollback digits
    """

    run: str | None = None
    """A run, by name, path or URI."""
    sweep: str | None = None
    """A sweep, by name, path or URI; give this or --run."""
    name: str | None = None
    """Name of the model; by default that of the dataset."""
    force: bool = False
    """Point `best` to this version whatever its FID."""
    alias: str | None = None
    """Point this alias to the version and leave `best`: `candidate`, say, for a canary."""
    rollback: str | None = None
    """A model, NAME or NAME@ALIAS, whose alias (`best`) goes back to what it was before; nothing is
    exported, and running endpoints follow."""
    licence: str | None = None
    """Licence of the model, for its card; by default none is stated."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def main() -> None:
    """Promote what the command line names."""
    command = parse(Promote)
    if command.rollback is not None:
        _roll_back(command)
        return
    promotion = promote(
        run=command.run,
        sweep=command.sweep,
        name=command.name,
        force=command.force,
        alias=command.alias,
        licence=command.licence,
        root=command.storage,
    )
    card = promotion.card
    print(
        f"model {card.name}@{card.version}: FID {card.fid:.3f}"
        f" ({card.fid_protocol['extractor']}), from {card.run} at {card.kimg:g} kimg"
    )
    print(f"best {'points to it' if promotion.is_best else 'stays'}: {promotion.reason}")
    print(f"samples: {promotion.folder}/samples.png")
    print(f"next: make serve MODEL={card.name}@best")


def _roll_back(command: Promote) -> None:
    others = {"run", "sweep", "name", "force", "alias", "licence"}
    if given := [f"--{name}" for name in sorted(others) if getattr(command, name)]:
        raise UserError(
            f"--rollback MODEL@ALIAS takes the model and its alias, and exports nothing: leave"
            f" {', '.join(given)} out"
        )
    name, alias = split_reference(command.rollback or "")
    left, found = ModelStore(name, command.storage).roll_back(alias)
    print(f"{name}@{alias}: back from {left} to {found}")


if __name__ == "__main__":
    run_command(main)
