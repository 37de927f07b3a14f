"""The training loop: step, measure, save, report, until the run is over. Knows nothing of Ray.

The loop hands metrics and checkpoints to a `report` callable: `ray.train.report` under Ray Train,
`ray.tune.report` for a one-worker trial of a sweep. Everything it does between two steps follows
from the number of images seen, so all workers do it at the same step, and a resumed run does it
where the uninterrupted one would have.
"""

from __future__ import annotations

import math
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from biggan import checkpoint
from biggan.checkpoint import CheckpointInfo, Rollback, Snapshot, Standing
from biggan.claim import Writer
from biggan.config import ConfigError, RunConfig
from biggan.data.batches import Batches, Prefetch
from biggan.data.dataset import Dataset, Progress
from biggan.data.reading import OpenStream
from biggan.guard import Guard
from biggan.journal import Journal, Took
from biggan.memory import (
    DoesNotFitError,
    free_unused_memory,
    is_out_of_memory,
    keep_freed_memory,
    remember_accumulation,
    smaller_accumulations,
    with_accumulation,
    with_fitting_accumulation,
)
from biggan.metrics.fid import FID, Evaluator, open_evaluator
from biggan.metrics.protocol import digest
from biggan.networks import Generator
from biggan.parallel import Workers
from biggan.pixels import sheet
from biggan.runs import (
    bring_in_unsaved,
    checkpoints,
    delete_unfinished,
    good_checkpoint,
    latest_checkpoint,
    read_rollbacks,
    remember_rollbacks,
    unsaved,
)
from biggan.storage import Folder, UnavailableError
from biggan.training import StepInputs, TrainStep, build

WORST_FID = 1e6
"""Stands for the FID of a run that diverged, and of a checkpoint that was not evaluated: finite,
since no comparison holds with NaN and early stopping would never stop such a run."""


PREEMPTED = "preempted"
"""Why a run ended here that is to go on elsewhere."""


class Report(Protocol):
    """Receives metrics and, on the main worker, the checkpoint that was just written.

    Every worker calls it equally often, always with the same keys.
    """

    def __call__(self, metrics: dict[str, Any], checkpoint: Folder | None, /) -> None:
        """Take one report."""


def print_line(line: str) -> None:
    """Print a line at once, also where output is a file."""
    print(line, flush=True)


class KeepCheckpoints:
    """A `Report` that deletes the checkpoints of a run that are not worth keeping.

    Kept are those with the lowest FIDs, those whose FID is still to be taken, the latest, and the
    one before it: what to resume from if the latest turns out damaged.
    """

    def __init__(self, run: Folder, keep: int) -> None:
        """Keep `keep` checkpoints of `run` for their FIDs."""
        self.run, self.keep = run, keep

    def __call__(self, _metrics: dict[str, Any], written: Folder | None, /) -> None:
        """Take one report."""
        if written is None:
            return
        infos = checkpoints(self.run)
        ranked = sorted(infos, key=lambda name: (infos[name].fid or WORST_FID, -infos[name].step))
        awaiting = {name for name, info in infos.items() if info.awaits_fid}
        for name in set(ranked[self.keep :]) - set(list(infos)[-2:]) - awaiting:
            (self.run / name).delete()


def reason_to_stop(config: RunConfig, images_seen: int, standing: Standing) -> str:
    """Why a run that stands so is over: "finished" or "patience"; empty if it is not."""
    patience = config.eval.patience
    if patience and standing.evaluations_since_best >= patience:
        return "patience"
    return "finished" if images_seen >= config.total_kimg * 1000 else ""


def crosses(every_kimg: float, images_seen: int, step_images: int) -> bool:
    """Whether a step that ended at `images_seen` crossed a multiple of `every_kimg`.

    Both ends are divided alike, so that rounding neither skips a multiple nor shows it twice.
    """
    before, now = (images_seen - step_images) / 1000, images_seen / 1000
    return math.floor(now / every_kimg) > math.floor(before / every_kimg)


class StopError(RuntimeError):
    """Training cannot go on as it is; `kind` and message make the reason why a run ended."""

    kind = "stopped"


class DivergedError(StopError):
    """A loss or weight is no longer finite; says which, and at what step."""

    kind = "diverged"


class CollapsedError(StopError):
    """The guard saw a collapse; says which signal fired, with its figures."""

    kind = "collapsed"


class RefusedError(UnavailableError):
    """Storage took no checkpoint; raised on all workers together."""


class StepOutOfMemoryError(MemoryError):
    """A training step found no room."""


class TrainingLoop:
    """One run on this worker, from its start or a checkpoint to its end."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        run: Folder,
        workers: Workers,
        report: Report,
        say: Progress | None = print_line,
        stream: OpenStream | None = None,
        evaluated_beside: bool = False,
        must_leave: Callable[[], bool] = lambda: False,
    ) -> None:
        """`say` receives progress lines, on the main worker; None is silence.

        `stream` reads what is not to be in memory; `evaluated_beside`: whoever takes the reports
        sees to the FID of checkpoints that await one; `must_leave`: whether this worker's machine
        is about to go. Raises `ConfigError` if the configuration does not fit the dataset or the
        workers.
        """
        if config.eval.mode == "async" and not evaluated_beside:
            raise ConfigError(
                "eval.mode = 'async': only Ray Train evaluates beside training (jobs/train.py,"
                " biggan.train); set it to inline"
            )
        # A resumed run is the uninterrupted one bit for bit: no kernels that add in any order.
        torch.backends.cudnn.deterministic = True
        if config.speed.keep_memory and workers.device.type == "cpu":
            keep_freed_memory()
        self.config = with_fitting_accumulation(config, run)
        self.workers = workers
        self.report = report
        self.run_folder = run
        self.dataset = dataset
        self.say = say
        self.stream = stream
        self.prefetch: Prefetch | None = None
        self.must_leave = must_leave
        self.leaving = False
        self.waited = 0.0
        self.standing = Standing()
        self.writer = Writer(run) if workers.is_main else None
        self.aside = unsaved(run)  # Found out while storage answers.
        self._begin(self._latest())
        self.guard = Guard(config, dataset, workers)
        inline = config.eval.mode == "inline"
        self.evaluator = open_evaluator(dataset, config.eval, workers.device) if inline else None
        self.journal = self._open_journal()
        self._started = time.monotonic() - self.standing.seconds

    def _begin(self, resume_from: Folder | None) -> None:
        """Take up a checkpoint, or start anew: networks, optimizers, and where the run stands."""
        for name in ("train_step", "state"):  # There may be no room for two.
            self.__dict__.pop(name, None)
        self._stop_prefetching()
        free_unused_memory()
        self.state = build(self.config, **self.dataset.info.shape, device=self.workers.device)
        standing = checkpoint.restore(resume_from, self.state) if resume_from else Standing()
        # A run that was rolled back knows more of its past than the checkpoint it is back at.
        pasts = (standing.rollbacks, self.standing.rollbacks, read_rollbacks(self.run_folder))
        standing.rollbacks = max(pasts, key=len)
        self.standing = standing
        factor = self.config.collapse.lr_factor ** len(standing.rollbacks)
        for optimizer in (self.state.optim_G, self.state.optim_D):
            for group in optimizer.param_groups:
                group["lr"] *= factor
        batches = Batches(self.config, self.dataset, self.workers, self.stream)
        self.prefetch = Prefetch(batches, self.state.step)
        self.train_step = TrainStep(self.config, self.state, self.workers)

    def _latest(self) -> Folder | None:
        """The checkpoint to go on from, the same for all workers."""
        latest = None
        if self.workers.is_main:
            bring_in_unsaved(self.run_folder)
            delete_unfinished(self.run_folder)
            latest = latest_checkpoint(self.run_folder)
        name = self.workers.agree(latest.name if latest else "")
        return self.run_folder / name if name else None

    def _open_journal(self) -> Journal | None:
        if not self.workers.is_main:
            return None
        return Journal(self.config, self.run_folder, self.state.step, self.say)

    def _stop_prefetching(self) -> None:
        if self.prefetch:
            self.prefetch.close()
            self.prefetch = None

    def run(self) -> str:
        """Train to the end; returns why it ended.

        "finished", "patience", "preempted", "diverged: ..." or "collapsed: ...". Raises
        `DoesNotFitError` if a micro-batch does not fit in memory, `RefusedError` on all workers if
        storage takes no checkpoint, and `ClaimError` if another has become the run's writer.
        """
        try:
            return self._run()
        finally:
            self._stop_prefetching()

    def _run(self) -> str:
        if reason := self._reason_to_stop():  # It had ended, but that may not have been heard of.
            self.report(self._metrics(WORST_FID, reason), None)
        while not (reason := self._reason_to_stop()):
            memory_error = None
            begin = time.monotonic()
            try:
                measured = self._step()
                self._follow_up(measured, time.monotonic() - begin)
            except StopError as error:
                if not self._roll_back(str(error)):
                    reason = f"{error.kind}: {error}"
                    self.report(self._metrics(WORST_FID, reason), None)
                    break
            except StepOutOfMemoryError as error:
                memory_error = str(error)
            if memory_error:  # Outside the clause, which holds on to the tensors of the step.
                self._accumulate_more(memory_error)
            if self.leaving and not self._reason_to_stop():
                reason = PREEMPTED
                break
        if self.journal and self.writer:
            self.writer.check()
            self.journal.close(self.state.step, reason, self.standing)
        return reason

    def _follow_up(self, measured: dict[str, float], seconds: float) -> None:
        """What is due after a step."""
        signals, collapse = None, ""
        if self._due(self.guard.every_kimg):
            collapse = self.guard.read(self.state, self.standing.guard)
            signals = self.standing.guard.readings[-1]
        due = self._due(self.config.eval.every_kimg)
        fid = self._evaluate(self.evaluator) if due and self.evaluator else None
        if self.journal:
            took = Took(seconds, self.waited)
            self.journal.step(self.state.step, measured, took, fid, self.standing, signals, due)
        if collapse and self.config.guard != "off":
            raise CollapsedError(f"{collapse}, at {self.state.kimg:g} kimg")
        if due or self.leaving or self._due(self.config.checkpoint.every_kimg):
            self._checkpoint(fid, awaits_fid=due and not self.evaluator)

    def _roll_back(self, signal: str) -> bool:
        """Go back to the last good checkpoint, if that is wanted and not done too often."""
        config, rollbacks = self.config, self.standing.rollbacks
        if config.guard != "rollback" or len(rollbacks) >= config.collapse.max_rollbacks:
            return False
        from_step = self.state.step
        name = self.workers.agree(good_checkpoint(self.run_folder, from_step))
        target = self.run_folder / name if name else None
        to_step = CheckpointInfo.read(target).step if target else 0
        back = Rollback(from_step=from_step, to_step=to_step, signal=signal)
        if self.journal and self.writer:
            self.writer.check()
            self.journal.leave()
            # An interruption from here on must not lead back to what is left behind.
            remember_rollbacks(self.run_folder, [*rollbacks, back])
        self.standing.rollbacks = [*rollbacks, back]
        self._begin(target)
        if self.say and self.workers.is_main:
            factor = config.collapse.lr_factor ** len(self.standing.rollbacks)
            from_kimg = from_step * config.step_images / 1000
            self.say(
                f"{self.run_folder.name}: rolled back from {from_kimg:g} to {self.state.kimg:g}"
                f" kimg, learning rates now x {factor:g}: {signal}"
            )
        self.journal = self._open_journal()
        return True

    def _accumulate_more(self, error: str) -> None:
        """Find a micro-batch that fits, and go on with it or say so."""
        if self.config.speed.reuse_fakes:
            raise DoesNotFitError(
                f"a step does not fit in memory ({error}): switch speed.reuse_fakes off, which"
                " keeps the fakes of a whole batch"
            )
        smaller = smaller_accumulations(self.config, self.workers.size)
        parts = self.config.optim.accumulation * self.workers.size
        was = self.config.optim.batch_size // parts
        if self.journal:
            self.journal.leave()
        for accumulation in smaller:
            micro = self.config.optim.batch_size // (accumulation * self.workers.size)
            # Workers that did not run out wait for this one: it can only leave, and all restart.
            alone = self.workers.size == 1
            if alone and not self._fits(accumulation):
                continue
            advice = (
                f"micro-batches of {was} images do not fit in memory ({error}); {micro}"
                f" {'would fit' if alone else 'come next'}: --optim.accumulation {accumulation}"
                " keeps the optimizer's batch as it is, and --speed.auto-accumulate does"
                " that by itself"
            )
            if not self.config.speed.auto_accumulate:
                raise DoesNotFitError(advice)
            remember_accumulation(self.run_folder, accumulation)
            if not alone:
                raise DoesNotFitError(f"{advice}; restarting with it")
            self.config = with_accumulation(self.config, accumulation)
            self._begin(self._latest())
            self.journal = self._open_journal()
            if self.say:
                self.say(
                    f"{self.run_folder.name}: micro-batches of {was} images do not fit in memory;"
                    f" going on with {micro}, {accumulation} to a batch"
                )
            return
        raise DoesNotFitError(
            f"not even micro-batches of 2 images fit in memory ({error}): take smaller"
            " networks (model.ch_g, model.ch_d), or speed.recompute"
        )

    def _fits(self, accumulation: int) -> bool:
        """Whether a step from the start succeeds with that accumulation; its result is dropped."""
        config, self.config = self.config, with_accumulation(self.config, accumulation)
        fits = True
        try:
            self._begin(None)
            self._step()
        except StepOutOfMemoryError:
            fits = False
        self.config = config
        return fits

    def _reason_to_stop(self) -> str:
        return reason_to_stop(self.config, self.state.images_seen, self.standing)

    def _due(self, every_kimg: float) -> bool:
        """Whether the last step crossed a multiple of `every_kimg`, or was the last of the run."""
        crossed = crosses(every_kimg, self.state.images_seen, self.config.step_images)
        return crossed or self.state.kimg >= self.config.total_kimg

    def _step(self) -> dict[str, float]:
        try:
            local = self.train_step(self._inputs())
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise StepOutOfMemoryError(str(error).splitlines()[0]) from None
            raise
        # What one worker is told all learn with the losses, after the same step.
        values = list(local.values())
        leave = torch.full_like(values[0], float(self.must_leave()))
        sums = self.workers.sum(torch.stack([*values, leave]))
        *means, leave_mean = (sums / self.workers.size).tolist()
        self.leaving = leave_mean > 0
        losses = dict(zip(local, means, strict=True))
        self.guard.count(self.standing.guard, losses)
        # The mean over workers is the same on all of them, so all of them stop together.
        for name, value in losses.items():
            if not math.isfinite(value):
                raise DivergedError(f"{name} is {value} at step {self.state.step}")
        return losses

    def _inputs(self) -> StepInputs:
        """The next step's inputs; notes how long they kept it waiting."""
        assert self.prefetch, "a run that is over takes no steps"
        begin = time.monotonic()
        inputs = self.prefetch.inputs(self.state.step)
        self.waited = time.monotonic() - begin
        return inputs

    def _evaluate(self, evaluator: Evaluator) -> FID:
        self._check_weights()
        fid = evaluator.fid(
            self.state.G_ema,
            self.workers,
            num_samples=self.config.eval.num_samples,
            batch_size=evaluation_batch(self.config, self.state.G),
        )
        standing = self.standing
        protocol = digest(fid.protocol.as_dict())
        if standing.fid_protocol not in ("", protocol):  # Earlier FIDs tell nothing of this one.
            standing.best_fid = None
        standing.fid, standing.fid_protocol = fid.value, protocol
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

    def _checkpoint(self, fid: FID | None, *, awaits_fid: bool) -> None:
        self._check_weights()
        self.standing.seconds = time.monotonic() - self._started
        measured = fid.value if fid else WORST_FID
        metrics = self._metrics(measured, self._reason_to_stop(), awaits_fid=awaits_fid)
        written, refused = None, ""
        if self.workers.is_main:
            written = self.run_folder / self._new_name()
            refused = self._write(written, fid, awaits_fid)
        if refused := self.workers.agree(refused):
            raise RefusedError(refused)
        self.report(metrics, written)

    def _new_name(self) -> str:
        """A name for a checkpoint, that none has: one of this step may be there, damaged."""
        name = f"checkpoint_{self.state.step:09d}"
        taken = self.run_folder.exists(name)
        return f"{name}_{uuid.uuid4().hex[:4]}" if taken else name

    def _write(self, folder: Folder, fid: FID | None, awaits_fid: bool) -> str:
        """Write a checkpoint and the journal; what storage said if it did not take them.

        Then the state is kept on this machine, for the same command to go on from.
        """
        snapshot = Snapshot.take(
            self.state,
            seed=self.config.seed,
            standing=self.standing,
            fid=fid,
            awaits_fid=awaits_fid,
        )
        try:
            if self.writer:
                self.writer.check()
            if self.journal:
                self.journal.flush()
            snapshot.write(folder)
        except UnavailableError as error:
            aside = self.aside / folder.name
            try:
                snapshot.write(aside)
            except OSError as also:
                return f"{error}; nor is there room for the run's state in {aside}: {also}"
            return (
                f"{error}. The run's state at {self.state.kimg:g} kimg is kept in {aside} on"
                f" {socket.gethostname()}: the same command goes on from it once storage answers"
            )
        return ""

    def _metrics(
        self, checkpoint_fid: float, stop_reason: str, *, awaits_fid: bool = False
    ) -> dict[str, Any]:
        standing = self.standing
        diverged = stop_reason.startswith("diverged")
        return {
            "step": self.state.step,
            "kimg": self.state.kimg,
            "fid": WORST_FID if diverged or standing.fid is None else standing.fid,
            "best_fid": WORST_FID if standing.best_fid is None else standing.best_fid,
            "checkpoint_fid": checkpoint_fid,
            "awaits_fid": awaits_fid,
            "seconds": standing.seconds,
            "stop_reason": stop_reason,
        }


def non_finite_weight(network: nn.Module) -> str | None:
    """Name of the first weight with an infinity or NaN in it."""
    parameters = dict(network.named_parameters())
    norms = torch._foreach_norm(list(parameters.values()))
    finite = torch.stack(norms).isfinite().tolist()
    return next((name for name, ok in zip(parameters, finite, strict=True) if not ok), None)


def evaluation_batch(config: RunConfig, G: Generator) -> int:
    """Images that an evaluation of a run generates at a time, wherever it is done."""
    return min(config.eval.batch_size, G.sample_batch)


def sample_sheet(G: Generator, config: RunConfig) -> Image.Image:
    """Samples of `G`, a class a column and a latent a row; the same latents at every call.

    Latents are not truncated: the sheet shows what FID measures.
    """
    columns = min(config.eval.sheet_columns, G.n_classes)
    classes = [k * G.n_classes // columns for k in range(columns)]
    rows = config.eval.sheet_rows
    seeds = [row for row in range(rows) for _ in classes]
    return sheet(G.sample(classes * rows, seeds, truncation=None), columns)
