"""How a run goes, told to people and files: progress lines, metrics, TensorBoard, sample sheets.

Only the main worker keeps a journal. A row is written every `ROW_EVERY_KIMG` and at every
evaluation, with losses averaged since the row before; their sums are part of a checkpoint, so that
an interrupted run writes the rows of an uninterrupted one. `data_wait` in a row is the part of the
steps' time, from 0 to 1, that went by before their inputs were there; `stall` is the part of all
time since the row before that passed outside of steps: evaluations, checkpoints, reports.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from biggan.checkpoint import Standing
from biggan.config import RunConfig
from biggan.guard import Reading, sigma_growth
from biggan.metrics.fid import FID
from biggan.runs import METRICS, SIGNALS, fid_row, read_rows
from biggan.storage import Folder, insist

ROW_EVERY_KIMG = 1.0
LINE_EVERY_SECONDS = 5.0
WORTH_A_WORD = 0.05
"""The part of the time spent waiting for images from which on the progress line says so."""


@dataclass(frozen=True)
class Took:
    """How long a step took."""

    seconds: float
    waited: float
    """Seconds of it that went by before its inputs were there."""


def sheet_file(kimg: float) -> str:
    """The file of a run's sample sheet at an age."""
    return f"samples/{kimg:09.1f}kimg.png"


class Rows:
    """A file on this machine that rows are appended to, each whole or not at all."""

    def __init__(self, path: Path, patience: float) -> None:
        """`patience`: the seconds to wait for room on a full disk."""
        self.path, self.patience = path, patience
        self._file = path.open("ab", buffering=0)
        self._end = path.stat().st_size

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; raises `UnavailableError` if there is no room for it."""
        insist(f"writing {self.path}", self.patience, lambda: self._write(json.dumps(row)))

    def _write(self, text: str) -> None:
        line = text.encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Journal:
    """Writes into a run's folder, and prints.

    Files on this machine are written at once. Object stores cannot append, so files for them
    gather in a temporary folder that `flush` uploads.
    """

    def __init__(
        self, config: RunConfig, run: Folder, step: int, say: Callable[[str], None] | None
    ) -> None:
        """Take up a run at `step`: rows that an interrupted attempt wrote beyond it are dropped."""
        self.config = config
        self.run = run
        self._say = say or (lambda _line: None)
        self._temporary = None if run.is_local else tempfile.TemporaryDirectory()
        self._local = Folder(self._temporary.name, run.patience) if self._temporary else run
        self._metrics = self._take_up(METRICS, step)
        self._signal_rows = self._take_up(SIGNALS, step)
        self._tensorboard = SummaryWriter(self._local.path, purge_step=step + 1)
        self._line_time = self._start_time = time.monotonic()
        self._seconds_since_line = self._waited_since_line = 0.0
        self._row_time, self._seconds_since_row = self._start_time, 0.0
        self._start_step = step
        what = f"resuming at {self._kimg(step):g} of" if step else "starting a run of"
        self._say(f"{run.name}: {what} {config.total_kimg:g} kimg on {config.dataset}")

    def _take_up(self, name: str, step: int) -> Rows:
        """A file of rows, to be appended to, without those beyond `step`."""
        kept = [row for row in read_rows(self.run, name) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        self._local.write_bytes(name, text.encode())
        return Rows(Path(self._local.path) / name, self.run.patience)

    def _kimg(self, step: int) -> float:
        return step * self.config.step_images / 1000

    def step(
        self,
        step: int,
        losses: dict[str, float],
        took: Took,
        fid: FID | None,
        standing: Standing,
        signals: Reading | None = None,
        evaluated: bool = False,
    ) -> None:
        """Note a step's losses and duration, and FID and signals of collapse if they were taken.

        `evaluated`: a row is due all the same, since this step's FID is taken here or elsewhere.
        """
        window = standing.window
        if signals:
            self._signals(step, standing.guard.readings)
        times = {"steps": 1, "seconds": took.seconds, "waited": took.waited}
        for name, value in (losses | times).items():
            window[name] = window.get(name, 0.0) + value
        self._seconds_since_line += took.seconds
        self._seconds_since_row += took.seconds
        self._waited_since_line += took.waited
        border = math.floor(self._kimg(step) / ROW_EVERY_KIMG)
        if evaluated or border > math.floor(self._kimg(step - 1) / ROW_EVERY_KIMG):
            self._row(step, fid, window)
            window.clear()
        if fid or time.monotonic() - self._line_time >= LINE_EVERY_SECONDS:
            self._line(step, losses, standing)

    def _row(self, step: int, fid: FID | None, window: dict[str, float]) -> None:
        steps = window["steps"]
        row: dict[str, Any] = {"step": step, "kimg": self._kimg(step), "time": time.time()}
        times = ("steps", "seconds", "waited")
        row |= {k: v / steps for k, v in window.items() if k not in times}
        row["images_per_second"] = steps * self.config.step_images / window["seconds"]
        row["data_wait"] = window.get("waited", 0.0) / window["seconds"]
        row["stall"] = self._stall()
        if fid:
            row |= fid_row(fid)
        self._metrics.append(row)
        for name, value in row.items():
            if name not in ("step", "time", "fid_extractor", "fid_protocol"):
                tag = f"fid/{fid.protocol.extractor}" if fid and name == "fid" else name
                self._tensorboard.add_scalar(tag, value, step)

    def _stall(self) -> float:
        """The part of the time since the row before that no step was being taken in, 0 to 1."""
        now = time.monotonic()
        elapsed, stepping = now - self._row_time, self._seconds_since_row
        self._row_time, self._seconds_since_row = now, 0.0
        return max(0.0, 1 - stepping / elapsed)

    def _signals(self, step: int, readings: list[Reading]) -> None:
        now = readings[-1]
        layer, growth = sigma_growth(readings)
        row = {
            "step": step,
            "kimg": now.kimg,
            "accuracy_real": now.accuracy_real,
            "accuracy_fake": now.accuracy_fake,
            "class_variance": now.class_variance,
            "sigma_growth": growth,
            "sigma_growth_layer": layer,
            "sigma": now.sigma,
        }
        self._signal_rows.append(row)
        for name in ("class_variance", "sigma_growth"):
            self._tensorboard.add_scalar(f"guard/{name}", row[name], step)
        for name, value in now.sigma.items():
            self._tensorboard.add_scalar(f"sigma/{name}", value, step)

    def _line(self, step: int, losses: dict[str, float], standing: Standing) -> None:
        self._line_time = now = time.monotonic()
        done = self._kimg(step) - self._kimg(self._start_step)
        rate = done / max(now - self._start_time, 1e-9)  # Evaluations included: it is what remains.
        left = timedelta(seconds=round(max(self.config.total_kimg - self._kimg(step), 0) / rate))
        parts = [
            f"{self._kimg(step):.1f}/{self.config.total_kimg:g} kimg",
            f"{rate * 1000:.0f} img/s",
            f"D {losses['loss_D']:.3f}",
            f"G {losses['loss_G']:.3f}",
        ]
        waited = self._waited_since_line / max(self._seconds_since_line, 1e-9)
        self._seconds_since_line = self._waited_since_line = 0.0
        if waited > WORTH_A_WORD:
            parts.append(f"{waited:.0%} waiting for images")
        if standing.fid is not None:
            extractor = self.config.eval.extractor
            parts.append(f"FID {standing.fid:.2f} (best {standing.best_fid:.2f}, {extractor})")
        self._say("  ".join([*parts, f"{left} left"]))

    def sample_sheet(self, image: Image.Image, step: int) -> None:
        """Save a sample sheet as `samples/KIMG.png` and in TensorBoard."""
        picture = io.BytesIO()
        image.save(picture, "PNG")
        self._local.write_bytes(sheet_file(self._kimg(step)), picture.getbuffer())
        pixels = np.atleast_3d(np.asarray(image))
        self._tensorboard.add_image("samples", pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Make everything written so far safe in storage."""
        self._tensorboard.flush()
        if self._temporary:
            self.run.upload(Path(self._local.path))
            (self._local / "samples").delete()  # Those will not change any more.

    def close(self, step: int, reason: str, standing: Standing) -> None:
        """Say how the run ended, and release files."""
        best = (
            f"; best FID {standing.best_fid:.3f} ({self.config.eval.extractor}) at"
            f" {standing.best_kimg:g} kimg"
            if standing.best_fid is not None
            else ""
        )
        self._say(f"{self.run.name}: {reason} at {self._kimg(step):g} kimg{best}")
        self.leave()

    def leave(self) -> None:
        """Make everything safe, and release files; another journal may go on from here."""
        self.flush()
        self._metrics.close()
        self._signal_rows.close()
        self._tensorboard.close()
        if self._temporary:
            self._temporary.cleanup()
