"""Training on Ray: the launcher that a user calls, and the worker that Ray Train starts.

A run's folder is Ray Train's experiment folder, so that a run started again under the same name
resumes from its latest checkpoint, after a crash of a worker as after one of the whole cluster.
"""

from __future__ import annotations

import io
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import ray.train
import torch
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    ScalingConfig,
    ValidationConfig,
    ValidationTaskConfig,
)
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer, get_device

from biggan.candidates import load_checkpoint
from biggan.checkpoint import CheckpointInfo, note_fid
from biggan.cluster import connect, largest_node, own_device
from biggan.config import ConfigError, RunConfig
from biggan.data.batches import check_batch
from biggan.data.dataset import DatasetInfo, open_dataset, read_info
from biggan.data.reading import with_settled_mode
from biggan.data.stream import StreamReader
from biggan.evaluation import ensure_reference
from biggan.journal import sheet_file
from biggan.loop import (
    Report,
    TrainingLoop,
    evaluation_batch,
    print_line,
    reason_to_stop,
    sample_sheet,
)
from biggan.memory import DoesNotFitError
from biggan.metrics.extractors import check_extractor
from biggan.metrics.fid import measure
from biggan.networks import check_model
from biggan.parallel import Workers
from biggan.runs import (
    best_checkpoint,
    checkpoints,
    latest_checkpoint,
    note_evaluation,
    open_run,
    read_metrics,
)
from biggan.storage import Folder, locate

DOES_NOT_FIT = "does not fit: "
"""Begins what a worker returns whose micro-batch found no room: trying it again is of no use."""


@dataclass(frozen=True)
class Scaling:
    """What a run is spread over. Decides its speed, not its outcome."""

    workers: int = 1
    """Processes that share each batch; on GPUs, one a GPU."""
    gpu: bool | None = None
    """Whether each worker takes a GPU; if not said, whether the cluster has one by now."""
    cpus_per_worker: int = 0
    """CPU cores kept for each worker; 0 keeps one, and computes with a share of the machine."""
    max_failures: int = 3
    """Restarts from the latest checkpoint when workers fail; -1 is without limit."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers = {self.workers}: must be 1 or more")
        if self.cpus_per_worker < 0:
            raise ConfigError(f"cpus_per_worker = {self.cpus_per_worker}: must be 0 or more")

    @property
    def on_gpu(self) -> bool:
        """Whether each worker takes a GPU, of the connected cluster."""
        return largest_node().gpus > 0 if self.gpu is None else self.gpu

    def to_ray(self) -> ScalingConfig:
        """Ray Train's form, with what was left open settled for the connected cluster.

        By default a worker claims one core, whatever it computes with: a run that claimed the whole
        machine would wait for ever beside an endpoint that holds a core.
        """
        resources = {"CPU": self.cpus_per_worker or 1} | ({"GPU": 1} if self.on_gpu else {})
        return ScalingConfig(
            num_workers=self.workers, use_gpu=self.on_gpu, resources_per_worker=resources
        )


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and where it lies."""

    folder: Folder
    stop_reason: str
    """"finished", "patience", "diverged: ..." or "collapsed: ..." with the place and the cause."""

    @property
    def diverged(self) -> bool:
        """Whether a loss or weight became infinite or NaN."""
        return self.stop_reason.startswith("diverged")

    @property
    def collapsed(self) -> bool:
        """Whether the guard saw a collapse."""
        return self.stop_reason.startswith("collapsed")

    @property
    def best(self) -> tuple[Folder, CheckpointInfo]:
        """The checkpoint with the lowest FID; raises `StorageError` if none was evaluated."""
        return best_checkpoint(self.folder)

    @property
    def metrics(self) -> pd.DataFrame:
        """Every row of the run's metrics: step, kimg, losses, images a second, FID."""
        return pd.DataFrame(read_metrics(self.folder))


def train(
    config: RunConfig, name: str, *, root: str | None = None, scaling: Scaling | None = None
) -> RunResult:
    """Train a BigGAN as run `name`, or resume the run of that name where it left off.

    Raises `ConfigError` if the configuration does not fit the dataset, the workers or the run that
    is there; `StorageError` if there is no such dataset; `DoesNotFitError` if a micro-batch does
    not fit in memory; and what Ray Train raises when workers fail more than `scaling.max_failures`
    times.
    """
    scaling = scaling or Scaling()
    dataset = locate("datasets", config.dataset, root)
    info = read_info(config, root)
    check_fit(config, info, scaling.workers)
    run = locate("runs", name, root)
    config = open_run(run, config, info)
    if over := _already_over(config, run):
        return RunResult(run, over)
    connect()
    ensure_reference(config, dataset)
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # Ray's stated types lag behind Train V2.
        train_loop_config=worker_spec(config, dataset, run, scaling.cpus_per_worker),
        scaling_config=scaling.to_ray(),
        run_config=ray_run_config(config, run, max_failures=scaling.max_failures),
        validation_config=_validation(config, dataset, run, scaling),  # type: ignore[call-arg]
    )
    result = trainer.fit()
    reason = str(result.return_value)  # type: ignore[attr-defined]
    if reason.startswith(DOES_NOT_FIT):
        raise DoesNotFitError(reason.removeprefix(DOES_NOT_FIT))
    return RunResult(run, stop_reason=reason)


def _validation(
    config: RunConfig, dataset: Folder, run: Folder, scaling: Scaling
) -> ValidationConfig | None:
    """How Ray Train has checkpoints evaluated beside training; None if the loop does it itself."""
    if config.eval.mode == "inline":
        return None
    kind, each = ("GPU", 1) if scaling.on_gpu else ("CPU", scaling.cpus_per_worker or 1)
    there = int(ray.cluster_resources().get(kind, 0))
    if 0 < there <= scaling.workers * each:
        print_line(
            f"warning: eval.mode async, but {scaling.workers} workers take all {there} {kind}s:"
            " unless the cluster grows, evaluations wait until training is over"
        )
    return ValidationConfig(
        fn=evaluate_checkpoint,
        task_config=ValidationTaskConfig(fn_kwargs={"run": run.uri, "dataset": dataset.uri}),
        ray_remote_kwargs={"num_cpus": 1, "num_gpus": 1 if scaling.on_gpu else 0},
    )


def evaluate_checkpoint(
    checkpoint: ray.train.Checkpoint, run: str = "", dataset: str = "", **_kwargs: Any
) -> dict[str, Any]:
    """Take a checkpoint's FID beside training: a task of its own, which Ray Train starts.

    Writes it onto the checkpoint and among the run's metrics, with a sheet of samples; returns what
    Ray Train ranks checkpoints by.
    """
    torch.set_num_threads(1)  # The core that it was given.
    home, device = Folder(run), own_device()
    candidate = load_checkpoint(home / checkpoint.path.rstrip("/").rsplit("/", 1)[-1], device)
    config, G, kimg = candidate.record.config, candidate.G, candidate.info.images_seen / 1000
    fid = measure(
        G,
        open_dataset(config, name=dataset),
        config.eval,
        num_samples=config.eval.num_samples,
        batch_size=evaluation_batch(config, G),
    )
    note_fid(candidate.checkpoint, fid)
    note_evaluation(home, candidate.info.step, fid)
    picture = io.BytesIO()
    sample_sheet(G, config).save(picture, "PNG")
    home.write_bytes(sheet_file(kimg), picture.getvalue())
    print_line(f"{home.name}: {fid} at {kimg:g} kimg")
    return {"checkpoint_fid": fid.value}


def _already_over(config: RunConfig, run: Folder) -> str:
    """Why a run that was trained before needs no more training; empty if it does."""
    if not (saved := checkpoints(run)):
        return ""
    latest = list(saved.values())[-1]
    return reason_to_stop(config, latest.images_seen, latest.standing)


def check_fit(config: RunConfig, dataset: DatasetInfo, workers: int) -> None:
    """Raise `ConfigError` unless the configuration fits the dataset and the number of workers."""
    check_extractor(config.eval.extractor)
    if config.eval.reference == "held_out" and not sum(dataset.held_out):
        raise ConfigError(
            f"eval.reference = 'held_out': dataset {config.dataset} has no held-out images; prepare"
            " it with --held-out 0.1, or set eval.reference to train"
        )
    check_model(config.model, dataset.resolution)
    check_batch(config, workers)


def worker_spec(
    config: RunConfig, dataset: Folder, run: Folder, cpus: int, quiet: bool = False
) -> dict[str, Any]:
    """What `train_worker` is handed."""
    return {
        "config": config.model_dump(),
        "dataset": dataset.uri,
        "run": run.uri,
        "cpus": cpus,
        "quiet": quiet,
    }


def ray_run_config(
    config: RunConfig, run: Folder, max_failures: int, callbacks: Sequence[Any] = ()
) -> RayRunConfig:
    """Ray Train's settings for a run whose folder is `run`."""
    return RayRunConfig(
        name=run.name,
        storage_path=run.parent.uri,
        failure_config=FailureConfig(max_failures=max_failures),
        checkpoint_config=CheckpointConfig(
            num_to_keep=config.checkpoint.keep,
            checkpoint_score_attribute="checkpoint_fid",
            checkpoint_score_order="min",
        ),
        callbacks=list(callbacks),
        logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
    )


def train_worker(spec: dict[str, Any]) -> str:
    """One worker of a run, under Ray Train; returns why the run ended."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train logs every report once more.
    config = RunConfig.parse(spec["config"])
    torch.set_num_threads(spec["cpus"] or _share_of_cores(config))
    run, workers = Folder(spec["run"]), Workers.current(get_device())
    say = None if spec["quiet"] else print_line
    info = read_info(config, name=spec["dataset"])
    config = with_settled_mode(config, info, run, workers)
    loop = TrainingLoop(
        config,
        open_dataset(config, name=spec["dataset"], progress=say),
        run,
        workers,
        _report_to(run),
        # Not `ray.train.get_checkpoint()`, which does not look whether it is damaged.
        resume_from=latest_checkpoint(run),
        say=say,
        stream=StreamReader,
        evaluated_beside=True,
    )
    try:
        return loop.run()
    except DoesNotFitError as error:
        if loop.workers.size > 1:  # The others wait for this one: only a restart frees them.
            raise
        return DOES_NOT_FIT + str(error)


def _share_of_cores(config: RunConfig) -> int:
    """The cores of this machine for each of a run's workers on it.

    One is left for evaluations beside training: threads that wait for a core wait all the time.

    A function of the machine and not of what else runs, since another number of threads would
    round differently when a run resumes.
    """
    sharing: int = ray.train.get_context().get_local_world_size()
    linux = hasattr(os, "sched_getaffinity")  # Which heeds a container's limits.
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return max(1, (cores - (config.eval.mode == "async")) // sharing)


def _report_to(run: Folder) -> Report:
    """A report to Ray Train, whose checkpoints never take the place of others.

    A run that resumed before a damaged checkpoint comes by its step again; Ray still counts the
    damaged one, and would delete the new one in its stead if both had one name.
    """

    def report(metrics: dict[str, Any], checkpoint: Path | None, /) -> None:
        name = f"checkpoint_{metrics['step']:09d}"
        if checkpoint and run.exists(name):
            name += f"_{uuid.uuid4().hex[:4]}"
        # Of the workers' names, Ray takes the main worker's.
        ray.train.report(
            metrics,
            ray.train.Checkpoint.from_directory(checkpoint) if checkpoint else None,
            checkpoint_dir_name=name,
            validation=bool(checkpoint) and metrics["awaits_fid"],
        )

    return report
