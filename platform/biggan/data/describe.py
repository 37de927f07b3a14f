"""What is in a prepared dataset, for people: on the console, and as a page beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from biggan.data.dataset import DatasetInfo
from biggan.data.parts import decode, part_files
from biggan.metrics.extractors import CLASSIFIER_FILE, Classifier
from biggan.storage import Folder, locate

PAGE = "describe.html"
CLASSES_SHOWN = 20
EXAMPLES = 8
"""Of each class shown."""
BARS = 40
"""Rows of the bar chart; of more classes, the largest and the smallest."""
WIDTH = 100
"""Columns where the output is no terminal."""


@dataclass(frozen=True)
class Examples:
    """Some images of one class."""

    class_id: int
    images: list[np.ndarray]
    """uint8 `[H, W, C]` each."""
    refs: list[str]
    """Where each of them came from."""


@dataclass(frozen=True)
class Description:
    """A dataset's own description, and what can be seen from its files."""

    name: str
    info: DatasetInfo
    folder: Folder
    stored_bytes: int
    accuracy: float | None
    """Of the built-in classifier, on images it did not learn from; None: there is no such file."""
    examples: list[Examples]

    @classmethod
    def of(cls, folder: Folder) -> Description:
        """Read what is needed; raises `StorageError` if there is no dataset."""
        info = DatasetInfo.read(folder)
        files = [*part_files(folder), *part_files(folder, "held_out")]
        return cls(
            name=folder.name,
            info=info,
            folder=folder,
            stored_bytes=sum(folder.size(file) for file in files),
            accuracy=_classifier_accuracy(folder),
            examples=list(find_examples(folder, info)),
        )

    def facts(self) -> list[tuple[str, str]]:
        """The dataset in a few lines, as name and value."""
        info = self.info
        held_out = f"{sum(info.held_out):,}" if info.held_out else "none"
        rejected = max(sum(info.reasons.values()), len(info.rejected))
        facts = [
            ("images to train on", f"{info.n_images:,}"),
            ("held out", held_out),
            ("classes", f"{len(info.classes):,}"),
            ("size", f"{info.resolution} x {info.resolution} pixels, {_colours(info.channels)}"),
            *((f"{side} as it came", spread) for side, spread in self.sizes()),
            ("exact copies", _copies(info)),
            ("rejected", f"{rejected:,}" if rejected else "none"),
            ("stored", f"{_bytes(self.stored_bytes)} at {self.folder}"),
            ("classifier for FID", _accuracy(self.accuracy)),
            ("source", ", ".join(f"{key} {_plain(value)}" for key, value in info.source.items())),
            ("fingerprint", info.fingerprint),
        ]
        if info.held_out_fingerprint:
            facts.append(("fingerprint, held out", info.held_out_fingerprint))
        return facts

    def sizes(self) -> list[tuple[str, str]]:
        """Width and height of the images as they came, in words."""
        return [
            (side, f"{low:,} to {high:,} pixels, median {median:,}")
            for side, (low, median, high) in self.info.sizes.items()
        ]

    def reasons(self) -> list[tuple[str, int]]:
        """Why files were rejected, and how many of them, most first."""
        info = self.info
        reasons = dict(info.reasons)
        for entry in info.rejected if not reasons else []:  # As datasets once were.
            reasons[entry.reason] = reasons.get(entry.reason, 0) + 1
        return sorted(reasons.items(), key=lambda item: -item[1])

    def warnings(self) -> list[str]:
        """What whoever trains on it should know."""
        info = self.info
        warnings = []
        low, high = min(info.counts), max(info.counts)
        if len(info.classes) == 1:
            warnings.append("all images are of one class: there is nothing to choose by class")
        if high >= 10 * low:
            warnings.append(
                f"classes are uneven: the largest has {high / low:,.0f} times the images of the"
                f" smallest ({high:,} and {low:,}), and is generated that much more often"
            )
        if info.duplicates_conflicting:
            warnings.append(
                f"{info.duplicates_conflicting:,} exact copies came with another label than the"
                " image they equal"
            )
        if info.n_images <= Classifier.FEATURES:
            warnings.append(
                f"{info.n_images:,} images are too few for FID: the covariance of"
                f" {Classifier.FEATURES} features is singular"
            )
        return warnings


def describe(name: str, root: str | None = None, console: Console | None = None) -> Description:
    """Print what is in dataset `name`, and write it as `describe.html` into its folder.

    Raises `StorageError` if there is no such dataset.
    """
    from biggan.data.page import as_page

    description = Description.of(locate("datasets", name, root))
    console = console or Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(as_text(description, ascii_only=console.options.ascii_only))
    description.folder.write_bytes(PAGE, as_page(description).encode())
    console.print(f"page: {description.folder}/{PAGE}", soft_wrap=True, highlight=False)
    return description


def as_text(description: Description, *, ascii_only: bool = False) -> Group:
    """The description for a console."""
    facts = Table(title=Text(f"dataset {description.name}"), show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for key, value in description.facts():
        facts.add_row(Text(key), Text(value))
    blocks: list[Any] = [facts]
    blocks += [Text(f"warning: {line}") for line in description.warnings()]
    blocks.append(_bar_table(description.info, "#" if ascii_only else "█"))
    examples = Table(title="examples", show_edge=False)
    examples.add_column("class", max_width=24)
    examples.add_column("from", overflow="fold")
    for some in description.examples:
        name = description.info.classes[some.class_id]
        examples.add_row(Text(name), Text(", ".join(some.refs[:4])))
    blocks.append(examples)
    if description.info.rejected:
        blocks += _rejects(description)
    return Group(*blocks)


def _bar_table(info: DatasetInfo, block: str) -> Table:
    title = "images by class"
    held_out = any(info.held_out)
    rows, between = chart_rows(info)
    table = Table(title=title, show_edge=False)
    table.add_column("class", max_width=24, no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("train", justify="right")
    if held_out:
        table.add_column("held out", justify="right")
    most = max(info.counts)
    for i, class_id in enumerate(rows):
        if between and i == BARS // 2:
            table.add_row(Text(f"{between:,} classes between"))
        count = info.counts[class_id]
        bar = block * max(1, round(BARS * count / most))
        cells = [Text(info.classes[class_id]), Text(bar), Text(f"{count:,}")]
        table.add_row(*cells, *([Text(f"{info.held_out[class_id]:,}")] if held_out else []))
    return table


def chart_rows(info: DatasetInfo) -> tuple[list[int], int]:
    """Class ids for a chart, and how many are left out in its middle.

    A few classes stand in their own order; many by size, the largest and the smallest.
    """
    n = len(info.classes)
    if n <= BARS:
        return list(range(n)), 0
    by_size = np.argsort(-np.array(info.counts), kind="stable").tolist()
    return [*by_size[: BARS // 2], *by_size[-BARS // 2 :]], n - BARS


def _rejects(description: Description) -> Iterator[Table]:
    reasons = Table(title="rejected, by reason", show_edge=False)
    reasons.add_column("files", justify="right")
    reasons.add_column("reason", overflow="fold")
    for reason, count in description.reasons()[:BARS]:
        reasons.add_row(f"{count:,}", Text(reason))
    if description.reasons():
        yield reasons
    rejected = Table(title="some that were left out", show_edge=False)
    rejected.add_column("path", overflow="fold")
    rejected.add_column("reason", overflow="fold")
    for entry in description.info.rejected[:EXAMPLES]:
        rejected.add_row(Text(entry.path), Text(entry.reason))
    yield rejected


def find_examples(folder: Folder, info: DatasetInfo) -> Iterator[Examples]:
    """The first images of each class, of up to `CLASSES_SHOWN` classes from all over the list."""
    n = len(info.classes)
    shown = np.unique(np.linspace(0, n - 1, min(n, CLASSES_SHOWN)).astype(int)).tolist()
    wanted = {i: min(EXAMPLES, info.counts[i]) for i in shown}
    found: dict[int, list[tuple[bytes, str]]] = {i: [] for i in shown}
    for part in part_files(folder):  # Each is a sample of the whole: mostly the first will do.
        if all(len(found[i]) == wanted[i] for i in shown):
            break
        path = f"{folder.path}/{part}"
        labels = pq.read_table(path, columns=["label"], filesystem=folder.filesystem)
        rows: list[int] = []
        for i in shown:
            of_class = np.flatnonzero(labels["label"].to_numpy() == i)
            rows += of_class[: wanted[i] - len(found[i])].tolist()
        if rows:
            table = pq.read_table(path, filesystem=folder.filesystem).take(pa.array(rows))
            for row in table.to_pylist():
                found[row["label"]].append((row["image"], row["source"]))
    for i in shown:
        yield Examples(i, [decode(image) for image, _ in found[i]], [ref for _, ref in found[i]])


def _classifier_accuracy(folder: Folder) -> float | None:
    try:
        content = folder.read_bytes(CLASSIFIER_FILE)
    except FileNotFoundError:
        return None
    length = int.from_bytes(content[:8], "little")  # How safetensors begin.
    return float(json.loads(content[8 : 8 + length])["__metadata__"]["held_out_accuracy"])


def _colours(channels: int) -> str:
    return {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")


def _copies(info: DatasetInfo) -> str:
    if not info.duplicates:
        return "none"
    text = f"{info.duplicates:,} beyond the first of each"
    if info.duplicates_conflicting:
        text += f", {info.duplicates_conflicting:,} of them under another label"
    return text + (", dropped" if info.duplicates_dropped else ", kept")


def _accuracy(accuracy: float | None) -> str:
    if accuracy is None:
        return "missing"
    return f"{accuracy:.1%} of the images that it did not learn from right"


def _bytes(n: int) -> str:
    size, units = float(n), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:,.0f} {units[0]}" if units[0] == "bytes" else f"{size:,.1f} {units[0]}"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
