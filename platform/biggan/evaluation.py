"""Measuring anything that holds a generator, on Ray: a run's best checkpoint, any, or a model.

Images are generated and seen by the feature network in tasks of a few batches each, on any core or
GPU of the cluster; a batch is the same whoever makes it, so the result does not depend on how many
tasks run at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray
import torch

from biggan.candidates import load_checkpoint
from biggan.cluster import connect, largest_node, own_device, result
from biggan.config import EvalConfig, RunConfig
from biggan.data.dataset import Dataset, Progress, open_dataset
from biggan.data.parts import Split
from biggan.errors import UserError
from biggan.metrics.extractors import CLASSIFIER_FILE, Extractor, load_extractor
from biggan.metrics.fid import Draw, Observed, observe, open_evaluator, open_extractor
from biggan.metrics.report import Evaluation, joined, report
from biggan.models import ModelStore, find_model, load_card, load_generator
from biggan.networks import Generator
from biggan.parallel import CPU, Workers
from biggan.runs import best_checkpoint
from biggan.storage import Folder, StorageError, locate

EVALUATION = "evaluation.json"
TASK_BATCHES = 4
"""Batches a task; enough that starting it costs little."""


@dataclass(frozen=True)
class Subject:
    """A generator to be measured, and where the result goes."""

    name: str
    G: Generator
    config: RunConfig | None
    """That of the run it comes from; None for an imported model."""
    standing: int
    """Images its standing statistics were collected over."""
    folder: Folder
    """Where `evaluation.json` is written."""


def evaluate(
    *,
    run: str | None = None,
    checkpoint: str | None = None,
    model: str | None = None,
    dataset: str | None = None,
    num_samples: int | None = None,
    truncation: float | None = None,
    extractor: str | None = None,
    inception_weights: str | None = None,
    reference: Split | None = None,
    repeats: int = 1,
    workers: int | None = None,
    root: str | None = None,
    progress: Progress = lambda _line: None,
) -> Evaluation:
    """Measure a run's best checkpoint, one checkpoint (path or URI), or a model.

    Give exactly one of the three. `dataset`, `num_samples`, `extractor` and `reference` are by
    default those of the run that the generator comes from; an imported model has no run behind it,
    so that `dataset` must be given. A checkpoint's generator is measured as in training; a model's
    with the standing statistics it was exported with, at a truncation those collected at it. With
    several `repeats` each measure is a mean, with its standard deviation, over as many independent
    draws. `workers` tasks run at a time on the connected cluster, 0: as many as there is room for;
    None measures in this process. Writes `evaluation.json` beside what was measured, and a model's
    card. Raises `UserError`.
    """
    if [run, checkpoint, model].count(None) != 2:
        raise UserError("give exactly one of run, checkpoint and model")
    _check_numbers(num_samples, repeats, workers)
    # Tasks have devices of their own.
    device = Workers.current().device if workers is None else CPU
    subject = _find(run, checkpoint, model, root, device)
    if subject.config is None and dataset is None:
        raise UserError(
            f"model {model} was imported, without the dataset that it was trained on: name a"
            " prepared one to compare with (dataset, --dataset)"
        )
    asked = {
        "dataset": dataset,
        "eval.num_samples": num_samples,
        "eval.extractor": extractor,
        "eval.inception_weights": inception_weights,
        "eval.reference": reference,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    config = (subject.config or RunConfig()).override(given)
    data = _open_fitting(config, subject.G, root)
    if workers is not None:
        connect()
        ensure_reference(config, data.folder)
    evaluator = open_evaluator(data, config.eval, device)
    settings = config.eval.num_samples, subject.G.sample_batch, truncation
    draws = [Draw(evaluator.counts, *settings, repeat) for repeat in range(repeats)]
    task = Task(subject.G, config.eval, data.folder)
    passes = [
        (draw, joined(list(task.observe(draw, workers, progress))).among(data.class_ids))
        for draw in draws
    ]
    protocol = evaluator.protocol(subject.G, draws[0], subject.standing)
    evaluation = report(subject.name, passes, evaluator.reference, protocol)
    _keep(subject, evaluation)
    return evaluation


def _check_numbers(num_samples: int | None, repeats: int, workers: int | None) -> None:
    if num_samples is not None and num_samples < 2:
        raise UserError(f"num_samples is {num_samples}, must be 2 or more: FID needs a covariance")
    if repeats < 1:
        raise UserError(f"repeats is {repeats}, must be 1 or more")
    if workers is not None and workers < 0:
        raise UserError(f"workers is {workers}, must be 1 or more, or 0 for as many as have room")


def _find(
    run: str | None,
    checkpoint: str | None,
    model: str | None,
    root: str | None,
    device: torch.device,
) -> Subject:
    """The generator that is meant."""
    if model is not None:
        folder = find_model(model, root)
        card = load_card(folder)
        G = load_generator(folder.uri, device=device)
        standing = int(card.fid_protocol.get("standing_statistics", 0))
        return Subject(f"{card.name}@{card.version}", G, card.hyperparameters, standing, folder)
    if run is not None:
        home = locate("runs", run, root)
        folder = best_checkpoint(home)[0]
    else:
        home = folder = locate("runs", str(checkpoint), root)
    candidate = load_checkpoint(folder, device)
    name = f"{folder.parent.parent.name}/{folder.parent.name}/{folder.name}"
    return Subject(name, candidate.G, candidate.record.config, 0, home)


def _open_fitting(config: RunConfig, G: Generator, root: str | None) -> Dataset:
    """The dataset to compare with; raises `StorageError` unless it is the generator's kind."""
    data = open_dataset(config, root)
    shape = {"resolution": G.resolution, "channels": G.channels, "n_classes": G.n_classes}
    if data.info.shape != shape:
        raise StorageError(
            f"dataset {data.folder.name} has {data.info.shape}, the generator"
            f" {G.resolution} pixels, {G.channels} channels, {G.n_classes} classes"
        )
    return data


def _keep(subject: Subject, evaluation: Evaluation) -> None:
    """Write the result beside what was measured, and onto a model's card."""
    subject.folder.write_json(EVALUATION, evaluation.model_dump(mode="json"))
    if "@" in subject.name:
        ModelStore(subject.folder.parent.uri).note(subject.folder.name, evaluation)


@dataclass(frozen=True)
class Task:
    """What it takes to observe a generator's images, in this process or in tasks of the cluster."""

    G: Generator
    config: EvalConfig
    dataset: Folder
    """Holds the classifier of its own labels."""

    def observe(self, draw: Draw, workers: int | None, progress: Progress) -> Iterator[Observed]:
        """What is seen of every batch of a draw, in order; `workers` as in `evaluate`."""
        if workers is None:
            equipped = self._equip(next(self.G.parameters()).device)
            yield from (observe(*equipped, draw, batch) for batch in range(len(draw)))
            return
        remote, room = _on_cluster(_observe_some)
        shared = ray.put(self)
        plan = [
            list(range(start, min(start + TASK_BATCHES, len(draw))))
            for start in range(0, len(draw), TASK_BATCHES)
        ]
        begin, done = time.monotonic(), 0
        # The reference is in a list, so that it stays one.
        for seen in _in_order(lambda part: remote([shared], draw, part), plan, workers or room):
            done += sum(len(one.features) for one in seen)
            rate = done / (time.monotonic() - begin)
            progress(f"evaluated {done:,}/{draw.num_samples:,} images, {rate:,.0f} images/s")
            yield from seen

    def _equip(self, device: torch.device) -> tuple[Generator, Extractor, Extractor | None]:
        judge = None
        if self.dataset.exists(CLASSIFIER_FILE):
            judge = load_extractor("classifier", self.dataset, device)
        extractor = open_extractor(self.config, self.dataset, device)
        return self.G.to(device), extractor, judge


def _on_cluster(function: Callable[..., Any]) -> tuple[Callable[..., Any], int]:
    """A function as a task on a GPU, if there are any, or a core; and how many have room."""
    gpus = largest_node().gpus > 0
    room = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
    return ray.remote(function).options(num_cpus=1, num_gpus=1 if gpus else 0).remote, room


def _in_order(
    start: Callable[[list[int]], Any], plan: Sequence[list[int]], at_a_time: int
) -> Iterator[list[Observed]]:
    """Results of tasks in the plan's order, with so many running or done but not taken."""
    waiting: deque[Any] = deque()
    for batches in plan:
        waiting.append(start(batches))
        if len(waiting) >= at_a_time:
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())


def _observe_some(shared: list[Any], draw: Draw, batches: list[int]) -> list[Observed]:
    """Some batches of a draw, in a task."""
    torch.set_num_threads(1)  # A sum's order, and so its rounding, depends on their number.
    equipped = _equip_once(shared[0])
    return [observe(*equipped, draw, batch) for batch in batches]


@lru_cache(maxsize=1)
def _equip_once(shared: Any) -> tuple[Generator, Extractor, Extractor | None]:
    """What a process needs, which may serve several tasks."""
    return ray.get(shared)._equip(own_device())  # type: ignore[no-any-return]


def ensure_reference(config: RunConfig, dataset: Folder) -> None:
    """See to it that a dataset has the reference that a run's evaluations will ask for.

    It is measured on the cluster: where there are GPUs, on one of them.
    """
    # That of all images by the classifier is made at preparation.
    if config.eval.extractor != "classifier" or config.data.classes:
        remote, _ = _on_cluster(_ensure_reference_here)
        result(remote(config, dataset))


def _ensure_reference_here(config: RunConfig, dataset: Folder) -> None:
    open_evaluator(open_dataset(config, name=dataset.uri), config.eval, own_device())
