"""Measure a run's best checkpoint (`--run`), any `--checkpoint`, or a `--model`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from biggan.commands import parse, run_command
from biggan.data.parts import Split
from biggan.evaluation import evaluate
from biggan.metrics.report import Evaluation, summary


@dataclass(frozen=True)
class Evaluate:
    """Measure a generator, with the protocol of every number.

    FID, KID, Inception Score, precision and recall, density and coverage, intra-class FID, and how
    often the dataset's classifier reads the class that was asked for: all from one pass over the
    generated images, spread over the cluster's cores or GPUs. The numbers are kept in
    evaluation.json beside what was measured, and on a model's card. With --repeats they come with
    their noise.

    python jobs/evaluate.py --run first

    python jobs/evaluate.py --model digits@best --num-samples 10000 --repeats 5

    python jobs/evaluate.py --model pets@best --extractor inception --num-samples 50000
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
    extractor: str | None = None
    """Whose features are compared: classifier (the dataset's own), inception (as pytorch-fid),
    inception-tf (as torch-fidelity), or the path or URI of a TorchScript (.pt) or exported (.pt2)
    network. By default as in training."""
    inception_weights: str | None = None
    """Path or URL of Inception's weights; by default the cached file, else the published one."""
    reference: Split | None = None
    """The part of the dataset to compare with; by default as in training."""
    repeats: int = 1
    """Independent draws to measure: their mean and standard deviation are told."""
    workers: int = 0
    """Tasks at a time, each with a core or GPU; 0: as many as there is room for. The result is the
    same for any number."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def table(evaluation: Evaluation) -> Table:
    """The measures for people."""
    shown = Table(title=evaluation.subject, box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("measure")
    shown.add_column("value", justify="right")
    shown.add_column("deviation", justify="right")
    shown.add_column("better")
    for row in summary(evaluation):
        shown.add_row(*row)
    return shown


def main() -> None:
    """Measure what the command line names; prints a table for people and a line of JSON."""
    command = parse(Evaluate)
    evaluation = evaluate(
        run=command.run,
        checkpoint=command.checkpoint,
        model=command.model,
        dataset=command.dataset,
        num_samples=command.num_samples,
        truncation=command.truncation,
        extractor=command.extractor,
        inception_weights=command.inception_weights,
        reference=command.reference,
        repeats=command.repeats,
        workers=command.workers,
        root=command.storage,
        progress=print,
    )
    Console().print(table(evaluation))
    print(evaluation)
    print(evaluation.model_dump_json())


if __name__ == "__main__":
    run_command(main)
