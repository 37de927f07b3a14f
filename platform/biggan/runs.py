"""A run's folder: what was run, how it went, and which checkpoint came out best.

`runs/NAME/` (and each trial of a sweep) holds `config.json` (a `RunRecord`), `metrics.jsonl`,
TensorBoard events, `samples/*.png` and `checkpoint_*/`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from biggan.checkpoint import DESCRIPTION, STATE, CheckpointInfo, Rollback, is_undamaged
from biggan.code_version import code_version, package_version
from biggan.config import CollapseConfig, ConfigError, RunConfig
from biggan.data.dataset import DatasetInfo
from biggan.metrics.fid import FID
from biggan.metrics.protocol import digest
from biggan.storage import Folder, StorageError, cache_folder

logger = logging.getLogger(__name__)

RECORD = "config.json"
METRICS = "metrics.jsonl"
ROLLBACKS = "rollbacks.json"
EVALUATIONS = "evaluations"
"""FIDs that were taken beside training, a file each."""
SIGNALS = "signals.jsonl"
"""The guard's readings: singular values of every layer, D's accuracies, variance within classes."""

ADJUSTABLE = {
    "total_kimg",
    "eval.patience",
    "eval.mode",
    "eval.inception_weights",
    "checkpoint.every_kimg",
    "checkpoint.keep",
    "guard",
    *(f"collapse.{field}" for field in CollapseConfig.model_fields if field != "lr_factor"),
    "speed.auto_accumulate",
    "speed.keep_memory",
}
"""Fields that may differ when a run is resumed, since they leave the steps taken as they were."""


class RunRecord(BaseModel):
    """What a run's `config.json` holds: all that is needed to know what was run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: RunConfig
    dataset: DatasetInfo
    """Description of the dataset, fingerprint included, without its list of rejects."""
    code: dict[str, str]
    packages: dict[str, str]
    created: str

    @classmethod
    def make(cls, config: RunConfig, dataset: DatasetInfo) -> RunRecord:
        """The record of a run that starts now."""
        names = ("biggan-platform", "torch", "ray", "numpy", "pillow", "pyarrow")
        return cls(
            config=config,
            dataset=dataset.model_copy(update={"rejected": []}),
            code=code_version(),
            packages={"python": platform.python_version()}
            | {name: package_version(name) for name in names},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @classmethod
    def read(cls, folder: Folder) -> RunRecord:
        """Read a run's record; raises `StorageError` if there is no run."""
        if not folder.exists(RECORD):
            raise StorageError(f"no run at {folder}: it has no {RECORD}")
        try:
            return cls.model_validate(folder.read_json(RECORD))
        except ValueError as error:
            raise StorageError(f"{folder}/{RECORD} is damaged: {error}") from None


def open_run(folder: Folder, config: RunConfig, dataset: DatasetInfo) -> RunConfig:
    """Begin a run, or take up the one that is there; returns the configuration to run with.

    Raises `ConfigError` if the run there was begun with another configuration or dataset: going on
    would give a result that no configuration describes.
    """
    if not folder.exists(RECORD):
        folder.write_json(RECORD, RunRecord.make(config, dataset).model_dump(mode="json"))
        return config
    record = RunRecord.read(folder)
    if record.dataset.fingerprint != dataset.fingerprint:
        raise ConfigError(
            f"run {folder.name} was trained on other images than dataset {config.dataset} now"
            " holds: use another --name, or the dataset it was begun with"
        )
    was, now = record.config.flatten(), config.flatten()
    changed = [
        f"{field} was {was[field]!r}, is {now[field]!r}"
        for field in now
        if was[field] != now[field] and field not in ADJUSTABLE
    ]
    if changed and checkpoints(folder):  # Where nothing was saved yet, nothing is mixed up.
        raise ConfigError(
            f"run {folder.name} exists with another configuration ({'; '.join(changed)}):"
            " use another --name, or repeat the command it was begun with to resume it"
        )
    if was != now:
        updated = record.model_copy(update={"config": config})
        folder.write_json(RECORD, updated.model_dump(mode="json"))
    return config


def checkpoints(folder: Folder) -> dict[str, CheckpointInfo]:
    """A run's whole checkpoints by folder name, oldest first.

    One whose writer was killed half-way, or ran out of disk, lacks its description or part of its
    state: not listed.
    """
    whole = {}
    for name in folder.children():
        if name.startswith("checkpoint_") and (folder / name).exists(DESCRIPTION):
            with suppress(StorageError):
                info = CheckpointInfo.read(folder / name)
                if (folder / name).size(STATE) == info.state_bytes:
                    whole[name] = info
    return {name: whole[name] for name in sorted(whole, key=lambda name: (whole[name].step, name))}


def remember_rollbacks(folder: Folder, rollbacks: list[Rollback]) -> None:
    """Note a run's returns to earlier checkpoints, before the next checkpoint does."""
    folder.write_json(ROLLBACKS, [back.model_dump() for back in rollbacks])


def read_rollbacks(folder: Folder) -> list[Rollback]:
    """A run's returns to earlier checkpoints, oldest first."""
    if not folder.exists(ROLLBACKS):
        return []
    return [Rollback.model_validate(row) for row in folder.read_json(ROLLBACKS)]


def _on_course(folder: Folder) -> dict[str, CheckpointInfo]:
    """A run's whole checkpoints, without those that a rollback has left behind."""
    rollbacks = read_rollbacks(folder)
    return {
        name: info
        for name, info in checkpoints(folder).items()
        if all(info.step <= back.to_step for back in rollbacks[len(info.standing.rollbacks) :])
    }


def good_checkpoint(folder: Folder, before_step: int) -> str:
    """Name of a run's newest checkpoint that was far from collapse and is undamaged; else empty."""
    saved = _on_course(folder)
    for name in reversed(saved):
        calm = saved[name].standing.guard.calm and saved[name].step < before_step
        if calm and is_undamaged(folder / name):
            return name
    return ""


def latest_checkpoint(folder: Folder) -> Folder | None:
    """A run's newest undamaged checkpoint, to resume from; None if there is none."""
    for name in sorted(set(folder.children()) - set(checkpoints(folder))):
        if name.startswith("checkpoint_") and (folder / name).is_folder():
            logger.warning("%s is not whole; it is not used", folder / name)
    for name in reversed(_on_course(folder)):
        if is_undamaged(folder / name):
            return folder / name
        logger.warning("%s is damaged; resuming from the checkpoint before", folder / name)
    return None


def unsaved(folder: Folder) -> Folder:
    """Where this machine keeps the state of a run that its storage refused to take.

    A run that was deleted and begun anew under the same name has another place.
    """
    begun = folder.read_json(RECORD)["created"] if folder.exists(RECORD) else ""
    place = hashlib.sha256(f"{folder.uri} {begun}".encode()).hexdigest()[:8]
    return Folder(str(cache_folder() / "unsaved" / f"{folder.name}-{place}"))


def delete_unfinished(folder: Folder) -> None:
    """Delete what an interrupted writer left of checkpoints that it did not come to describe."""
    for name in folder.children():
        draft = folder / name
        if name.startswith("checkpoint_") and draft.is_folder() and not draft.exists(DESCRIPTION):
            logger.warning("%s was not written to its end; it is deleted", draft)
            draft.delete()


def bring_in_unsaved(folder: Folder) -> None:
    """Give a run the state that this machine kept for it, unless others have gone on since."""
    kept = unsaved(folder)
    there = max((info.step for info in checkpoints(folder).values()), default=-1)
    for name, info in checkpoints(kept).items():
        if info.step > there and is_undamaged(kept / name):
            for file in (STATE, DESCRIPTION):
                (folder / name).write_bytes(file, (kept / name).read_bytes(file))
    kept.delete()


def best_checkpoint(folder: Folder) -> tuple[Folder, CheckpointInfo]:
    """A run's undamaged checkpoint with the lowest FID; raises `StorageError` if there is none.

    Of FIDs of several protocols, those count that are of the newest one's.
    """
    saved = {name: info for name, info in checkpoints(folder).items() if info.fid is not None}
    newest = digest(list(saved.values())[-1].fid_protocol or {}) if saved else ""
    saved = {name: i for name, i in saved.items() if digest(i.fid_protocol or {}) == newest}
    for name in sorted(saved, key=lambda name: saved[name].fid or 0.0):
        if is_undamaged(folder / name):
            return folder / name, saved[name]
        logger.warning("%s is damaged; the next best is taken", folder / name)
    RunRecord.read(folder)  # Says so if there is no run at all.
    raise StorageError(
        f"run {folder} has no checkpoint with an FID yet: let it train past its first"
        " evaluation (eval.every_kimg)"
    )


def read_metrics(folder: Folder) -> list[dict[str, Any]]:
    """A run's rows of metrics, oldest first; none if nothing was written yet.

    FIDs that were taken beside training stand in the rows of their steps.
    """
    beside = folder / EVALUATIONS
    names = beside.children()
    found = {row["step"]: row for row in (beside.read_json(name) for name in names)}
    return [{**row, **found.get(row["step"], {})} for row in read_rows(folder, METRICS)]


def note_evaluation(folder: Folder, step: int, fid: FID) -> None:
    """Note an FID that was taken beside training, for `read_metrics`."""
    row = {"step": step, **fid_row(fid)}
    (folder / EVALUATIONS).write_json(f"{step:09d}.json", row)


def fid_row(fid: FID) -> dict[str, Any]:
    """What a row of metrics says of an FID."""
    protocol = fid.protocol.as_dict()
    return {
        "fid": fid.value,
        "fid_extractor": fid.protocol.extractor,
        "fid_protocol": digest(protocol),
    }


def read_rows(folder: Folder, name: str) -> list[dict[str, Any]]:
    """A file of one JSON object a line; none if nothing was written yet.

    A last line without its end was being written when its writer was killed, and does not count.
    """
    if not folder.exists(name):
        return []
    whole, _, _ = folder.read_bytes(name).rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]
