"""Preparing a dataset: any images in, Parquet shards and FID reference statistics out.

Runs on Ray Data: the source's items are dealt out as shards, and each shard is one task that loads,
standardizes and writes its images, on any core of any machine, in memory that one shard bounds.
The driver keeps about 60 bytes an image. The dataset comes into being whole or not at all; what an
interrupted preparation has written lies beside it, and the same command goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from biggan.claim import claimed
from biggan.cluster import connect, largest_node, own_device, quiet_ray_data, result
from biggan.data import checks
from biggan.data.checks import Checks, Colours
from biggan.data.dataset import DESCRIPTION, Dataset, DatasetInfo, Progress, Rejected
from biggan.data.plan import Plan, Preparation, PreparationError, plan_key
from biggan.data.progress import ImageProgress
from biggan.data.selection import REJECTED_KEPT, Selection, Tally
from biggan.data.shards import Record, finished_shards, sort_out, write_shard
from biggan.data.sources import Source, open_source
from biggan.metrics.extractors import (
    Classifier,
    check_accuracy,
    load_extractor,
    save_classifier,
    train_classifier,
)
from biggan.metrics.reference import Reference
from biggan.storage import Folder, locate

__all__ = ["Preparation", "PreparationError", "prepare"]


@dataclass(frozen=True)
class Work:
    """What every task of a preparation needs to know."""

    preparation: Preparation
    source: Source
    plan: Plan
    draft: Folder


def prepare(
    preparation: Preparation,
    name: str,
    root: str | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = print,
) -> DatasetInfo:
    """Prepare dataset `name` and its FID reference; returns its description.

    A dataset that was already prepared from the same source in the same way is kept. Raises
    `PreparationError` if the images are not what `preparation` allows (all that is wrong at once),
    or if something else has the name (a different dataset with `overwrite` off, or a folder that is
    no dataset); storage is then as it was before. Raises `SourceError` if the source has nothing to
    offer, and `ClaimError` if another process is preparing that name. After any other end, a kill
    included, the same call goes on where this one stopped.
    """
    folder = locate("datasets", name, root)
    source = open_source(preparation.source, preparation.options)
    with claimed(folder, "prepared") as claim:
        if not folder.exists(DESCRIPTION) and any(map(_is_foreign, folder.children())):
            raise PreparationError(
                f"{folder} exists and is no prepared dataset: use another --name, or remove it"
                " yourself"
            )
        if folder.exists(DESCRIPTION) and not overwrite:
            return _existing(folder, preparation, source, progress)
        progress(f"preparing {len(source):,} images in {len(source.classes):,} classes")
        told = Checks(preparation, progress)
        preparation, plan = _settle(preparation, source, told)
        connect()
        key = plan_key(preparation, source)
        with folder.created_whole(marker=DESCRIPTION, key=key) as draft:
            work = Work(preparation, source, plan, draft)
            info = _write_images(work, told, progress)
            _measure_reference(draft, info, preparation.min_accuracy, progress)
            _sweep_up(draft)
            claim.check()
        folder.delete_drafts()
    _tell_done(info, folder, progress)
    return info


def _is_foreign(name: str) -> bool:
    """Whether a file of that name is none that an interrupted copy can leave behind."""
    return name != "reference" and not name.startswith(("part-", "held_out-"))


def _existing(
    folder: Folder, preparation: Preparation, source: Source, progress: Progress
) -> DatasetInfo:
    info = DatasetInfo.read(folder)
    channels = preparation.channels or info.channels
    wanted = (preparation.resolution, channels, _origin(preparation, source))
    if (info.resolution, info.channels, info.source) != wanted:
        raise PreparationError(
            f"dataset {folder.name} exists and was prepared differently ({info.resolution} pixels,"
            f" {info.channels} channels, from {info.source}): use another --name, or --overwrite"
        )
    progress(f"dataset {folder.name} is already prepared ({info.n_images:,} images); --overwrite")
    return info


def _origin(preparation: Preparation, source: Source) -> dict[str, Any]:
    return {**source.description, **preparation.settings()}


def _settle(preparation: Preparation, source: Source, told: Checks) -> tuple[Preparation, Plan]:
    """Settle the number of channels, make the plan, and check what can be known by now."""
    image_bytes = preparation.resolution**2 * (preparation.channels or 3)
    plan = Plan(len(source), source.run_length, image_bytes)
    colours = Colours.look(source, plan)
    told.tell(checks.before(preparation, source, colours))
    if preparation.channels is None:
        preparation = replace(preparation, channels=1 if colours.all_grey else 3)
    return preparation, plan


def _write_images(work: Work, told: Checks, progress: Progress) -> DatasetInfo:
    preparation, source = work.preparation, work.source
    tally = Tally(len(source))
    _write_shards(work, tally, progress)
    chosen = Selection.choose(preparation, source, tally.items)
    rejected = [*source.rejected, *tally.rejected, *_empty_classes(chosen)]
    n_rejected = len(rejected) + tally.bad - len(tally.rejected)
    _list_rejected(rejected, n_rejected, progress)
    failures = checks.unusable(preparation, source, tally)
    told.tell([] if failures else checks.after(preparation, chosen), failures)
    checks.tell_copies(chosen, preparation.drop_duplicates, progress)
    _sort_out(work, chosen)
    shape = f"{preparation.resolution}x{preparation.channels}"
    assert preparation.channels is not None
    some_held_out = bool(chosen.held_out.any())
    info = DatasetInfo(
        classes=chosen.classes,
        resolution=preparation.resolution,
        channels=preparation.channels,
        counts=chosen.counts(chosen.train),
        fingerprint=chosen.fingerprint(shape, chosen.train),
        held_out=chosen.counts(chosen.held_out) if some_held_out else [],
        held_out_fingerprint=chosen.fingerprint(shape, chosen.held_out) if some_held_out else "",
        duplicates=len(chosen.copies),
        duplicates_dropped=preparation.drop_duplicates,
        duplicates_conflicting=chosen.conflicting,
        sizes=chosen.sizes(),
        source=_origin(preparation, source),
        rejected=rejected[:REJECTED_KEPT],
        reasons=dict(tally.reasons.most_common(100)),
    )
    work.draft.write_json(DESCRIPTION, info.model_dump())
    return info


def _write_shards(work: Work, tally: Tally, progress: Progress) -> None:
    """Write all shards that are not there yet, and take in what became of every item."""
    missing = set(range(len(work.plan)))
    for index, record in finished_shards(work.draft, work.plan):
        tally.add(index, work.plan.items(index), record)
        missing.remove(index)
    if tally.done:
        done = len(work.plan) - len(missing)
        progress(f"taking up at {done:,} of {len(work.plan):,} shards, {tally.done:,} images done")

    def task(work: Work, index: int) -> dict[str, Any]:
        items = work.plan.items(index)
        record = write_shard(work.preparation, work.source, items, work.draft, index)
        return {"index": index, "record": record.to_bytes()}

    with ImageProgress(len(work.source), progress, left=tally.done) as shown:
        for row in on_cluster(task, work, sorted(missing)):
            record = Record.from_bytes(row["record"])
            tally.add(row["index"], work.plan.items(row["index"]), record)
            shown.advance(len(record.kept), len(record.rejected))


def on_cluster(
    task: Callable[[Any, int], dict[str, Any]], common: Any, shards: list[int]
) -> Iterator[dict[str, Any]]:
    """`task(common, shard)` for each shard, on all cores; yields its results as they are done."""
    if not shards:
        return
    quiet_ray_data()
    # Stored once, and read where it is needed: a task itself is one number.
    shared = ray.put((common, np.array(shards)))

    def run(row: dict[str, Any]) -> dict[str, Any]:
        pa.set_cpu_count(1)  # As many tasks run as there are cores.
        common, shards = ray.get(shared)
        return task(common, int(shards[row["id"]]))

    rows = ray.data.range(len(shards), override_num_blocks=len(shards)).map(run, num_cpus=1)
    yield from rows.iter_rows()


def _empty_classes(chosen: Selection) -> list[Rejected]:
    labels, kept = chosen.source.labels, chosen.images.kept
    readable = np.bincount(labels[kept], minlength=len(chosen.empty))
    return [
        Rejected(
            path=chosen.source.classes[i],
            reason="class without an image to train on: all are copies or held out"
            if readable[i]
            else "class without a readable image",
        )
        for i in np.flatnonzero(chosen.empty).tolist()
    ]


def _list_rejected(rejected: list[Rejected], n_rejected: int, progress: Progress) -> None:
    for entry in rejected[: checks.SHOWN]:
        progress(f"rejected {entry.path}: {entry.reason}")
    if n_rejected > checks.SHOWN:
        progress(f"and {n_rejected - checks.SHOWN:,} more, listed in {DESCRIPTION}")


def _sort_out(work: Work, chosen: Selection) -> None:
    """Write parts anew from which images are dropped or held out, or whose labels change."""
    if not (chosen.dropped.any() or chosen.held_out.any() or chosen.empty.any()):
        return

    def task(common: tuple[Work, Selection], index: int) -> dict[str, Any]:
        work, chosen = common
        items = work.plan.items(index)
        rows = items[chosen.images.kept[items]]
        dropped, held_out = chosen.dropped[rows], chosen.held_out[rows]
        sort_out(work.draft, index, dropped, held_out, chosen.renumbered)
        return {"index": index}

    for _ in on_cluster(task, (work, chosen), list(range(len(work.plan)))):
        pass


def _measure_reference(
    draft: Folder, info: DatasetInfo, min_accuracy: float | None, progress: Progress
) -> None:
    """Train the built-in extractor and take the dataset's moments, on the best machine there is."""
    node = largest_node()
    progress("training the classifier whose features FID compares")
    # One core is claimed whatever is used: beside an endpoint that holds one, a task that claimed
    # the whole machine would wait for ever.
    task = ray.remote(measure_reference).options(num_cpus=1, num_gpus=min(1, node.gpus))
    accuracy = result(task.remote(draft, max(1, node.cpus)))
    progress(f"classifier: {accuracy:.1%} of the images that it did not learn from right")
    check_accuracy(accuracy, info.counts, min_accuracy)


def measure_reference(folder: Folder, threads: int) -> float:
    """Add the `classifier` extractor and its references to a dataset; returns its accuracy."""
    # A cluster may count more cores than its machines have.
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    dataset = Dataset.open(folder.uri)
    device = own_device()
    network, accuracy = train_classifier(dataset, device, progress=print)
    save_classifier(network, accuracy, dataset, folder)
    extractor = load_extractor("classifier", folder, device)
    if dataset.info.n_images <= Classifier.FEATURES:
        print(
            f"warning: {dataset.info.n_images:,} images leave the covariance of"
            f" {Classifier.FEATURES} features singular: FID will say little"
        )
    Reference.measure(dataset, extractor).save(folder, "classifier")
    if dataset.info.held_out:
        held_out = Dataset.open(folder.uri, split="held_out")
        Reference.measure(held_out, extractor).save(folder, "classifier.held_out")
    return accuracy


def _sweep_up(draft: Folder) -> None:
    """Delete half-written files of tasks that were killed."""
    for file in draft.children():
        if file.endswith(".tmp"):
            draft.delete_file(file)


def _tell_done(info: DatasetInfo, folder: Folder, progress: Progress) -> None:
    rejected = max(len(info.rejected), sum(info.reasons.values()))
    held_out = f"{sum(info.held_out):,} held out, " if info.held_out else ""
    progress(
        f"dataset {folder.name}: {info.n_images:,} images, {held_out}{len(info.classes):,} classes,"
        f" {rejected:,} rejected, at {folder}"
    )
