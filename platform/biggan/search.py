"""Searching hyper-parameters on Ray Tune, with trials stopped early on FID.

Every trial is a run of its own, `sweeps/NAME/trial_NNNNN`, with all that a run's folder holds.
Asynchronous successive halving (ASHA; Li et al. 2018, arXiv 1810.05934) stops a trial whose FID is
not among the best at its age, counted in images seen so that batch sizes compete fairly.
"""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform

from biggan.claim import claimed
from biggan.cluster import connect, largest_node, own_device
from biggan.config import ConfigError, RunConfig
from biggan.data.dataset import DatasetInfo, open_dataset, read_info
from biggan.data.reading import with_settled_mode
from biggan.data.stream import StreamReader
from biggan.distributed import Scaling, check_fit, fit
from biggan.evaluation import EVALUATION, ensure_reference, evaluate
from biggan.loop import KeepCheckpoints, Report, TrainingLoop
from biggan.metrics.protocol import differences
from biggan.metrics.report import Evaluation
from biggan.parallel import Workers
from biggan.runs import best_checkpoint, open_run
from biggan.storage import Folder, locate, training_patience
from biggan.trials import LiveTable, SweepResult, summarize, trial_folder

Space = Mapping[str, Domain | str]
"""What is searched: dotted field names, and what values each may take (see `parse_domain`)."""

PLAN = "sweep.json"
SHARED = {
    "dataset",
    "data.classes",
    "total_kimg",
    "eval.every_kimg",
    "eval.num_samples",
    "eval.extractor",
    "eval.inception_weights",
    "eval.reference",
    "eval.mode",
    "checkpoint.every_kimg",
}
"""Fields that all trials of a sweep have in common, since their FIDs are compared by them."""


@dataclass(frozen=True)
class Search:
    """How a sweep searches, and what each trial may use."""

    num_trials: int = 16
    """Configurations tried; the first is the one the sweep starts from."""
    max_concurrent: int = 0
    """Trials at a time; 0 is as many as the cluster has room for."""
    workers_per_trial: int = 1
    """One trains in the trial's own process; several form a Ray Train group each."""
    cpus_per_worker: int = 1
    """CPU cores a worker computes with."""
    gpus_per_worker: float | None = None
    """GPUs a worker takes; a fraction lets trials share one. If not said: 1 if there are any."""
    grace_kimg: float = 0.0
    """No trial is stopped younger than this; 0 is a ninth of the run's length."""
    reduction_factor: int = 3
    """At each of ASHA's rungs about one in this many trials goes on, to this many times the age."""
    search_seed: int = 0
    """Decides the configurations drawn."""
    noise_repeats: int = 4
    """Draws that the best trial is measured over in the end: the noise of FID, beside which the
    differences between trials are seen. 0: not measured."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_trials", 1),
            ("max_concurrent", 0),
            ("workers_per_trial", 1),
            ("cpus_per_worker", 1),
            ("grace_kimg", 0),
            ("reduction_factor", 2),
            ("noise_repeats", 0),
        ):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name} = {value}: must be {least} or more")
        if self.workers_per_trial > 1 and self.gpus_per_worker not in (None, 0, 1):
            raise ConfigError(
                f"gpus_per_worker = {self.gpus_per_worker} with workers_per_trial ="
                f" {self.workers_per_trial}: only one-worker trials can share a GPU; use 0 or 1"
            )


def default_space(config: RunConfig) -> dict[str, Domain]:
    """Learning rates of G and D, batch size, and strength of orthogonal regularization.

    Around the configuration's own values: rates from a fifth to five times, half to twice the
    batch, and strengths from 1e-6 to 1e-2.
    """
    optim = config.optim
    step = optim.accumulation
    return {
        "optim.lr_g": tune.loguniform(optim.lr_g / 5, optim.lr_g * 5),
        "optim.lr_d": tune.loguniform(optim.lr_d / 5, optim.lr_d * 5),
        "optim.batch_size": tune.choice(
            [max(optim.batch_size // 2 // step, 1) * step, optim.batch_size, optim.batch_size * 2]
        ),
        "loss.ortho_g": tune.loguniform(1e-6, 1e-2),
    }


def parse_domain(text: str) -> Domain:
    """A set of values from text.

    The text is ``loguniform(1e-5, 1e-3)``, ``uniform(0, 1)``, ``randint(1, 5)`` (5 excluded) or
    ``choice([32, 64, 128])``. Raises `ConfigError` for anything else.
    """
    makers: dict[str, Callable[..., Domain]] = {
        "loguniform": tune.loguniform,
        "uniform": tune.uniform,
        "randint": tune.randint,
        "choice": tune.choice,
    }
    try:
        match ast.parse(text.strip(), mode="eval").body:
            case ast.Call(func=ast.Name(id=maker), args=arguments, keywords=[]):
                return makers[maker](*map(ast.literal_eval, arguments))
            case _:
                raise ValueError(text)
    except Exception:
        raise ConfigError(
            f"search space {text!r}: write loguniform(1e-5, 1e-3), uniform(0, 1), randint(1, 5) or"
            " choice([32, 64, 128])"
        ) from None


def sweep(
    config: RunConfig,
    name: str,
    space: Space | None = None,
    *,
    search: Search | None = None,
    root: str | None = None,
) -> SweepResult:
    """Search `space` around `config` as sweep `name`, or take up the sweep of that name.

    `config` is what the fields outside the space are set to, and the first trial. Without a space,
    `default_space` is searched; any field can be, but those that FIDs are compared by (`SHARED`).
    Finished trials of an interrupted sweep are kept, unfinished ones resume from their checkpoints.
    Raises `ConfigError` for an unknown or shared field, a value no run could have, or a sweep of
    that name with another plan; `StorageError` if there is no such dataset; `ClaimError` if another
    command is at this sweep.
    """
    search = search or Search()
    # Every report of a trial carries an FID of its own, and every checkpoint one as well.
    config = config.override({"checkpoint.every_kimg": config.eval.every_kimg})
    if config.eval.mode != "inline":
        raise ConfigError(
            f"eval.mode = {config.eval.mode!r}: a sweep stops trials on FIDs as they come, so that"
            " they are taken in training's course; set it to inline"
        )
    domains = {
        key: parse_domain(value) if isinstance(value, str) else value
        for key, value in (space or default_space(config)).items()
    }
    dataset = locate("datasets", config.dataset, root)
    info = read_info(config, root)
    _check_space(config, domains, info, search)
    folder = locate("sweeps", name, root)
    with claimed(folder, "searched"):
        _open_plan(folder, config, domains, search, info)
        connect()
        ensure_reference(config, dataset)
        _quiet_tune()
        trial = _trial(config, dataset, info, folder, search)
        if tune.Tuner.can_restore(folder.uri):
            tuner = tune.Tuner.restore(folder.uri, trial, resume_errored=True, param_space=domains)
        else:
            tuner = _new_tuner(trial, config, domains, folder, search)
        return summarize(folder, config, list(domains), tuner.fit(), _noise(search, root))


def _noise(search: Search, root: str | None) -> Callable[[Folder], float | None]:
    """What measures the standard deviation of a trial's FID; once, since it is kept."""

    def measure(trial: Folder) -> float | None:
        checkpoint, info = best_checkpoint(trial)
        repeats = search.noise_repeats
        if checkpoint.exists(EVALUATION):
            kept = Evaluation.model_validate(checkpoint.read_json(EVALUATION))
            alike = not differences(kept.protocol, info.fid_protocol or {})
            if alike and kept.repeats == repeats:  # And not one that a user took otherwise.
                return kept.measures["fid"].deviation
        print(f"measuring the noise of FID: {trial.name}, {repeats} draws", flush=True)
        evaluation = evaluate(checkpoint=checkpoint.uri, repeats=repeats, workers=0, root=root)
        return evaluation.measures["fid"].deviation

    return measure if search.noise_repeats > 1 else lambda _trial: None


def _quiet_tune() -> None:
    """Trials keep their own metrics: no further loggers, and no complaint that there are none."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)


def _check_space(
    config: RunConfig, domains: Mapping[str, Domain], info: DatasetInfo, search: Search
) -> None:
    """Raise `ConfigError` if a field is unknown, or the ends of its values make no valid run."""
    for field_name, domain in domains.items():
        if field_name in SHARED:
            raise ConfigError(
                f"search space {field_name}: trials can be compared only if they share it; it is"
                " set for the whole sweep"
            )
        ends = _ends(domain)
        if not ends or (isinstance(domain, Float | Integer) and domain.lower >= domain.upper):
            raise ConfigError(f"search space {field_name}: {_text(domain)} holds no values")
        for value in ends:
            check_fit(config.override({field_name: value}), info, search.workers_per_trial)


def _ends(domain: Domain) -> list[Any]:
    if isinstance(domain, Categorical):
        return list(domain.categories)
    if isinstance(domain, Integer):
        return [domain.lower, domain.upper - 1]
    if isinstance(domain, Float):
        # And one between, which no field for whole numbers takes.
        between = domain.lower + (domain.upper - domain.lower) * 0.3819
        return [domain.lower, domain.upper, between]
    return [domain.sample()]


def _text(domain: Domain) -> str:
    if isinstance(domain, Float):
        kind = "loguniform" if isinstance(domain.get_sampler(), LogUniform) else "uniform"
    else:
        kind = {Categorical: "choice", Integer: "randint"}.get(type(domain), type(domain).__name__)
    return f"{kind}{domain.domain_str}"


def _open_plan(
    folder: Folder,
    config: RunConfig,
    domains: Mapping[str, Domain],
    search: Search,
    info: DatasetInfo,
) -> None:
    """Write down what the sweep is, or make sure that the one there is the same."""
    plan = {
        "config": config.model_dump(mode="json"),
        "space": {name: _text(domain) for name, domain in domains.items()},
        "search": asdict(search),
        "dataset_fingerprint": info.fingerprint,
    }
    if not folder.exists(PLAN):
        folder.write_json(PLAN, plan)
        return
    before = folder.read_json(PLAN)
    # Settings that came with a later version than began it have their defaults.
    before["config"] = RunConfig.parse(before["config"]).model_dump(mode="json")
    before["search"] = asdict(Search()) | before["search"]
    changed = [key for key in plan if before.get(key) != plan[key]]
    if changed:
        raise ConfigError(
            f"sweep {folder.name} exists with another {' and '.join(changed)}: use another --name,"
            " or repeat the command it was begun with to take it up again"
        )


def _trial(
    config: RunConfig, dataset: Folder, info: DatasetInfo, folder: Folder, search: Search
) -> Any:
    """The function that Tune runs for each set of values, with the resources it needs."""
    gpus = search.gpus_per_worker
    if gpus is None:
        gpus = min(1, largest_node().gpus)

    def in_process(values: dict[str, Any]) -> None:
        run, trial_config = _begin_trial(config, info, folder, values)
        workers = Workers(0, 1, own_device())
        trial_config = with_settled_mode(trial_config, info, run, workers)
        TrainingLoop(
            trial_config,
            open_dataset(trial_config, name=dataset.uri),
            run,
            workers,
            _report_keeping(run, trial_config.checkpoint.keep),
            say=None,
            stream=StreamReader,
        ).run()

    def in_group(values: dict[str, Any]) -> None:
        run, trial_config = _begin_trial(config, info, folder, values)
        scaling = Scaling(
            search.workers_per_trial, gpu=bool(gpus), cpus_per_worker=search.cpus_per_worker
        )
        fit(trial_config, dataset, run, scaling, callbacks=[TuneReportCallback()], quiet=True)

    if search.workers_per_trial > 1:
        return tune.with_resources(in_group, {"cpu": 0.01})  # The group's workers take their own.
    return tune.with_resources(in_process, {"cpu": search.cpus_per_worker, "gpu": gpus})


def _begin_trial(
    config: RunConfig, info: DatasetInfo, folder: Folder, values: dict[str, Any]
) -> tuple[Folder, RunConfig]:
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # It announces every checkpoint.
    patient = Folder(folder.uri, training_patience())
    run = patient / trial_folder(tune.get_context().get_trial_id())
    return run, open_run(run, config.override(values), info)


def _report_keeping(run: Folder, keep: int) -> Report:
    """A report to Tune, with checkpoints kept in the run's own folder.

    Tune's own keeping would not do: it notes its state only every few seconds, so that the last it
    remembers of a trial may be behind what the trial's folder holds, and it gives a trial that it
    did not remember another folder.
    """
    keeper = KeepCheckpoints(run, keep)

    def report(metrics: dict[str, Any], checkpoint: Folder | None, /) -> None:
        keeper(metrics, checkpoint)
        tune.report(metrics)

    return report


def _new_tuner(
    trial: Any, config: RunConfig, domains: Mapping[str, Domain], folder: Folder, search: Search
) -> tune.Tuner:
    start = {name: value for name, value in config.flatten().items() if name in domains}
    length = config.total_kimg
    scheduler = ASHAScheduler(
        time_attr="kimg",
        metric="fid",
        mode="min",
        max_t=length,  # type: ignore[arg-type]  # Fractions of a kimg are as good as whole ones.
        grace_period=min(search.grace_kimg or length / 9, length),  # type: ignore[arg-type]
        reduction_factor=search.reduction_factor,
        stop_last_trials=False,  # A trial ends itself, and says how.
    )
    return tune.Tuner(
        trial,
        param_space=dict(domains),
        tune_config=tune.TuneConfig(
            num_samples=search.num_trials,
            scheduler=scheduler,
            search_alg=BasicVariantGenerator(
                points_to_evaluate=[start],
                max_concurrent=search.max_concurrent,
                random_state=search.search_seed,
            ),
            trial_dirname_creator=lambda t: trial_folder(t.trial_id),
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=folder.parent.uri,
            callbacks=[LiveTable(list(domains), config, search.num_trials)],
            verbose=0,
        ),
    )
