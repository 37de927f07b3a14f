"""A CSV or Parquet table of paths and labels: a source itself, or beside a folder of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from biggan.data.dataset import Rejected
from biggan.data.sources.columns import LABEL_NAMES, class_names, features
from biggan.data.sources.files import File
from biggan.data.sources.folders import FileSource, describe
from biggan.data.sources.label_table import path_and_label, read_table, splits_of_rows
from biggan.data.sources.labels import check_folders, classify, listed
from biggan.data.sources.lookup import Beside, Within, may_be_image, whole
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.source import Finding, SourceError, natural
from biggan.data.sources.splits import choose
from biggan.storage import Folder


@dataclass
class _Found:
    """Rows whose file is there."""

    rows: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    missing: list[tuple[int, str]] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    """Images in the folder that no row names."""


class TableSource(FileSource):
    """Images that a table names and labels.

    Without `folder`, paths count from the table's own folder, or are absolute, or URIs. With it,
    they are looked for in there: by path, with or without its suffix, or by name alone.
    """

    def __init__(
        self,
        file: File,
        options: SourceOptions,
        folder: Folder | None = None,
        kind: str = "table",
    ) -> None:
        """Read the table and look for the files; raises `SourceError` if there is none of them."""
        super().__init__(folder or file.folder.parent, [], options.window)
        self.kind, self.file, self.folder = kind, file, folder
        table = read_table(file)
        self.path_column, self.label_column = path_and_label(file, table, options)
        column = table.columns[self.label_column]
        labelled = classify(
            column,
            self._row,
            class_names(features(table.columns.schema).get(self.label_column, {})),
            column=self.label_column,
            text=table.text or pa.types.is_string(column.type),
        )
        splits = splits_of_rows(table.columns)
        rows, aside = self._choose(labelled.rows, splits, options)
        self.split = options.split if splits is not None else None
        words = table.columns[self.path_column].cast(pa.string()).to_pylist()
        found = self._find(rows.tolist(), words)
        label_of = dict(zip(labelled.rows.tolist(), labelled.labels.tolist(), strict=True))
        self._keep(found, label_of, labelled.classes, aside)
        self.findings = [*labelled.findings, *self.findings]
        absent = [(self._row(row), reason) for row, reason in found.missing]
        self.rejected = [
            *table.rejected,
            *labelled.rejected,
            *listed(absent, len(absent)),
            *self._unlisted(found.unlisted),
        ]
        self.unreadable = len(table.rejected) + labelled.unreadable + len(absent)
        # Whether it was meant to label the folder that it was found in.
        known = self.label_column.lower() in LABEL_NAMES
        self.telling = known and len(found.rows) >= len(found.unlisted)

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        return describe(
            self.kind,
            self.folder or self.file,
            labels=str(self.file) if self.folder else "",
            split=self.split,
            image_column=self.path_column,
            label_column=self.label_column,
            window=self.window,
        )

    def _row(self, row: int) -> str:
        return f"{self.file.name} row {row + 1}"

    @staticmethod
    def _choose(
        rows: np.ndarray, splits: Sequence[str] | None, options: SourceOptions
    ) -> tuple[np.ndarray, set[int]]:
        """Rows of the split that is wanted, and which of them are held out."""
        of = [""] * len(rows) if splits is None else [splits[row] for row in rows.tolist()]
        chosen, held_out = choose(of, options.split, "the table")
        kept = rows[chosen]
        return kept, set() if held_out is None else set(kept[held_out].tolist())

    def _find(self, rows: list[int], words: list[str | None]) -> _Found:
        """The files of rows; `words` are the paths in all rows."""
        files: Within | Beside = Within(self.root) if self.folder else Beside(self.root, words)
        paths = [files.find(word.strip()) if word and word.strip() else None for word in words]
        found = _Found()
        for row in rows:
            path = paths[row]
            if path is None:
                found.missing.append((row, f"no file {words[row]!r}, or several"))
            else:
                found.rows.append(row)
                found.paths.append(path)
        if not found.rows:
            raise SourceError(
                f"--source {self.file}: none of its {len(rows):,} rows names a file that is there;"
                f" the first: {words[rows[0]]!r}, looked for in {self.root}. Paths count from the"
                " table's folder; give the images' folder as --source and the table as --labels if"
                " they lie elsewhere"
            )
        named = {whole(self.root, path) for path in paths if path}
        found.unlisted = [
            path
            for path in files.files
            if may_be_image(path) and whole(self.root, path) not in named
        ]
        return found

    def _keep(
        self, found: _Found, label_of: Mapping[int, int], classes: list[str], aside: set[int]
    ) -> None:
        """Each file once, with the first of its labels."""
        first: dict[str, int] = {}
        clashes: list[tuple[str, int, int]] = []
        for row, path in zip(found.rows, found.paths, strict=True):
            before = first.setdefault(path, row)
            if label_of[before] != label_of[row]:
                clashes.append((path, before, row))
        labels = np.array([label_of[row] for row in first.values()], dtype=np.int32)
        used = np.unique(labels)
        self.classes = [classes[i] for i in used]
        self.labels = np.searchsorted(used, labels).astype(np.int32)
        self.paths = pa.array(first, pa.string())
        if aside:
            self.held_out = np.array([row in aside for row in first.values()])
        self.findings = []
        if clashes:
            path, one, other = clashes[0]
            names = classes[label_of[one]], classes[label_of[other]]
            self.findings.append(
                Finding(
                    "labels",
                    f"{len(clashes):,} rows give a file another label than a row before, e.g."
                    f" {path}: {names[0]!r} in row {one + 1}, {names[1]!r} in row {other + 1};"
                    " correct the table, or --allow labels to take the first",
                )
            )
        rows = list(first.values())
        self.findings += check_folders(list(first), self.labels, self.classes, rows)

    def _unlisted(self, files: Sequence[str]) -> list[Rejected]:
        if not files:
            return []
        first = min(files, key=natural)
        shown = first if len(files) == 1 else f"{len(files):,} files, such as {first}"
        return [Rejected(path=shown, reason=f"not in the table {self.file.name}")]
