"""FID of a run's best checkpoint (`--run`), any `--checkpoint`, or a `--model`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from biggan.commands import parse, run_command
from biggan.evaluation import evaluate


@dataclass(frozen=True)
class Evaluate:
    """Measure FID, with the protocol that it was measured under.

    python jobs/evaluate.py --run first

    python jobs/evaluate.py --model digits@best --num-samples 10000
    """

    run: str | None = None
    """A run, by name, path or URI: its checkpoint with the lowest FID."""
    checkpoint: str | None = None
    """A checkpoint's folder, path or URI."""
    model: str | None = None
    """A model: NAME@ALIAS, NAME@VERSION, path or URI."""
    dataset: str | None = None
    """Dataset to compare with; by default the one trained on, which imported models do not have."""
    num_samples: int | None = None
    """Images to generate; by default as many as in training (10,000 for an imported model)."""
    truncation: float | None = None
    """Keep latents in [-t, t]; by default they are not truncated."""
    extractor: str = "classifier"
    """Whose features are compared."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def main() -> None:
    """Measure what the command line names; prints a line for people and one of JSON."""
    command = parse(Evaluate)
    fid = evaluate(
        run=command.run,
        checkpoint=command.checkpoint,
        model=command.model,
        dataset=command.dataset,
        num_samples=command.num_samples,
        truncation=command.truncation,
        extractor=command.extractor,
        root=command.storage,
    )
    print(fid)
    print(json.dumps(asdict(fid)))


if __name__ == "__main__":
    run_command(main)
