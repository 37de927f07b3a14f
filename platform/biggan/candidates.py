"""A run's checkpoint as a generator: to be measured, and to be made ready for sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from biggan.checkpoint import CheckpointInfo, restore_generator
from biggan.latents import ClassSampler, Stream, rng
from biggan.layers import standing_statistics
from biggan.networks import Generator
from biggan.runs import RunRecord
from biggan.storage import Folder
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
