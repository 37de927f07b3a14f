"""The training loop: step, measure, save, report, until the run is over. Knows nothing of Ray.

The loop hands metrics and checkpoints to a `report` callable: `ray.train.report` under Ray Train,
`ray.tune.report` for a one-worker trial of a sweep. Everything it does between two steps follows
from the number of images seen, so all workers do it at the same step, and a resumed run does it
where the uninterrupted one would have.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from biggan import checkpoint
from biggan.checkpoint import Standing
from biggan.config import RunConfig
from biggan.data.batches import Batches
from biggan.data.dataset import Dataset, Progress
from biggan.journal import Journal
from biggan.metrics.extractors import load_extractor
from biggan.metrics.fid import FID, Evaluator
from biggan.networks import Generator
from biggan.parallel import Workers
from biggan.pixels import sheet
from biggan.runs import checkpoints
from biggan.storage import Folder
from biggan.training import TrainStep, build

WORST_FID = 1e6
"""Stands for the FID of a run that diverged, and of a checkpoint that was not evaluated: finite,
since no comparison holds with NaN and early stopping would never stop such a run."""


class Report(Protocol):
    """Receives metrics and, on the main worker, a folder whose copy is to be kept as a checkpoint.

    Every worker calls it equally often, always with the same keys.
    """

    def __call__(self, metrics: dict[str, Any], checkpoint: Path | None, /) -> None:
        """Take one report."""


def print_line(line: str) -> None:
    """Print a line at once, also where output is a file."""
    print(line, flush=True)


class KeepCheckpoints:
    """The `Report` of plain Python, torchrun and one-worker trials: keeps the best and the latest.

    Ray keeps them by the same rule.
    """

    def __init__(self, run: Folder, keep: int) -> None:
        """Keep `keep` checkpoints of `run`, and the latest."""
        self.run, self.keep = run, keep

    def __call__(self, metrics: dict[str, Any], folder: Path | None, /) -> None:
        """Take one report."""
        if folder is None:
            return
        (self.run / f"checkpoint_{metrics['step']:09d}").upload(folder)
        infos = checkpoints(self.run)
        ranked = sorted(infos, key=lambda name: (infos[name].fid or WORST_FID, -infos[name].step))
        for name in set(ranked[self.keep :]) - {list(infos)[-1]}:
            (self.run / name).delete()


def reason_to_stop(config: RunConfig, images_seen: int, standing: Standing) -> str:
    """Why a run that stands so is over: "finished" or "patience"; empty if it is not."""
    patience = config.eval.patience
    if patience and standing.evaluations_since_best >= patience:
        return "patience"
    return "finished" if images_seen >= config.total_kimg * 1000 else ""


class DivergedError(RuntimeError):
    """A loss or weight is no longer finite; says which, and at what step."""


class TrainingLoop:
    """One run on this worker, from its start or a checkpoint to its end."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        run: Folder,
        workers: Workers,
        report: Report,
        resume_from: Folder | None = None,
        say: Progress | None = print_line,
    ) -> None:
        """`say` receives progress lines, on the main worker; None is silence.

        Raises `ConfigError` if the configuration does not fit the dataset or the workers.
        """
        # A resumed run is the uninterrupted one bit for bit: no kernels that add in any order.
        torch.backends.cudnn.deterministic = True
        self.config = config
        self.workers = workers
        self.report = report
        self.dataset = dataset
        self.state = build(config, **dataset.info.shape, device=workers.device)
        self.standing = Standing()
        if resume_from:
            self.standing = checkpoint.restore(resume_from, self.state)
        self.batches = Batches(config, dataset, workers)
        self.train_step = TrainStep(config, self.state, workers.wrap)
        extractor = load_extractor(config.eval.extractor, dataset.folder, workers.device)
        self.evaluator = Evaluator(dataset, extractor)
        self.journal = Journal(config, run, self.state.step, say) if workers.is_main else None
        self._started = time.monotonic() - self.standing.seconds

    def run(self) -> str:
        """Train to the end; returns why it ended: "finished", "patience", or "diverged: ..."."""
        if reason := self._reason_to_stop():  # It had ended, but that may not have been heard of.
            self.report(self._metrics(WORST_FID, reason), None)
        try:
            while not (reason := self._reason_to_stop()):
                begin = time.monotonic()
                losses = self._step()
                seconds = time.monotonic() - begin
                fid = self._evaluate() if self._due(self.config.eval.every_kimg) else None
                if self.journal:
                    self.journal.step(self.state.step, losses, seconds, fid, self.standing)
                if fid or self._due(self.config.checkpoint.every_kimg):
                    self._checkpoint(fid)
        except DivergedError as error:
            reason = f"diverged: {error}"
            self.report(self._metrics(WORST_FID, reason), None)
        if self.journal:
            self.journal.close(self.state.step, reason, self.standing)
        return reason

    def _reason_to_stop(self) -> str:
        return reason_to_stop(self.config, self.state.images_seen, self.standing)

    def _due(self, every_kimg: float) -> bool:
        """Whether the last step crossed a multiple of `every_kimg`, or was the last of the run."""
        now = self.state.kimg
        before = now - self.config.step_images / 1000
        crossed = math.floor(now / every_kimg) > math.floor(before / every_kimg)
        return crossed or now >= self.config.total_kimg

    def _step(self) -> dict[str, float]:
        local = self.train_step(self.batches.inputs(self.state.step))
        means = self.workers.sum(torch.stack(list(local.values()))) / self.workers.size
        losses = dict(zip(local, means.tolist(), strict=True))
        # The mean over workers is the same on all of them, so all of them stop together.
        for name, value in losses.items():
            if not math.isfinite(value):
                raise DivergedError(f"{name} is {value} at step {self.state.step}")
        return losses

    def _evaluate(self) -> FID:
        self._check_weights()
        fid = self.evaluator.fid(
            self.state.G_ema,
            self.workers,
            num_samples=self.config.eval.num_samples,
            batch_size=self.config.eval.batch_size,
        )
        standing = self.standing
        standing.fid = fid.value
        standing.evaluations_since_best += 1
        if standing.best_fid is None or fid.value < standing.best_fid:
            standing.best_fid, standing.best_kimg = fid.value, self.state.kimg
            standing.evaluations_since_best = 0
        if self.journal:
            self.journal.sample_sheet(sample_sheet(self.state.G_ema, self.config), self.state.step)
        return fid

    def _check_weights(self) -> None:
        for name, network in (("G", self.state.G), ("D", self.state.D)):
            if weight := non_finite_weight(network):
                raise DivergedError(f"{name}.{weight} is not finite at step {self.state.step}")

    def _checkpoint(self, fid: FID | None) -> None:
        self._check_weights()
        self.standing.seconds = time.monotonic() - self._started
        measured = fid.value if fid else WORST_FID
        metrics = self._metrics(measured, self._reason_to_stop())
        if not self.workers.is_main:
            self.report(metrics, None)
            return
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            checkpoint.save(
                folder, self.state, seed=self.config.seed, standing=self.standing, fid=fid
            )
            if self.journal:
                self.journal.flush()
            self.report(metrics, folder)

    def _metrics(self, checkpoint_fid: float, stop_reason: str) -> dict[str, Any]:
        standing = self.standing
        diverged = stop_reason.startswith("diverged")
        return {
            "step": self.state.step,
            "kimg": self.state.kimg,
            "fid": WORST_FID if diverged or standing.fid is None else standing.fid,
            "best_fid": WORST_FID if standing.best_fid is None else standing.best_fid,
            "checkpoint_fid": checkpoint_fid,
            "seconds": standing.seconds,
            "stop_reason": stop_reason,
        }


def non_finite_weight(network: nn.Module) -> str | None:
    """Name of the first weight with an infinity or NaN in it."""
    parameters = dict(network.named_parameters())
    norms = torch._foreach_norm(list(parameters.values()))
    finite = torch.stack(norms).isfinite().tolist()
    return next((name for name, ok in zip(parameters, finite, strict=True) if not ok), None)


def sample_sheet(G: Generator, config: RunConfig) -> Image.Image:
    """Samples of `G`, a class a column and a latent a row; the same latents at every call.

    Latents are not truncated: the sheet shows what FID measures.
    """
    columns = min(config.eval.sheet_columns, G.n_classes)
    classes = [k * G.n_classes // columns for k in range(columns)]
    rows = config.eval.sheet_rows
    seeds = [row for row in range(rows) for _ in classes]
    return sheet(G.sample(classes * rows, seeds, truncation=None), columns)
