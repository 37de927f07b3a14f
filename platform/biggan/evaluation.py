"""FID of anything that holds a generator: a run's best checkpoint, any checkpoint, a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from biggan.checkpoint import CheckpointInfo, restore_generator
from biggan.config import RunConfig
from biggan.data.dataset import Dataset, open_dataset
from biggan.errors import UserError
from biggan.latents import ClassSampler, Stream, rng
from biggan.layers import standing_statistics
from biggan.metrics.extractors import load_extractor
from biggan.metrics.fid import FID, Evaluator
from biggan.models import find_model, load_card, load_generator
from biggan.networks import Generator
from biggan.parallel import Workers
from biggan.runs import RunRecord, best_checkpoint
from biggan.storage import Folder, StorageError, locate
from biggan.truncation import TruncationTables

STANDING_IMAGES = 16_384
"""Images that standing statistics are collected over."""
TRUNCATIONS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Truncations that a promoted model has standing statistics of their own for."""
TABLE_IMAGES = 2_048
"""Images that those of one truncation are collected over."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint's averaged generator, with what is known of its making."""

    G: Generator
    record: RunRecord
    checkpoint: Folder
    info: CheckpointInfo


def load_checkpoint(folder: Folder, device: torch.device) -> Candidate:
    """Read a run's checkpoint; raises `StorageError` if it is not whole."""
    record = RunRecord.read(folder.parent)
    G = Generator(record.config.model, **record.dataset.shape).to(device)
    info = restore_generator(folder, G)
    G.class_names = list(record.dataset.classes)
    return Candidate(G, record, folder, info)


def collect_standing_statistics(G: Generator, counts: Sequence[int]) -> None:
    """Replace G's batch-norm moments by their mean over many batches (appendix D of the paper).

    Those of the untruncated latent, and a table of them for each of `TRUNCATIONS`. Classes are
    drawn in proportion to `counts`, their images in the dataset. Deterministic.
    """
    G.add_tables(TruncationTables(truncations=TRUNCATIONS, images=TABLE_IMAGES))
    for i, truncation in enumerate(TRUNCATIONS):
        _collect(G, counts, TABLE_IMAGES, truncation)
        for norm in G.batch_norms():
            norm.table_mean[i] = norm.running_mean
            norm.table_var[i] = norm.running_var
    _collect(G, counts, STANDING_IMAGES, None)


def _collect(G: Generator, counts: Sequence[int], images: int, truncation: float | None) -> None:
    """Collect the running moments anew, from latents so truncated."""
    draws = rng(0, Stream.STANDING_STATISTICS)
    classes = ClassSampler(counts)
    device = next(G.parameters()).device
    with standing_statistics(G):
        for _ in range(images // G.sample_batch):
            seeds = draws.integers(2**62, size=G.sample_batch).tolist()
            z = G.latents(seeds, truncation)
            G(z.to(device), classes.draw(draws, G.sample_batch).to(device))


def evaluate(
    *,
    run: str | None = None,
    checkpoint: str | None = None,
    model: str | None = None,
    dataset: str | None = None,
    num_samples: int | None = None,
    truncation: float | None = None,
    extractor: str = "classifier",
    root: str | None = None,
) -> FID:
    """FID of a run's best checkpoint, of one checkpoint (path or URI), or of a model.

    Give exactly one of the three. `dataset` and `num_samples` are by default those of the run that
    the generator comes from; an imported model has no run behind it, so that `dataset` must be
    given. A checkpoint's generator is measured as in training; a model's with the standing
    statistics it was exported with, at a truncation those collected at it. Raises `UserError`.
    """
    if [run, checkpoint, model].count(None) != 2:
        raise UserError("give exactly one of run, checkpoint and model")
    if num_samples is not None and num_samples < 2:
        raise UserError(f"num_samples is {num_samples}, must be 2 or more: FID needs a covariance")
    device = Workers.current().device
    config: RunConfig | None
    standing = 0
    if model is not None:
        card = load_card(find_model(model, root))
        G = load_generator(model, root=root, device=device)
        config = card.hyperparameters
        standing = int(card.fid_protocol.get("standing_statistics", 0))
    else:
        folder = (
            best_checkpoint(locate("runs", run, root))[0]
            if run is not None
            else locate("runs", str(checkpoint), root)
        )
        candidate = load_checkpoint(folder, device)
        G, config = candidate.G, candidate.record.config
    if config is None and dataset is None:
        raise UserError(
            f"model {model} was imported, without the dataset that it was trained on: name a"
            " prepared one to compare with (dataset, --dataset)"
        )
    config = config or RunConfig()
    data = open_dataset(config, root, name=dataset or "")
    if data.info.shape != {
        "resolution": G.resolution,
        "channels": G.channels,
        "n_classes": G.n_classes,
    }:
        raise StorageError(
            f"dataset {data.folder.name} has {data.info.shape}, the generator"
            f" {G.resolution} pixels, {G.channels} channels, {G.n_classes} classes"
        )
    return measure(
        G,
        data,
        num_samples=config.eval.num_samples if num_samples is None else num_samples,
        extractor=extractor,
        truncation=truncation,
        standing=standing,
    )


def measure(
    G: Generator,
    dataset: Dataset,
    *,
    num_samples: int,
    extractor: str = "classifier",
    truncation: float | None = None,
    standing: int = 0,
) -> FID:
    """FID of a generator, on the device that it is on, in this process."""
    workers = Workers(0, 1, next(G.parameters()).device)
    evaluator = Evaluator(dataset, load_extractor(extractor, dataset.folder, workers.device))
    return evaluator.fid(
        G,
        workers,
        num_samples=num_samples,
        batch_size=G.sample_batch,
        truncation=truncation,
        standing_statistics=standing,
    )
