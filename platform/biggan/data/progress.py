"""How far a preparation is: a bar where there is a terminal or notebook, lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Display

from biggan.data.dataset import Progress

EVERY = 5.0
"""Seconds between two lines."""


class ImageProgress:
    """Images done of those there are, images a second, and how many were rejected.

    Speed counts only what is done from now on, not what an interrupted preparation left.
    """

    def __init__(self, total: int, progress: Progress, *, left: int = 0) -> None:
        """Show progress towards `total` images, `left` of which were done before."""
        self._total, self._done, self._left = total, left, left
        self._rejected = 0
        self._progress = progress
        self._begin = self._told = time.monotonic()
        self._display: Display | None = None
        # Whoever collects lines of progress gets lines.
        if progress is print and _shows_bars():
            self._display = Display(
                TextColumn("prepared {task.completed:,.0f}/{task.total:,.0f} images"),
                BarColumn(),
                TextColumn("{task.fields[speed]:,.0f} images/s,"),
                TextColumn("{task.fields[rejected]:,} rejected,"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                transient=True,
            )
            self._task = self._display.add_task(
                "images", total=total, completed=left, speed=0, rejected=0
            )

    def __enter__(self) -> Self:
        if self._display:
            self._display.start()
        return self

    def advance(self, images: int, rejected: int) -> None:
        """`images` more are done, of which so many were rejected."""
        self._done += images
        self._rejected += rejected
        if self._display:
            self._display.update(
                self._task, completed=self._done, speed=self._speed, rejected=self._rejected
            )
        elif time.monotonic() - self._told > EVERY and self._done < self._total:
            self._told = time.monotonic()
            self._progress(f"{self} {self._rejected:,} rejected, {self._remaining} left")

    @property
    def _speed(self) -> float:
        return (self._done - self._left) / max(time.monotonic() - self._begin, 1e-9)

    @property
    def _remaining(self) -> str:
        seconds = round((self._total - self._done) / max(self._speed, 1e-9))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"

    def __str__(self) -> str:
        return f"prepared {self._done:,}/{self._total:,} images, {self._speed:,.0f} images/s,"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._display:
            self._display.stop()
        if self._done > self._left:
            self._progress(f"{self} {self._rejected:,} rejected")


def _shows_bars() -> bool:
    console = Console(file=sys.stdout)
    return console.is_terminal or console.is_jupyter
