"""Parquet files with an image column, prepared datasets of our own among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from biggan.data.dataset import DESCRIPTION, DatasetInfo
from biggan.data.sources.columns import (
    class_names,
    features,
    image_column,
    label_column,
    number_type,
)
from biggan.data.sources.files import File, cached, damage_told, is_named, splits_of
from biggan.data.sources.folders import describe
from biggan.data.sources.labels import classify
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.rows import RowSource
from biggan.data.sources.source import SourceError
from biggan.data.sources.splits import choose
from biggan.storage import Folder

LARGE_GROUP = 64 * 2**20
"""Bytes from which on a row group (pandas writes a single one) is unpacked into the cache."""
_CACHED_ROWS = 64


def open_footer(file: File) -> Any:
    """What a Parquet file says of itself; raises `SourceError` if it is damaged or truncated."""
    with (
        damage_told(f"--source {file} is a truncated or damaged Parquet file"),
        file.open() as opened,
    ):
        return pq.read_metadata(opened)


class ParquetSource(RowSource):
    """Rows of Parquet files: a column of images (encoded, or arrays) and one of labels."""

    kind = "parquet"

    def __init__(
        self,
        files: Sequence[File],
        place: Folder | str,
        options: SourceOptions,
        splits: Sequence[str] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        """Read the footers and labels; raises `SourceError` if those are damaged.

        `splits` are the files' (by default, what their names say), `names` the classes'.
        """
        splits = splits or splits_of(files, place)
        named = is_named(place)
        chosen, held_out = choose(splits, options.split, f"--source {place}", named=named)
        self.files = [files[i] for i in chosen.tolist()]
        self.root, self.place, self.window = files[0].folder.parent, place, options.window
        self.split = options.split if any(splits) else None
        footers = [open_footer(file) for file in self.files]
        schema = footers[0].schema.to_arrow_schema()
        where = f"--source {place}"
        self.image = image_column(schema, options.image_column, where)
        self.numbers = number_type(schema.field(self.image).type)
        self.label = label_column(schema, options.label_column, self.image, where)
        names = names or class_names(features(schema).get(self.label, {}))
        self._place_groups(footers)
        raw = [self._labels(file, schema) for file in self.files]
        rows_of_file = [footer.num_rows for footer in footers]
        aside = None if held_out is None else np.repeat(held_out, rows_of_file)
        starts = np.cumsum([0, *self.lengths])
        self.starts = starts
        labelled = classify(pa.chunked_array(raw), self._row, names, column=self.label)
        self._take(labelled, starts, aside)

    def _place_groups(self, footers: Sequence[Any]) -> None:
        groups = [(i, g) for i, footer in enumerate(footers) for g in range(footer.num_row_groups)]
        self.file_of = np.array([i for i, _ in groups], dtype=np.int32)
        self.group_of = np.array([g for _, g in groups], dtype=np.int32)
        self.lengths = [footers[i].row_group(g).num_rows for i, g in groups]
        first = np.cumsum([0, *(footer.num_rows for footer in footers)])
        self.first_of_file = first[:-1]

    def _labels(self, file: File, schema: Any) -> Any:
        what = f"--source {file}: column {self.label!r} cannot be read"
        mend = f"is it damaged, or has it other columns than the first, {self.files[0].name}?"
        with damage_told(what, mend), file.open() as opened:
            column = pq.read_table(opened, columns=[self.label])[self.label].combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_dictionary(schema.field(self.label).type):
            return column
        return column.cast(schema.field(self.label).type)

    def _contents(self, batch: int, rows: np.ndarray) -> list[Any]:
        file, group = self.files[self.file_of[batch]], int(self.group_of[batch])
        column = _group(file, group, self.image)
        taken: list[Any] = column.take(pa.array(rows, pa.int64())).to_pylist()
        return taken

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        return describe(
            self.kind,
            self.place,
            split=self.split,
            image_column=self.image,
            label_column=self.label,
            window=self.window,
        )


@lru_cache(maxsize=2)
def _group(file: File, group: int, column: str) -> Any:
    """The column of a row group, in memory, or mapped into it if it is large."""
    with file.open() as opened:
        parquet = pq.ParquetFile(opened)
        if _bytes_of(parquet.metadata.row_group(group), column) <= LARGE_GROUP:
            return parquet.read_row_group(group, columns=[column])[column]
    spread = cached(file, f"row group {group} {column}", _spread(file, group, column))
    return pa.ipc.open_file(pa.memory_map(spread.folder.path)).read_all()[column]


def _bytes_of(group: Any, column: str) -> int:
    chunks = [group.column(i) for i in range(group.num_columns)]
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.split(".")[0] == column
    )


def _spread(file: File, group: int, column: str) -> Callable[[IO[bytes]], None]:
    def write(target: IO[bytes]) -> None:
        with file.open() as opened:
            parquet = pq.ParquetFile(opened)
            batches = parquet.iter_batches(_CACHED_ROWS, row_groups=[group], columns=[column])
            first = next(batches)
            with pa.ipc.new_file(target, first.schema) as writer:
                writer.write_batch(first)
                for batch in batches:
                    writer.write_batch(batch)

    return write


class PreparedSource(ParquetSource):
    """A dataset of our own as a source, for other sizes or some of its classes."""

    kind = "prepared"

    def __init__(self, root: Folder, options: SourceOptions) -> None:
        """Open a prepared dataset; raises `SourceError` if images that it promises are missing."""
        info = DatasetInfo.read(root)
        names = [f for f in root.children() if f.endswith(".parquet")]
        kept = [f for f in names if f.startswith(("part-", "held_out-"))]
        files = [File.find(root / name) for name in kept]
        splits = ["test" if name.startswith("held_out-") else "train" for name in kept]
        if not files:
            raise SourceError(f"--source {root} has a {DESCRIPTION}, but no images: copy it again")
        self._check(root, info, files, splits)
        if set(splits) == {"train"} and options.split in ("train", "all"):
            splits = [""] * len(splits)
        super().__init__(files, root, options, splits, info.classes)

    @staticmethod
    def _check(root: Folder, info: DatasetInfo, files: list[File], splits: list[str]) -> None:
        promised = {"train": info.n_images, "test": sum(info.held_out)}
        for split, count in promised.items():
            of = [file for file, name in zip(files, splits, strict=True) if name == split]
            found = sum(open_footer(file).num_rows for file in of)
            if found != count:
                raise SourceError(
                    f"--source {root} is damaged: {DESCRIPTION} promises {count:,} images"
                    f" ({split}), its parts hold {found:,}; copy or prepare it again"
                )
