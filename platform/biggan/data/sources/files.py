"""Files that a source reads: at any place in them, wherever they lie.

What cannot be read from the middle (compressed as one stream, or wanted by a library that reads
local files alone) is unpacked once per machine into its cache folder (`storage.cache_folder`),
which all its processes share; what nothing has used for a week is deleted.
"""

from __future__ import annotations

import bz2
import csv
import fcntl
import gzip
import hashlib
import io
import lzma
import os
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
from pyarrow import fs

from biggan.data.sources.source import SourceError
from biggan.data.sources.splits import split_of
from biggan.storage import Folder, cache_folder

DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,
    NotImplementedError,
    csv.Error,
    lzma.LZMAError,
    pa.ArrowException,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What libraries raise where a file is damaged, or ends too early."""
_COPY = 1 << 20
_WEEK = 7 * 24 * 3600
_STREAMS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""What files begin with that are compressed as one stream."""


@contextmanager
def damage_told(what: str, mend: str = "copy it again") -> Iterator[None]:
    """Make a `SourceError` of damage that the body meets: `what (the cause): mend`."""
    try:
        yield
    except SourceError:
        raise
    except DAMAGE as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{what} ({cause}): {mend}") from None


@dataclass(frozen=True)
class File:
    """A file, and what it was when its source was opened."""

    folder: Folder
    """The file's own path or URI."""
    size: int
    changed: int
    """When, in nanoseconds; caches tell a new version by it."""

    @classmethod
    def find(cls, place: Folder) -> File:
        """The file at a path or URI; raises `SourceError` if there is none."""
        info = place.filesystem.get_file_info(place.path)
        if info.type != fs.FileType.File:
            raise SourceError(f"{place} is no file, or does not exist")
        return cls(place, info.size, info.mtime_ns or 0)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return self.folder.name

    def open(self) -> Any:
        """A new handle, pyarrow's."""
        return self.folder.filesystem.open_input_file(self.folder.path)

    def stream(self) -> IO[bytes]:
        """A new handle, Python's; seeking is cheap within what was read ahead."""
        ahead = 1 << 13 if self.folder.is_local else _COPY  # Every read of a remote file is slow.
        return io.BufferedReader(self.open(), ahead)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset, by a handle that this process keeps open."""
        content = cast(bytes, _handle(self).read_at(size, offset))
        if len(content) < size:
            raise OSError(
                f"truncated: {self.name} ends at byte {offset + len(content):,} instead of"
                f" {offset + size:,}"
            )
        return content

    @property
    def compression(self) -> str:
        """How the file is compressed as one stream, by its first bytes; empty if it is not."""
        head = self.read(0, min(self.size, 6))
        return next((name for magic, name in _STREAMS.items() if head.startswith(magic)), "")


@lru_cache(maxsize=32)
def _handle(file: File) -> Any:
    return file.open()


@lru_cache(maxsize=256)
def unpacked(file: File) -> File:
    """The file, decompressed if it is a compressed stream; a copy on this machine in that case."""
    if not file.compression:
        return file
    return cached(file, "unpacked", lambda target: _decompress(file, target))


def local(file: File) -> Path:
    """The file as one of this machine: itself, or a copy."""
    if not file.folder.is_local:
        file = cached(file, "copy", lambda target: _copy(file.stream(), target))
    return Path(file.folder.path)


def decompressed(file: File) -> IO[bytes]:
    """The file's content from the start, decompressed if need be."""
    match file.compression:
        case "gzip":
            return cast(IO[bytes], gzip.open(file.stream()))
        case "bz2":
            return bz2.open(file.stream())
        case "xz":
            return lzma.open(file.stream())
        case "zstd":
            return cast(IO[bytes], pa.CompressedInputStream(file.open(), "zstd"))
    return file.stream()


def _decompress(file: File, target: IO[bytes]) -> None:
    with decompressed(file) as content:
        _copy(content, target)


def _copy(content: IO[bytes], target: IO[bytes]) -> None:
    shutil.copyfileobj(content, target, _COPY)


def cached(file: File, what: str, make: Callable[[IO[bytes]], None]) -> File:
    """What `make` writes of a file, kept on this machine: made by the first process that asks.

    Raises one of `DAMAGE` if the file cannot be read, or the disk is full.
    """
    folder = _cache()
    key = f"{file.folder.uri}\0{file.size}\0{file.changed}\0{what}"
    path = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _delete_old(folder)
            draft = path.with_suffix(".partial")
            try:
                with draft.open("wb") as target:
                    make(target)
                draft.rename(path)
            finally:
                draft.unlink(missing_ok=True)
        os.utime(path)
    return File(Folder(str(path)), path.stat().st_size, 0)


def is_named(place: Folder | str) -> bool:
    """Whether the user named files: by a pattern, or the path of one."""
    return isinstance(place, str) or not place.is_folder()


def splits_of(files: Sequence[File], place: Folder | str) -> list[str]:
    """The split that each file's path names, below the source's own."""
    above = place.uri if isinstance(place, Folder) and place.is_folder() else ""
    return [split_of(file.folder.uri.removeprefix(above) if above else file.name) for file in files]


def _cache() -> Path:
    folder = cache_folder() / "sources"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _delete_old(folder: Path) -> None:
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < time.time() - _WEEK:
                path.unlink()
        except FileNotFoundError:  # Another process was faster.
            continue
