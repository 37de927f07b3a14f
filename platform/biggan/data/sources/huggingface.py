"""Hugging Face `datasets` on disk: what `save_to_disk` writes, and the files of its cache.

Those are Arrow streams, whose record batches are found by reading once through their headers.
Read with pyarrow alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from biggan.data.sources.columns import (
    class_names,
    features,
    image_column,
    label_column,
    number_type,
)
from biggan.data.sources.files import File, damage_told
from biggan.data.sources.folders import describe
from biggan.data.sources.labels import classify
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.rows import RowSource
from biggan.data.sources.source import SourceError
from biggan.data.sources.splits import choose, split_of
from biggan.storage import Folder

MANY = "dataset_dict.json"
"""Names the splits of a DatasetDict, each of which is a folder."""
STATE = "state.json"
INFO = "dataset_info.json"
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""What an Arrow stream ends with."""


class HuggingFaceSource(RowSource):
    """Rows of a `Dataset` or `DatasetDict` on disk."""

    def __init__(self, root: Folder, options: SourceOptions) -> None:
        """Find the record batches and read the labels; raises `SourceError` on damage."""
        self.root, self.window = root, options.window
        files, splits = _files(root)
        named = not root.is_folder()
        chosen, held_out = choose(splits, options.split, f"--source {root}", named=named)
        self.files = [files[i] for i in chosen.tolist()]
        self.split = options.split if any(splits) else None
        schema = _schema(self.files[0])
        where = f"--source {root}"
        self.image = image_column(schema, options.image_column, where)
        self.numbers = number_type(schema.field(self.image).type)
        self.label = label_column(schema, options.label_column, self.image, where)
        noted = features(schema) or _noted(root)
        self._scan(schema)
        starts = np.cumsum([0, *self.lengths])
        self.starts = starts
        rows_of_file = np.bincount(self.file_of, self.lengths, len(self.files)).astype(np.int64)
        self.first_of_file = np.cumsum([0, *rows_of_file])[:-1]
        labelled = classify(
            pa.chunked_array(self._raw, schema.field(self.label).type),
            self._row,
            class_names(noted.get(self.label, {})),
            column=self.label,
        )
        del self._raw
        aside = None if held_out is None else np.repeat(held_out, rows_of_file)
        self._take(labelled, starts, aside)

    def _scan(self, schema: Any) -> None:
        """Note where every record batch lies, and its labels."""
        places: list[tuple[int, int, int, int]] = []
        self._raw: list[Any] = []
        for number, file in enumerate(self.files):
            if _schema(file) != schema:
                raise SourceError(
                    f"--source {file} has other columns than {self.files[0].name}: save them anew"
                )
            for offset, size, batch in _batches(file, schema, self.label):
                places.append((number, offset, size, batch.num_rows))
                labels = batch.column(schema.get_field_index(self.label))
                # A copy, so that the batch it is a part of need not stay in memory.
                self._raw.append(labels.take(pa.array(np.arange(len(labels)))))
        table = np.array(places, dtype=np.int64).reshape(-1, 4)
        self.file_of, self.offsets, self.sizes, self.lengths = table.T

    def _contents(self, batch: int, rows: np.ndarray) -> list[Any]:
        file = self.files[self.file_of[batch]]
        found = _batch(file, int(self.offsets[batch]), int(self.sizes[batch]))
        column = _storage(found[self.image])
        column.validate(full=True)  # Damaged offsets would end the process.
        taken: list[Any] = column.take(pa.array(rows)).to_pylist()
        return taken

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        return describe(
            "huggingface",
            self.root,
            split=self.split,
            image_column=self.image,
            label_column=self.label,
            window=self.window,
        )


def _storage(column: Any) -> Any:
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _files(root: Folder) -> tuple[list[File], list[str]]:
    """The Arrow files of a dataset, and the split of each (empty: it has none)."""
    if not root.is_folder():
        return [File.find(root)], [split_of(root.name)]
    if not root.exists(MANY):
        files = _data_files(root)
        # In the cache, files of all splits lie side by side.
        saved = root.exists(STATE)
        return files, ["" if saved else split_of(file.name) for file in files]
    names = root.read_json(MANY).get("splits", [])
    found: list[File] = []
    splits: list[str] = []
    for name in names:
        files = _data_files(root / name)
        found += files
        splits += [split_of(name) or name] * len(files)
    return found, splits


def _data_files(root: Folder) -> list[File]:
    if not root.exists(STATE):
        names = [name for name in root.children() if name.endswith(".arrow")]
    else:
        state = root.read_json(STATE)
        if state.get("_indices_files"):
            raise SourceError(
                f"--source {root} holds a selection of rows: `flatten_indices()` it, then save it"
            )
        names = [entry["filename"] for entry in state.get("_data_files", [])]
    missing = [name for name in names if not root.exists(name)]
    if missing or not names:
        raise SourceError(
            f"--source {root} is incomplete: {', '.join(missing) or 'no .arrow file'} is missing;"
            " save or copy it again"
        )
    return [File.find(root / name) for name in names]


def _noted(root: Folder) -> dict[str, dict[str, Any]]:
    """The columns as `dataset_info.json` describes them."""
    if not root.exists(INFO):
        return {}
    found = root.read_json(INFO).get("features") or {}
    return {name: what for name, what in found.items() if isinstance(what, dict)}


def _schema(file: File) -> Any:
    with _damage_told(file), file.open() as stream:
        return pa.ipc.open_stream(stream).schema


def _batches(file: File, schema: Any, label: str) -> Iterator[tuple[int, int, Any]]:
    """Offset, size and content of every record batch in a file."""
    with (
        _damage_told(file),
        pa.memory_map(file.folder.path) if file.folder.is_local else file.open() as stream,
    ):
        pa.ipc.read_message(stream)  # The schema.
        while stream.tell() < file.size - len(_END):
            offset = stream.tell()
            message = pa.ipc.read_message(stream)
            if message.type != "record batch":
                raise SourceError(f"--source {file} holds a {message.type}: save it anew")
            batch = pa.ipc.read_record_batch(message, schema)
            batch.column(schema.get_field_index(label)).validate(full=True)
            yield offset, stream.tell() - offset, batch
        if stream.read() != _END:
            raise OSError("its end marker is missing")


def _damage_told(file: File) -> AbstractContextManager[None]:
    return damage_told(f"--source {file} is a truncated or damaged Arrow stream")


@lru_cache(maxsize=8)
def _content(file: File) -> Any:
    """A local file, mapped into memory, and its schema."""
    return pa.memory_map(file.folder.path).read_buffer()


@lru_cache(maxsize=2)
def _batch(file: File, offset: int, size: int) -> Any:
    if file.folder.is_local:
        content = _content(file).slice(offset, size)
    else:
        content = pa.py_buffer(file.read(offset, size))
    message = pa.ipc.read_message(pa.BufferReader(content))
    return pa.ipc.read_record_batch(message, _cached_schema(file))


_cached_schema = lru_cache(maxsize=32)(_schema)


def is_huggingface(names: Sequence[str]) -> bool:
    """Whether a folder's children are those of a dataset on disk."""
    arrow = any(name.endswith(".arrow") for name in names)
    return MANY in names or (STATE in names and INFO in names) or arrow
