"""Promotion: from a run or a sweep, the best generator goes to the model store.

`best` moves to the new version only if its FID is lower than that of the version it points to, and
only FIDs of one protocol (dataset, extractor, sample count, ...) are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from biggan.candidates import (
    STANDING_IMAGES,
    Candidate,
    collect_standing_statistics,
    load_checkpoint,
)
from biggan.code_version import code_version
from biggan.config import RunConfig
from biggan.data.dataset import open_dataset
from biggan.errors import UserError
from biggan.metrics.fid import measure
from biggan.metrics.protocol import differences, digest
from biggan.models import BEST, ModelCard, ModelStore, load_card
from biggan.networks import Generator
from biggan.parallel import Workers
from biggan.runs import RECORD, best_checkpoint
from biggan.storage import Folder, StorageError, locate


@dataclass(frozen=True)
class Promotion:
    """What came of a promotion."""

    folder: Folder
    """The model version that holds the generator."""
    card: ModelCard
    is_best: bool
    """Whether `best` points to it now."""
    reason: str
    """Why `best` moved, or stayed where it was."""


def promote(
    *,
    run: str | None = None,
    sweep: str | None = None,
    name: str | None = None,
    force: bool = False,
    alias: str | None = None,
    licence: str | None = None,
    root: str | None = None,
) -> Promotion:
    """Export the generator with the lowest FID of a run or a sweep as a version of model `name`.

    Its batch-norm moments are recomputed as standing statistics (appendix D of arXiv 1809.11096),
    at several truncations, and its FID is measured again with them. `name` is by default that of
    the dataset. With `force`, `best` points to the version whatever its FID; with an `alias`, such
    as "candidate", that does, and `best` stays. A checkpoint that is
    in the store already is not exported twice; a `licence` is then written onto its card. Raises
    `UserError` unless one of run and sweep is given, `StorageError` if there is no such run or
    sweep, if nothing in it was evaluated, or if its dataset has changed.
    """
    if (run is None) == (sweep is None):
        raise UserError("give either run or sweep")
    source = locate("runs", run, root) if run is not None else best_trial(str(sweep), root)
    candidate = load_checkpoint(best_checkpoint(source)[0], Workers.current().device)
    store = ModelStore(name or default_name(candidate.record.config), root)
    card = _already_there(store, candidate) or _export(store, candidate, licence or "", root)
    if licence is not None and licence != card.licence:
        card = store.relicense(card.version, licence)
    if alias is not None:
        store.set_alias(alias, card.version)
        is_best, reason = store.aliases().get(BEST) == card.version, f"{alias} was asked for"
    else:
        is_best, reason = _move_best(store, card, force)
    return Promotion(store.folder / card.version, card, is_best, reason)


def best_trial(sweep: str, root: str | None) -> Folder:
    """The folder of a sweep's trial whose best checkpoint has the lowest FID."""
    folder = locate("sweeps", sweep, root)
    if not folder.exists():
        raise StorageError(f"no sweep at {folder}")
    scored = []
    for trial in [folder / name for name in folder.children()]:
        if trial.exists(RECORD):
            try:
                _, info = best_checkpoint(trial)
            except StorageError:
                continue  # A trial stopped before its first evaluation.
            scored.append((info, trial))
    if not scored:
        raise StorageError(f"sweep {folder} has no trial with an evaluated checkpoint yet")
    (first, first_trial), *others = scored
    for info, trial in others:
        if found := differences(first.fid_protocol or {}, info.fid_protocol or {}):
            raise StorageError(
                f"sweep {folder.name}: FIDs of {first_trial.name} and {trial.name} are not"
                f" comparable ({found}): promote one of its trials by --run PATH"
            )
    return min(scored, key=lambda pair: pair[0].fid or 0.0)[1]


def default_name(config: RunConfig) -> str:
    """The model name that a dataset's name, path or URI suggests."""
    return config.dataset.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]


def _already_there(store: ModelStore, candidate: Candidate) -> ModelCard | None:
    """The card of the version that was exported from this very checkpoint."""
    for version in store.versions():
        card = load_card(store.folder / version)
        if card.checkpoint_sha256 == candidate.info.state_sha256:
            return card
    return None


def _export(store: ModelStore, candidate: Candidate, licence: str, root: str | None) -> ModelCard:
    record, info = candidate.record, candidate.info
    dataset = open_dataset(record.config, root)
    if dataset.info.fingerprint != record.dataset.fingerprint:
        raise StorageError(
            f"run {candidate.checkpoint.parent.name} was trained on other images than dataset"
            f" {record.config.dataset} holds now: prepare the dataset as it was, or train again"
        )
    collect_standing_statistics(candidate.G, dataset.info.counts)
    fid = measure(
        candidate.G,
        dataset,
        record.config.eval,
        num_samples=record.config.eval.num_samples,
        standing=STANDING_IMAGES,
    )
    run = candidate.checkpoint.parent
    card = ModelCard(
        name=store.name,
        version=store.next_version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fid=fid.value,
        fid_protocol=fid.protocol.as_dict(),
        dataset=record.config.dataset,
        dataset_fingerprint=dataset.info.fingerprint,
        run=_label(run),
        checkpoint=candidate.checkpoint.name,
        checkpoint_sha256=info.state_sha256,
        step=info.step,
        kimg=info.images_seen / 1000,
        hyperparameters=record.config,
        code=code_version(),
        licence=licence,
    )
    samples, columns = class_columns(candidate.G)
    store.add(candidate.G, card, samples, columns)
    return card


def _label(run: Folder) -> str:
    """Where a run lies under its storage root: `runs/NAME` or `sweeps/NAME/trial_NNNNN`."""
    kind = run.parent.parent.name
    prefix = f"{kind}/" if kind == "sweeps" else ""
    return f"{prefix}{run.parent.name}/{run.name}"


def class_columns(
    G: Generator, rows: int = 10, max_columns: int = 10, truncation: float | None = None
) -> tuple[np.ndarray, int]:
    """Samples for a sheet with a class a column, and the number of columns.

    Every image has a seed of its own. With more than `max_columns` classes, evenly spread ones.
    """
    columns = min(max_columns, G.n_classes)
    classes = [k * G.n_classes // columns for k in range(columns)]
    return G.sample(classes * rows, seed=0, truncation=truncation), columns


def _move_best(store: ModelStore, card: ModelCard, force: bool) -> tuple[bool, str]:
    """Point `best` at a version if it deserves it; returns whether it points there, and why."""
    reason = ""

    def stays(current: str | None) -> bool:
        nonlocal reason
        better, reason = _deserves_best(store, card, current)
        if force and not better:
            reason = "forced"
        return not (better or force)

    if store.set_alias(BEST, card.version, unless=stays):
        return True, reason
    return False, f"{reason}; --force moves it all the same"


def _deserves_best(store: ModelStore, card: ModelCard, current: str | None) -> tuple[bool, str]:
    if current is None:
        return True, "the first version"
    if current == card.version:
        return True, f"it is {store.name}@{BEST} already"
    return _is_better(card, load_card(store.folder / current))


def _is_better(card: ModelCard, best: ModelCard) -> tuple[bool, str]:
    """Whether a version has a lower FID than another, of the same protocol; and what was found.

    Compared are the FIDs of their promotion, else two that `jobs/evaluate.py` took alike.
    """
    if card.fid is None or best.fid is None:
        return False, f"{(card if card.fid is None else best).version} has no FID"
    ours, theirs = _fids(card), _fids(best)
    shared = [protocol for protocol in ours if protocol in theirs]
    if not shared:
        found = differences(best.fid_protocol, card.fid_protocol)
        return False, f"its FID is not comparable with that of {best.version} ({found})"
    fid, other = ours[shared[0]], theirs[shared[0]]
    if fid < other:
        return True, f"FID {fid:.3f} is lower than the {other:.3f} of {best.version}"
    return False, f"FID {fid:.3f} is not lower than the {other:.3f} of {best.version}"


def _fids(card: ModelCard) -> dict[str, float]:
    """A version's FIDs by protocol, that of its promotion first."""
    measured = [(card.fid_protocol, card.fid)] if card.fid is not None else []
    measured += [(evaluation.protocol, evaluation.value) for evaluation in card.evaluations]
    fids: dict[str, float] = {}
    for protocol, value in measured:
        fids.setdefault(digest(protocol), value)
    return fids
