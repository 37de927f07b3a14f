"""A CSV or Parquet table of paths and labels: a source itself, or beside a folder of images."""

from __future__ import annotations

import csv
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow import fs

from biggan.data.dataset import Rejected
from biggan.data.sources.columns import (
    LABEL_NAMES,
    PATH_NAMES,
    class_names,
    features,
    present,
)
from biggan.data.sources.decoding import is_image_name
from biggan.data.sources.files import File, damage_told, decompressed
from biggan.data.sources.folders import FileSource, describe, list_folder, placed
from biggan.data.sources.labels import classify, listed
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.source import Finding, SourceError
from biggan.data.sources.splits import choose, split_named
from biggan.storage import Folder

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
"""How names of text tables end."""
_SPLIT_NAMES = ("split", "subset", "set", "partition")
_MOSTLY = 0.5
_TELLING = 0.9
"""Part of a folder's images with one label from which on the folder stands for that label."""


@dataclass(frozen=True)
class Table:
    """The rows of a table that could be read."""

    columns: Any
    """A table of pyarrow's."""
    text: bool
    """Whether its values are words that may be numbers."""
    rejected: list[Rejected]


def read_table(file: File) -> Table:
    """A CSV, TSV or Parquet table; raises `SourceError` if it is damaged."""
    with damage_told(f"--source {file} is no table of UTF-8 text or Parquet", "save it anew"):
        if file.size >= 4 and file.read(0, 4) == b"PAR1":
            with file.open() as opened:
                return Table(pq.read_table(opened), text=False, rejected=[])
        return _read_text(file)


def _read_text(file: File) -> Table:
    with decompressed(file) as stream:
        content = stream.read()
    line = next(iter(content.decode("utf-8-sig").splitlines()), "")
    delimiter = max(",\t;", key=line.count)
    cells = next(csv.reader([line], delimiter=delimiter), [])
    headed = not any(is_image_name(cell) for cell in cells)
    names = [cell.strip() or f"column {i}" for i, cell in enumerate(cells)]
    if not headed:
        names = ["path", "label", *(f"column {i}" for i in range(2, len(cells)))][: len(cells)]
    if not names or len(set(names)) < len(names):
        raise SourceError(f"--source {file}: columns {', '.join(names)} must each have a name")
    bad: list[Any] = []

    def skip(row: Any) -> str:
        bad.append(row)
        return "skip"

    columns = pyarrow.csv.read_csv(
        BytesIO(content),
        pyarrow.csv.ReadOptions(use_threads=False, column_names=names, skip_rows=int(headed)),
        pyarrow.csv.ParseOptions(
            delimiter=delimiter, invalid_row_handler=skip, newlines_in_values=True
        ),
        pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in names}),
    )
    reason = f"the header has {len(names)} columns"
    refs = [(f"{file.name} line {row.number}", f"{row.actual_columns} columns") for row in bad]
    return Table(columns, True, listed([(r, f"{n}; {reason}") for r, n in refs], len(refs)))


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
        self.path_column, self.label_column = _columns(file, table, options)
        column = table.columns[self.label_column]
        labelled = classify(
            column,
            self._row,
            class_names(features(table.columns.schema).get(self.label_column, {})),
            column=self.label_column,
            text=table.text or pa.types.is_string(column.type),
        )
        splits = _splits(table.columns)
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
        resolve = _Within(self.root) if self.folder else _Beside(self.root, words)
        paths = [resolve(word.strip()) if word and word.strip() else None for word in words]
        found = _Found()
        for row in rows:
            path = paths[row]
            if path is None:
                found.missing.append((row, f"there is no file {words[row]!r}"))
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
        named = {_whole(self.root, path) for path in paths if path}
        found.unlisted = [
            path
            for path in resolve.files
            if _may_be_image(path) and _whole(self.root, path) not in named
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
        shown = files[0] if len(files) == 1 else f"{len(files):,} files, such as {files[0]}"
        return [Rejected(path=shown, reason=f"not in the table {self.file.name}")]


def _columns(file: File, table: Table, options: SourceOptions) -> tuple[str, str]:
    """The columns of paths and labels."""
    names = table.columns.column_names
    where = f"--source {file}"
    if options.image_column:
        path = present(names, options.image_column, "image", where)
    else:
        path = _path_column(table.columns, where)
    if options.label_column:
        return path, present(names, options.label_column, "label", where)
    others = [name for name in names if name != path and name.lower() not in _SPLIT_NAMES]
    known = {name.lower(): name for name in reversed(others)}
    for name in LABEL_NAMES:
        if name in known:
            return path, known[name]
    if len(others) == 1:
        return path, others[0]
    raise SourceError(
        f"{where}: which column is the label? Give --label-column one of {', '.join(names)}"
    )


def _path_column(columns: Any, where: str) -> str:
    words: list[str] = [
        field.name
        for field in columns.schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]
    for name in words:
        some = [word for word in columns[name].slice(0, 20).to_pylist() if word]
        if some and sum(map(is_image_name, some)) > _MOSTLY * len(some):
            return name
    known: dict[str, str] = {name.lower(): name for name in reversed(columns.column_names)}
    for name in PATH_NAMES:
        if name in known:
            return known[name]
    raise SourceError(
        f"{where}: which column is the path of the image? Give --image-column one of"
        f" {', '.join(columns.column_names)}"
    )


def _splits(columns: Any) -> list[str] | None:
    """The split of each row, if a column says it."""
    for name in columns.column_names:
        if name.lower() in _SPLIT_NAMES:
            words = columns[name].cast(pa.string()).to_pylist()
            splits = [split_named((word or "").strip()) for word in words]
            if all(splits):
                return splits
    return None


class _Within:
    """Files of a folder, by path, by path without suffix, by name, or by name without suffix."""

    def __init__(self, root: Folder) -> None:
        self.files = list_folder(root).files
        self.ways = [_index(self.files, way) for way in (str, _stem, _name, _name_stem)]

    def __call__(self, word: str) -> str | None:
        word = posixpath.normpath(word.replace("\\", "/")).removeprefix("/")
        tries = (word, word, _name(word), _name(word))
        for index, key in zip(self.ways, tries, strict=True):
            if key in index:
                return index[key]
        return None


def _may_be_image(path: str) -> bool:
    return is_image_name(path) or "." not in posixpath.basename(path)


def _stem(path: str) -> str:
    return str(posixpath.splitext(path)[0])


def _name(path: str) -> str:
    return str(posixpath.basename(path))


def _name_stem(path: str) -> str:
    return _stem(_name(path))


def _index(files: Sequence[str], way: Any) -> dict[str, str]:
    """Files by a key; those that share theirs with another are left out."""
    keys = Counter(map(way, files))
    return {way(file): file for file in files if keys[way(file)] == 1}


class _Beside:
    """Files by their paths from a table's folder, absolute paths, and URIs."""

    def __init__(self, root: Folder, words: Sequence[str | None]) -> None:
        self.root = root
        relative = {_plain(word) for word in words if word and not _is_absolute(word)}
        tops = {path.partition("/")[0] for path in relative if "/" in path}
        direct = any("/" not in path for path in relative)
        self.files = list(_listed(root, tops, direct))
        self.there = set(self.files)
        self.there |= _existing([w for w in words if w and _is_absolute(_placed_at(root, w))], root)

    def __call__(self, word: str) -> str | None:
        word = _placed_at(self.root, word)
        path = word if _is_absolute(word) else _plain(word)
        return path if path in self.there else None


def _whole(root: Folder, path: str) -> str:
    """A path on its filesystem."""
    folder, name = placed(root, path)
    return f"{folder.path.rstrip('/')}/{name}"


def _plain(word: str) -> str:
    return posixpath.normpath(word.strip().replace("\\", "/"))


def _is_absolute(word: str) -> bool:
    return "://" in word or word.startswith("/")


def _placed_at(root: Folder, word: str) -> str:
    """A path that leads out of the root, made absolute; another as it is."""
    word = word.strip()
    if _is_absolute(word) or not _plain(word).startswith("../"):
        return word
    base, _, path = root.uri.rpartition("://")
    joined = posixpath.normpath(f"{path}/{_plain(word)}")
    return f"{base}://{joined}" if base else joined


def _listed(root: Folder, tops: set[str], direct: bool) -> Iterator[str]:
    children = set(root.children())
    for top in sorted(tops & children):
        for path in list_folder(root / top).files:
            yield f"{top}/{path}"
    if direct:
        infos = root.filesystem.get_file_info(fs.FileSelector(root.path))
        yield from (info.base_name for info in infos if info.type == fs.FileType.File)


def _existing(words: Sequence[str], root: Folder) -> set[str]:
    """Those absolute paths and URIs that are files; looked up a folder at a time."""
    by_folder: dict[Folder, list[tuple[str, str]]] = defaultdict(list)
    for word in words:
        path = _placed_at(root, word)
        folder, _ = placed(root, path)
        by_folder[folder].append((path, _whole(root, path)))
    there = set()
    for folder, paths in by_folder.items():
        infos = folder.filesystem.get_file_info([path for _, path in paths])
        for (path, _), info in zip(paths, infos, strict=True):
            if info.type == fs.FileType.File:
                there.add(path)
    return there


def check_folders(
    paths: Sequence[str], labels: np.ndarray, classes: Sequence[str], rows: Sequence[int]
) -> list[Finding]:
    """Whether images lie in folders of classes that are not theirs.

    Folders stand for classes if most have a class's name; or if there are as many as classes, and
    nearly all images of each have the same label, another one for each folder.
    """
    folders = [path.split("/")[-2] if "/" in path else "" for path in paths]
    meant = _meaning(folders, labels, classes)
    wrong = [
        i
        for i, (folder, label) in enumerate(zip(folders, labels.tolist(), strict=True))
        if meant.get(folder, label) != label
    ]
    if not wrong:
        return []
    i = wrong[0]
    folder, label = folders[i], classes[labels[i]]
    usual = "" if folder == classes[meant[folder]] else f" (others: {classes[meant[folder]]!r})"
    return [
        Finding(
            "labels",
            f"{len(wrong):,} of {len(paths):,} labels do not match the folder of their image, e.g."
            f" row {rows[i] + 1}: label {label!r}, folder {folder!r}{usual}; correct the table, or"
            " --allow labels to trust it",
        )
    ]


def _meaning(folders: Sequence[str], labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """The class that each folder stands for; empty if folders are no classes."""
    ids = {name.casefold(): i for i, name in enumerate(classes)}
    named = sum(folder.casefold() in ids for folder in folders)
    distinct = set(folders)
    if named > _MOSTLY * len(folders):
        return {f: ids[f.casefold()] for f in distinct if f.casefold() in ids}
    if len(distinct) != len(classes) or len(classes) < 2:
        return {}
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for folder, label in zip(folders, labels.tolist(), strict=True):
        counts[folder][label] += 1
    meant = {folder: count.most_common(1)[0][0] for folder, count in counts.items()}
    agreeing = sum(counts[folder][label] for folder, label in meant.items())
    bijective = len(set(meant.values())) == len(classes)
    return meant if bijective and agreeing >= _TELLING * len(folders) else {}
