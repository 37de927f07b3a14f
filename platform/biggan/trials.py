"""What a sweep finds: a live table while it runs; tables, plots and the best configuration after.

A finished sweep's folder holds `points.csv` and `points.parquet` (every FID that any trial
reported, with the trial's values), `trials.csv`, `best.yaml` (a configuration that
`jobs/train.py --config` takes), `fid_by_kimg.png` and `fid_by_parameter.png`.
"""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from ray import tune
from ray.tune.experiment import Trial
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from biggan.config import RunConfig
from biggan.loop import WORST_FID
from biggan.runs import read_metrics
from biggan.storage import Folder

STOPPED_EARLY = "stopped early"
NAMED_IN_PLOT = 8
INSIDE_NOISE = "inside noise"


def difference_within(noise: float) -> float:
    """The difference of two FIDs that their noise explains.

    Each has standard deviation `noise`, so their difference has sqrt(2) times that; 95% of such
    differences lie within twice it.
    """
    return 2 * math.sqrt(2) * noise


def trial_folder(trial_id: str) -> str:
    """The folder, within the sweep's, of the trial with Tune's id `trial_id`."""
    return "trial_" + trial_id.rsplit("_", 1)[-1]


ROWS_SHOWN = 40
"""Trials in the table of a sweep that goes on: those that run, and the best of the others."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found."""

    folder: Folder
    trials: pd.DataFrame
    """A row a trial, best first: its values, lowest FID, whether that is the best, inside the noise
    of the best or worse, kimg spent, and why it stopped."""
    points: pd.DataFrame
    """A row for every FID reported: trial, its values, kimg and FID."""
    best_config: RunConfig | None
    """The configuration of the trial with the lowest FID; None if no trial has one."""
    kimg_spent: float
    """Thousand images trained on, over all trials but those that failed."""
    noise: float | None
    """Standard deviation of the best trial's FID over several draws; None if not measured."""
    kimg_full: float
    """What all trials, but those that failed, would have trained on without early stopping."""

    @property
    def saved(self) -> float:
        """Part of the full grid's training that stopping early saved, from 0 to 1."""
        if not self.kimg_full:
            return 0.0
        # A trial's last step may go beyond its length.
        return max(0.0, 1 - self.kimg_spent / self.kimg_full)

    def __str__(self) -> str:
        saved = (
            f"stopping early saved {self.saved:.0%} of the full grid's training"
            f" ({self.kimg_spent:,.1f} of {self.kimg_full:,.1f} kimg spent)"
        )
        if self.best_config is None:
            return f"no trial has an FID\n{saved}"
        best = self.trials.iloc[0]
        lines = [f"best: {best['trial']} with FID {best['fid']:.3f}", saved]
        if self.noise is not None:
            near = int((self.trials["standing"] == INSIDE_NOISE).sum())
            lines.append(
                f"noise of an FID: {self.noise:.3f} (standard deviation); {near} other trials"
                f" differ from the best by no more than {difference_within(self.noise):.3f}, which"
                " is inside it"
            )
        return "\n".join([*lines, f"all in {self.folder}"])


class LiveTable(tune.Callback):
    """Shows how all trials stand: in place on a terminal or in a notebook, else now and then."""

    SECONDS_IN_PLACE = 1.0
    SECONDS_IN_LOG = 30.0

    def __init__(self, parameters: Sequence[str], config: RunConfig, num_trials: int) -> None:
        self.parameters = list(parameters)
        self.config = config
        self.num_trials = num_trials
        self._live: Live | None = None
        self._shown = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps callbacks with a sweep's state; a terminal cannot be kept."""
        return self.__dict__ | {"_live": None}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:  # noqa: ARG002
        """Refresh the table if it is time."""
        console = Console()
        in_place = console.is_terminal or console.is_jupyter
        now = time.monotonic()
        if now - self._shown < (self.SECONDS_IN_PLACE if in_place else self.SECONDS_IN_LOG):
            return
        self._shown = now
        if not in_place:
            console.print(self._table(trials))
            return
        if self._live is None:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        self._live.update(self._table(trials), refresh=True)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:  # noqa: ARG002
        """Leave the final table standing."""
        if self._live:
            self._live.update(self._table(trials), refresh=True)
            self._live.stop()

    def _table(self, trials: list[Trial]) -> Table:
        done = sum(trial.is_finished() for trial in trials)
        title = f"{done} of {self.num_trials} trials done; FID from {self.config.eval.extractor}"
        rows = []
        for trial in trials:
            last = trial.last_result or {}
            status = {"RUNNING": "running", "PENDING": "waiting", "ERROR": "failed"}.get(
                trial.status, last.get("stop_reason") or STOPPED_EARLY
            )
            values = {name: trial.config.get(name) for name in self.parameters}
            row = {"trial": trial_folder(trial.trial_id), **values, "kimg": last.get("kimg", 0.0)}
            rows.append({**row, "fid": last.get("best_fid", WORST_FID), "status": status})
        if (more := len(rows) - ROWS_SHOWN) > 0:  # Drawing hundreds takes as long as it may last.
            rows = sorted(rows, key=lambda row: (row["status"] != "running", row["fid"]))
            title += f"; {more} of them not shown"
        return render(pd.DataFrame(rows[:ROWS_SHOWN]), title)


def render(frame: pd.DataFrame, title: str) -> Table:
    """A data frame as a table for the console; fields go by the last part of their name."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in frame.columns:
        text = column in ("trial", "status", "standing")
        table.add_column(column.split(".")[-1], justify="left" if text else "right", no_wrap=True)
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        digits = 4 if value >= 1 else 3
        return "-" if value >= WORST_FID else f"{value:.{digits}g}"
    return str(value).removeprefix("trial_")


def summarize(
    folder: Folder,
    config: RunConfig,
    parameters: list[str],
    grid: tune.ResultGrid,
    measure_noise: Callable[[Folder], float | None],
) -> SweepResult:
    """Gather what the trials reported, and write tables, plots and the best configuration.

    `measure_noise` gives the standard deviation of a trial's FID.
    """
    points, trials = [], []
    protocol = _common_protocol(folder)
    for result in (grid[i] for i in range(len(grid))):
        metrics = result.metrics or {}
        name = trial_folder(metrics["trial_id"]) if metrics else "never started"
        values = {key: (result.config or {}).get(key) for key in parameters}
        rows = [row for row in read_metrics(folder / name) if "fid" in row]
        reported = [row for row in rows if row.get("fid_protocol") == protocol]
        points += [
            {"trial": name, **values, "kimg": row["kimg"], "fid": row["fid"]} for row in reported
        ]
        reason = metrics.get("stop_reason") or STOPPED_EARLY
        if others := len(rows) - len(reported):
            reason += f"; {others} FIDs of another protocol left out"
        trials.append(
            {
                "trial": name,
                **values,
                "fid": min((row["fid"] for row in reported), default=WORST_FID),
                "kimg": metrics.get("kimg", 0.0),
                "status": _failure(result.error) if result.error else reason,
            }
        )
    table = pd.DataFrame(trials).sort_values("fid", ignore_index=True)
    failed = table["status"].str.startswith("failed")
    found = len(table) > 0 and table["fid"][0] < WORST_FID
    best = config.override({key: _plain(table[key][0]) for key in parameters}) if found else None
    noise = measure_noise(folder / table["trial"][0]) if found else None
    table.insert(table.columns.get_loc("kimg"), "standing", _standings(table["fid"], noise))
    outcome = SweepResult(
        folder=folder,
        trials=table,
        points=pd.DataFrame(points, columns=["trial", *parameters, "kimg", "fid"]),
        best_config=best,
        noise=noise,
        kimg_spent=float(table["kimg"][~failed].sum()),
        kimg_full=int((~failed).sum()) * config.total_kimg,
    )
    _write(outcome, config, parameters)
    return outcome


def _common_protocol(folder: Folder) -> str | None:
    """Digest of the protocol that most of the trials' FIDs are of."""
    trials = [folder / name for name in folder.children() if name.startswith("trial_")]
    found = Counter(
        row.get("fid_protocol") for trial in trials for row in read_metrics(trial) if "fid" in row
    )
    return found.most_common(1)[0][0] if found else None


def _standings(fids: pd.Series, noise: float | None) -> list[str]:
    """How each trial's FID, ascending, stands to the first."""
    if noise is None:
        return ["best" if rank == 0 else "" for rank in range(len(fids))]
    near = fids - fids[0] <= difference_within(noise)
    return ["best", *np.where(near[1:], INSIDE_NOISE, "worse").tolist()]


def _failure(error: Exception) -> str:
    """What ended a trial, in a line: the last of Ray's traceback."""
    return f"failed: {str(error).strip().splitlines()[-1].strip()}"


def _plain(value: Any) -> Any:
    """A value out of a data frame as Python's own type."""
    return value.item() if hasattr(value, "item") else value


def _write(outcome: SweepResult, config: RunConfig, parameters: list[str]) -> None:
    folder = outcome.folder
    folder.write_bytes("trials.csv", outcome.trials.to_csv(index=False).encode())
    folder.write_bytes("points.csv", outcome.points.to_csv(index=False).encode())
    parquet = io.BytesIO()
    outcome.points.to_parquet(parquet, index=False)
    folder.write_bytes("points.parquet", parquet.getvalue())
    if outcome.best_config:
        text = yaml.safe_dump(outcome.best_config.model_dump(mode="json"), sort_keys=False)
        folder.write_bytes("best.yaml", text.encode())
    label = f"FID ({config.eval.extractor} features)"
    _save(plot_fid_by_kimg(outcome, label), folder, "fid_by_kimg.png")
    _save(plot_fid_by_parameter(outcome, parameters, label), folder, "fid_by_parameter.png")


def plot_fid_by_kimg(outcome: SweepResult, label: str) -> Figure:
    """FID over thousand images, a line a trial; the best trials have names, the others are grey."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    order = [name for name in outcome.trials["trial"] if name in set(outcome.points["trial"])]
    for rank, name in enumerate(order):
        points = outcome.points[outcome.points["trial"] == name]
        named = rank < NAMED_IN_PLOT
        axes.plot(
            points["kimg"],
            points["fid"],
            color=f"C{rank}" if named else "0.8",
            lw=2.5 if rank == 0 else 1.2,
            marker="x",
            markevery=[len(points) - 1],
            label=f"{name}, the best" if rank == 0 else name if named else None,
            zorder=3 if rank == 0 else 2 if named else 1,
        )
    if order:
        axes.legend(title="x: where a trial stopped")
    axes.set(xlabel="thousand real images seen", ylabel=label)
    _log_if_wide(axes, "y", outcome.points["fid"])
    return figure


def plot_fid_by_parameter(outcome: SweepResult, parameters: list[str], label: str) -> Figure:
    """The lowest FID of each trial against each searched parameter."""
    figure = Figure(figsize=(4 * max(1, len(parameters)), 4), layout="constrained")
    for axes, name in zip(
        figure.subplots(1, max(1, len(parameters)), squeeze=False, sharey=True)[0],
        parameters,
        strict=False,
    ):
        scored = outcome.trials[outcome.trials["fid"] < WORST_FID]
        numeric = pd.api.types.is_numeric_dtype(scored[name])
        x = scored[name] if numeric else scored[name].astype(str)
        shade = scored["kimg"]
        dots = axes.scatter(x, scored["fid"], c=shade, cmap="viridis", vmin=0)
        axes.set(xlabel=name)
        if numeric:
            _log_if_wide(axes, "x", scored[name])
        _log_if_wide(axes, "y", scored["fid"])
    figure.axes[0].set_ylabel(f"lowest {label}")
    if len(outcome.trials):
        figure.colorbar(dots, ax=figure.axes, label="thousand images trained")
    return figure


def _log_if_wide(axes: Any, which: str, values: pd.Series) -> None:
    """A logarithmic axis for positive values that span more than a factor of 8."""
    if len(values) and values.min() > 0 and values.max() / values.min() > 8:
        axes.set(**{f"{which}scale": "log"})
        axis = axes.xaxis if which == "x" else axes.yaxis
        few = values.max() / values.min() < 100
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, folder: Folder, name: str) -> None:
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    folder.write_bytes(name, picture.getvalue())
