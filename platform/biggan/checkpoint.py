"""Checkpoints: all that the next step depends on, in one file that loads without pickle.

A checkpoint is a folder with `state.pt` (G, D, G_ema, both optimizers, and what gradient scaling
and regularizers remember) and `checkpoint.json` (step, FID, the size and SHA-256 of `state.pt`),
which is written last. There are no generator states to save: every random draw is a function of the
seed and the step (`biggan.latents`), so seed and step are the random state, of every rank, and the
position of the sampler.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from biggan.guard import GuardState
from biggan.metrics.fid import FID
from biggan.networks import Generator
from biggan.storage import Folder, StorageError
from biggan.training import TrainState

STATE = "state.pt"
DESCRIPTION = "checkpoint.json"


class Rollback(BaseModel):
    """One return to an earlier checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    from_step: int
    to_step: int
    signal: str
    """What told of the collapse."""


class Standing(BaseModel):
    """How a run stands, beyond its networks: what early stopping and progress lines need."""

    model_config = ConfigDict(extra="forbid")

    fid: float | None = None
    """The last FID measured."""
    best_fid: float | None = None
    """The lowest FID measured."""
    fid_protocol: str = ""
    """Digest of the protocol of both: FIDs of another are not compared with them."""
    best_kimg: float = 0.0
    """When it was measured."""
    evaluations_since_best: int = 0
    seconds: float = 0.0
    """Time spent training and evaluating, over all interruptions."""
    window: dict[str, float] = {}
    """Losses summed since the last row of metrics, and the `steps` in them, their `seconds`, and
    those `waited` for inputs."""
    guard: GuardState = GuardState()
    """What the guard against collapse remembers."""
    rollbacks: list[Rollback] = []
    """Returns to earlier checkpoints, each of which lowered the learning rates."""


class CheckpointInfo(BaseModel):
    """What `checkpoint.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    images_seen: int
    seed: int
    fid: float | None
    """FID of the checkpoint's own G_ema; None if it was not measured at this step."""
    fid_protocol: dict[str, Any] | None
    standing: Standing
    state_bytes: int
    state_sha256: str

    @classmethod
    def read(cls, folder: Folder) -> CheckpointInfo:
        """Read a checkpoint's description; raises `StorageError` if it is absent or damaged."""
        try:
            return cls.model_validate(folder.read_json(DESCRIPTION))
        except FileNotFoundError:
            raise StorageError(f"{folder} holds no whole checkpoint: no {DESCRIPTION}") from None
        except ValueError as error:
            raise StorageError(f"{folder}/{DESCRIPTION} is damaged: {error}") from None


@dataclass(frozen=True)
class Snapshot:
    """A run's state at a step, ready to be written."""

    content: memoryview
    info: CheckpointInfo

    @classmethod
    def take(cls, state: TrainState, *, seed: int, standing: Standing, fid: FID | None) -> Snapshot:
        """Copy what the next step depends on out of the networks and optimizers."""
        file = io.BytesIO()
        torch.save(
            {
                "G": state.G.state_dict(),
                "D": state.D.state_dict(),
                "G_ema": state.G_ema.state_dict(),
                "optim_G": state.optim_G.state_dict(),
                "optim_D": state.optim_D.state_dict(),
                "scaler_G": state.scaler_G.state_dict(),
                "scaler_D": state.scaler_D.state_dict(),
                "running": state.running,
            },
            file,
        )
        content = file.getbuffer()
        info = CheckpointInfo(
            step=state.step,
            images_seen=state.images_seen,
            seed=seed,
            fid=fid.value if fid else None,
            fid_protocol=fid.protocol.as_dict() if fid else None,
            standing=standing.model_copy(deep=True),
            state_bytes=len(content),
            state_sha256=hashlib.sha256(content).hexdigest(),
        )
        return cls(content, info)

    def write(self, folder: Folder) -> None:
        """Write a checkpoint; its description last, which makes it one."""
        folder.write_bytes(STATE, self.content)
        folder.write_json(DESCRIPTION, self.info.model_dump(mode="json"))


def note_fid(folder: Folder, fid: FID) -> None:
    """Write onto a checkpoint the FID that was taken of it since."""
    info = CheckpointInfo.read(folder)
    update = {"fid": fid.value, "fid_protocol": fid.protocol.as_dict()}
    folder.write_json(DESCRIPTION, info.model_copy(update=update).model_dump(mode="json"))


def restore(folder: Folder, state: TrainState) -> Standing:
    """Bring `state` to where a checkpoint left off; raises `StorageError` if it is damaged."""
    info = CheckpointInfo.read(folder)
    content = _read_state(folder, info)
    for name in ("G", "D", "G_ema"):
        getattr(state, name).load_state_dict(content[name])
    for name in ("optim_G", "optim_D"):
        optimizer: torch.optim.Optimizer = getattr(state, name)
        # Moments are the checkpoint's; learning rates and the like are the configuration's.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": content[name]["state"], "param_groups": groups})
    for name in ("scaler_G", "scaler_D"):
        scaler: torch.amp.GradScaler = getattr(state, name)
        if content.get(name):  # An idle one has no state, nor had checkpoints of earlier versions.
            scaler.load_state_dict(content[name])
    for name, value in content.get("running", {}).items():
        state.running[name].copy_(value)
    state.step, state.images_seen = info.step, info.images_seen
    return info.standing


def restore_generator(folder: Folder, G: Generator) -> CheckpointInfo:
    """Load a checkpoint's averaged generator into `G`, which is left in evaluation mode."""
    info = CheckpointInfo.read(folder)
    G.load_state_dict(_read_state(folder, info)["G_ema"])
    G.eval().requires_grad_(False)
    return info


def is_undamaged(folder: Folder) -> bool:
    """Whether a checkpoint's state is what was written."""
    return _matches(folder.read_bytes(STATE), CheckpointInfo.read(folder))


def _matches(content: bytes, info: CheckpointInfo) -> bool:
    return hashlib.sha256(content).hexdigest() == info.state_sha256


def _read_state(folder: Folder, info: CheckpointInfo) -> dict[str, Any]:
    content = folder.read_bytes(STATE)
    if not _matches(content, info):
        raise StorageError(
            f"{folder}/{STATE} is damaged: {len(content)} bytes that do not match the"
            f" {info.state_bytes} written, so that it cannot be used"
        )
    loaded: dict[str, Any] = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    return loaded
