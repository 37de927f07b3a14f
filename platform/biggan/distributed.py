"""Training on Ray: the launcher that a user calls, and the worker that Ray Train starts.

A run's folder is Ray Train's experiment folder, so that a run started again under the same name
resumes from its latest checkpoint, after a crash of a worker as after one of the whole cluster.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import (
    CheckpointUploadMode,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    ScalingConfig,
    TrainingFailedError,
    ValidationConfig,
    ValidationTaskConfig,
    WorkerGroupError,
)
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from biggan.candidates import load_checkpoint
from biggan.checkpoint import CheckpointInfo, note_fid
from biggan.claim import claim_on, claimed
from biggan.cluster import cause, connect, largest_node, own_device
from biggan.config import ConfigError, RunConfig
from biggan.data.batches import check_batch
from biggan.data.dataset import DatasetInfo, open_dataset, read_info
from biggan.data.reading import with_settled_mode
from biggan.data.stream import StreamReader
from biggan.errors import UserError
from biggan.evaluation import ensure_reference
from biggan.journal import sheet_file
from biggan.loop import (
    PREEMPTED,
    KeepCheckpoints,
    RefusedError,
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
    note_evaluation,
    open_run,
    read_metrics,
)
from biggan.storage import Folder, UnavailableError, locate, training_patience

DOES_NOT_FIT = "does not fit: "
REFUSED = "refused: "
ENDINGS: dict[str, type[UserError]] = {DOES_NOT_FIT: DoesNotFitError, REFUSED: UnavailableError}
"""Beginnings of what a worker returns after which trying again is of no use, and what it is."""


@dataclass(frozen=True)
class Scaling:
    """What a run is spread over. Decides its speed, not its outcome."""

    workers: int = 1
    """Processes that share each batch; on GPUs, one a GPU."""
    min_workers: int = 0
    """Elastic: train with as many workers as there is room for, down to this number, and grow again
    when machines come back. 0 waits for all of them."""
    resize_every_s: float = 60.0
    """Seconds between looks whether there is room for more workers: a change of their number starts
    all of them anew, from the latest checkpoint."""
    gpu: bool | None = None
    """Whether each worker takes a GPU; if not said, whether the cluster has one by now."""
    cpus_per_worker: int = 0
    """CPU cores kept for each worker; 0 keeps one, and computes with a share of the machine."""
    max_failures: int = 3
    """Restarts from the latest checkpoint when workers fail, as long as no new checkpoint comes
    between; -1 is without limit. Machines that announce their end do not count."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers = {self.workers}: must be 1 or more")
        if self.cpus_per_worker < 0:
            raise ConfigError(f"cpus_per_worker = {self.cpus_per_worker}: must be 0 or more")
        if not 0 <= self.min_workers <= self.workers:
            raise ConfigError(
                f"min_workers = {self.min_workers}: must be from 0 to workers = {self.workers}"
            )
        if self.max_failures < -1:
            raise ConfigError(f"max_failures = {self.max_failures}: must be -1 or more")

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
        elastic = 0 < self.min_workers < self.workers
        return ScalingConfig(
            num_workers=(self.min_workers, self.workers) if elastic else self.workers,  # type: ignore[arg-type]
            use_gpu=self.on_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=self.resize_every_s,  # type: ignore[call-arg]
        )

    def sizes(self, config: RunConfig) -> list[int]:
        """The numbers of workers to train with, among which the batch divides; ascending."""
        parts = config.optim.accumulation
        least = self.min_workers or self.workers
        return [
            n for n in range(least, self.workers + 1) if config.optim.batch_size % (parts * n) == 0
        ]


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
    is there; `StorageError` if there is no such dataset, or storage refuses for too long;
    `ClaimError` if another command trains this run; `DoesNotFitError` if a micro-batch does not fit
    in memory; and what Ray Train raises when workers fail more than `scaling.max_failures` times.
    """
    scaling = scaling or Scaling()
    dataset = locate("datasets", config.dataset, root)
    info = read_info(config, root)
    for workers in {scaling.min_workers or scaling.workers, scaling.workers}:
        check_fit(config, info, workers)
    run = locate("runs", name, root)
    with claimed(run, "trained") as claim:
        config = open_run(run, config, info)
        if over := _already_over(config, run):
            return RunResult(run, over)
        connect()
        ensure_reference(config, dataset)
        return RunResult(run, stop_reason=fit(config, dataset, run, scaling, claim=claim.token))


def fit(
    config: RunConfig,
    dataset: Folder,
    run: Folder,
    scaling: Scaling,
    *,
    callbacks: Sequence[Any] = (),
    quiet: bool = False,
    claim: str = "",
) -> str:
    """Train on Ray Train until the run is over, whatever becomes of workers; returns why it ended.

    Ray Train restarts workers that fail, from the latest checkpoint. What is begun anew here is a
    group that left machines which are about to go, and one that has used up its restarts but came
    further than the one before.
    """
    run, failures = Folder(run.uri, training_patience()), 0
    evaluations: list[Any] = []
    spec = {
        "config": config.model_dump(),
        "dataset": dataset.uri,
        "run": run.uri,
        "cpus": scaling.cpus_per_worker,
        "quiet": quiet,
        "claim": claim,
        "patience": run.patience,
    }
    while True:
        evaluations += _catch_up(config, dataset, run, scaling)
        before = _newest_step(run)
        try:
            result = _trainer(config, dataset, run, scaling, callbacks, spec).fit()
            reason = str(result.return_value)  # type: ignore[attr-defined]
        except (TrainingFailedError, RayActorError) as error:  # The latter: what leads them died.
            if user_error := cause(error, UserError):
                raise user_error from None
            if isinstance(error, ControllerError) and cause(error, OSError):
                _wait_for_storage(run)  # It was refused Ray Train's own file in the run's folder.
            failures = 0 if _newest_step(run) > before else failures + 1
            # Workers have had their restarts by now; what leads them has had none.
            limit = 0 if isinstance(error, WorkerGroupError) else scaling.max_failures
            if scaling.max_failures == 0 or 0 <= limit < failures:
                raise
            print_line(f"{run.name}: {str(error).splitlines()[-1]}; going on all the same")
            continue
        for beginning, kind in ENDINGS.items():
            if reason.startswith(beginning):
                raise kind(reason.removeprefix(beginning))
        if reason != PREEMPTED:
            if evaluations:
                ray.wait(evaluations, num_returns=len(evaluations))
            return reason
        print_line(f"{run.name}: left machines that are about to go; going on elsewhere")


def _trainer(
    config: RunConfig,
    dataset: Folder,
    run: Folder,
    scaling: Scaling,
    callbacks: Sequence[Any],
    spec: dict[str, Any],
) -> Trainer:
    return Trainer(
        train_worker,
        sizes=scaling.sizes(config),
        train_loop_config=spec,
        scaling_config=scaling.to_ray(),
        run_config=ray_run_config(run, scaling.max_failures, callbacks),
        validation_config=_validation(config, dataset, run, scaling),
    )


def _wait_for_storage(run: Folder) -> None:
    run.write_bytes("probe", b"")
    run.delete_file("probe")


def _newest_step(run: Folder) -> int:
    return max((info.step for info in checkpoints(run).values()), default=-1)


class Trainer(TorchTrainer):
    """A `TorchTrainer` whose elastic groups have only sizes that the batch divides among."""

    def __init__(self, *args: Any, sizes: list[int], **kwargs: Any) -> None:
        """`sizes`: numbers of workers, ascending."""
        super().__init__(*args, **kwargs)
        self._sizes = sizes

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        if isinstance(kwargs["scaling_policy"], ElasticScalingPolicy):
            kwargs["scaling_policy"] = Sizes(self.scaling_config, self._sizes)
        return super()._initialize_and_run_controller(**kwargs)  # type: ignore[misc]


class Sizes(ElasticScalingPolicy):
    """Elastic scaling in steps: the largest of some sizes that there is room for."""

    def __init__(self, scaling_config: ScalingConfig, sizes: list[int]) -> None:
        """`sizes`: numbers of workers, ascending."""
        super().__init__(scaling_config)  # type: ignore[arg-type]
        self._sizes = sizes

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= room), default=0)


def _catch_up(config: RunConfig, dataset: Folder, run: Folder, scaling: Scaling) -> list[Any]:
    """Tasks that take the FIDs which an interrupted command left to be taken.

    Ray Train's own list of checkpoints, in the run's folder, would know them; but it is written in
    place, so that a kill or a full disk leaves half of one, and a list of checkpoints that are not
    there any more is refused as well. It is begun anew.
    """
    run.delete_file("checkpoint_manager_snapshot.json")
    evaluate = ray.remote(**_evaluation_resources(scaling))(evaluate_checkpoint)
    return [
        evaluate.remote(ray.train.Checkpoint((run / name).path), run.uri, dataset.uri)
        for name, info in checkpoints(run).items()
        if info.awaits_fid and config.eval.mode == "async"
    ]


def _evaluation_resources(scaling: Scaling) -> dict[str, Any]:
    return {"num_cpus": 1, "num_gpus": 1 if scaling.on_gpu else 0}


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
        ray_remote_kwargs=_evaluation_resources(scaling),
    )


def evaluate_checkpoint(
    checkpoint: ray.train.Checkpoint, run: str = "", dataset: str = "", **_kwargs: Any
) -> dict[str, Any]:
    """Take a checkpoint's FID beside training: a task of its own, which Ray Train starts.

    Writes it onto the checkpoint and among the run's metrics, with a sheet of samples; returns what
    Ray Train ranks checkpoints by.
    """
    torch.set_num_threads(1)  # The core that it was given.
    home, device = Folder(run, training_patience()), own_device()
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


def ray_run_config(run: Folder, max_failures: int, callbacks: Sequence[Any]) -> RayRunConfig:
    """Ray Train's settings for a run whose folder is `run`."""
    return RayRunConfig(
        name=run.name,
        storage_path=run.parent.uri,
        failure_config=FailureConfig(max_failures=max_failures),
        callbacks=list(callbacks),
        logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
    )


def train_worker(spec: dict[str, Any]) -> str:
    """One worker of a run, under Ray Train; returns why the run ended."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train logs every report once more.
    config = RunConfig.parse(spec["config"])
    torch.set_num_threads(spec["cpus"] or _share_of_cores(config))
    run = Folder(spec["run"], spec["patience"])
    workers = Workers.current(get_device())
    if workers.is_main and spec["claim"]:
        # A command that was taken for dead, and has been replaced, starts no workers any more.
        claim_on(run, spec["claim"]).check()
    say = None if spec["quiet"] else print_line
    if say and workers.is_main and workers.size > 1:
        say(f"{run.name}: {workers.size} workers")
    info = read_info(config, name=spec["dataset"])
    config = with_settled_mode(config, info, run, workers)
    # Not from `ray.train.get_checkpoint()`, which does not look whether it is damaged.
    loop = TrainingLoop(
        config,
        open_dataset(config, name=spec["dataset"], progress=say),
        run,
        workers,
        _report_to(run, config.checkpoint.keep),
        say=say,
        stream=StreamReader,
        evaluated_beside=True,
        must_leave=_machine_is_about_to_go,
    )
    try:
        return loop.run()
    except DoesNotFitError as error:
        if loop.workers.size > 1:  # The others wait for this one: only a restart frees them.
            raise
        return DOES_NOT_FIT + str(error)
    except RefusedError as error:
        return REFUSED + str(error)


def _machine_is_about_to_go() -> bool:
    """Whether Ray was told that this group loses a machine (`ray drain-node`).

    Ray's public `get_preemption_info` makes all workers wait for each other; this is asked at every
    step, and told to the others with the losses.
    """
    return get_train_context().preemption_context.preemption_info is not None


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


def _report_to(run: Folder, keep: int) -> Report:
    """A report to Ray Train, of checkpoints that are kept or deleted by our own rule.

    Ray keeps the best and the latest: if that one is damaged, the next is far behind.
    """
    keeper = KeepCheckpoints(run, keep)

    def report(metrics: dict[str, Any], checkpoint: Folder | None, /) -> None:
        ray.train.report(
            metrics,
            ray.train.Checkpoint(checkpoint.path, checkpoint.filesystem) if checkpoint else None,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            delete_local_checkpoint_after_upload=False,
            validation=bool(checkpoint) and metrics["awaits_fid"],
        )
        keeper(metrics, checkpoint)

    return report
