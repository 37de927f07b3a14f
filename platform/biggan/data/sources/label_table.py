"""Tables of text or Parquet, and which of their columns are the paths and the labels."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from biggan.data.dataset import Rejected
from biggan.data.sources.columns import LABEL_NAMES, PATH_NAMES, present
from biggan.data.sources.decoding import is_image_name
from biggan.data.sources.files import File, damage_told, decompressed
from biggan.data.sources.labels import listed
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.source import SourceError
from biggan.data.sources.splits import split_named

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
"""How names of text tables end."""
_SPLIT_NAMES = ("split", "subset", "set", "partition")
_MOSTLY = 0.5
"""Part of a column's first words that are names of images, from which on it holds paths."""


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


def path_and_label(file: File, table: Table, options: SourceOptions) -> tuple[str, str]:
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


def splits_of_rows(columns: Any) -> list[str] | None:
    """The split of each row, if a column says it."""
    for name in columns.column_names:
        if name.lower() in _SPLIT_NAMES:
            words = columns[name].cast(pa.string()).to_pylist()
            splits = [split_named((word or "").strip()) for word in words]
            if all(splits):
                return splits
    return None
