"""ZIP and tar archives of class folders, read in place."""

from __future__ import annotations

import bz2
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from biggan.data.dataset import Rejected
from biggan.data.images import ImageError
from biggan.data.sources.decoding import decode_image
from biggan.data.sources.dicom import Window
from biggan.data.sources.files import File, damage_told, unpacked
from biggan.data.sources.folders import by_class, describe, is_litter
from biggan.data.sources.labels import gaps_of_names, listed
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.source import Sample, Source, SourceError

_ENCRYPTED = 65535
"""Stands for the method of members that need a password."""
_LARGEST = 1 << 30
"""Bytes of a member from which on it is taken for a decompression bomb."""
_HEADER = 30
"""Bytes of a ZIP member's own header, ahead of its name."""
_LAST = 22
"""Bytes of a ZIP archive's last record, ahead of its comment."""
_BLOCK = 512
"""Bytes that everything in a tar archive is a multiple of."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive."""

    name: str
    offset: int
    """Where its content begins; in ZIP, its header."""
    size: int
    """Bytes there, perhaps compressed."""
    method: int = zipfile.ZIP_STORED
    crc: int | None = None


class MemberSource(Source):
    """Members of archives, each read from where it lies."""

    def __init__(self, archives: Sequence[File], window: Window, zipped: bool) -> None:
        self.archives = list(archives)
        self.window = window
        self.zipped = zipped

    def _keep(self, members: Sequence[Member], archive: np.ndarray) -> None:
        """Note where the items lie; `archive` is each one's, an index."""
        self.names = pa.array([member.name for member in members], pa.string())
        self.offsets = np.array([member.offset for member in members], dtype=np.int64)
        self.sizes = np.array([member.size for member in members], dtype=np.int64)
        self.methods = np.array([member.method for member in members], dtype=np.uint16)
        self.crcs = np.array([member.crc or 0 for member in members], dtype=np.uint32)
        self.archive = archive.astype(np.int32)

    def refs(self, items: np.ndarray) -> list[str]:
        """Names within the archive, after the archive's own where there are several."""
        names: list[str] = self.names.take(pa.array(items, pa.int64())).to_pylist()
        if len(self.archives) == 1:
            return names
        archives = [self.archives[i].name for i in self.archive[items].tolist()]
        return [f"{archive}/{name}" for archive, name in zip(archives, names, strict=True)]

    def read(self, items: np.ndarray) -> Iterator[Sample]:
        """The members' images."""
        for ref, item in zip(self.refs(items), items.tolist(), strict=True):
            yield Sample(ref, partial(self._load, item))

    def _load(self, item: int) -> Image.Image | np.ndarray:
        archive = self.archives[self.archive[item]]
        offset, size = int(self.offsets[item]), int(self.sizes[item])
        if self.zipped:
            method, crc = int(self.methods[item]), int(self.crcs[item])
            content = _unzipped(archive, offset, size, method, crc)
        else:
            content = unpacked(archive).read(offset, size)
        return decode_image(content, self.window)


def _unzipped(archive: File, offset: int, size: int, method: int, crc: int) -> bytes:
    """A ZIP member's content, checked."""
    if method == _ENCRYPTED:
        raise ImageError("encrypted: unpack the archive with its password first")
    header = archive.read(offset, _HEADER)
    if header[:4] != b"PK\3\4":
        raise ImageError("damaged: its header is not where the archive's directory says")
    name, extra = struct.unpack("<HH", header[26:30])
    packed = archive.read(offset + _HEADER + name + extra, size)
    match method:
        case zipfile.ZIP_STORED:
            content = packed
        case zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, _LARGEST)
        case zipfile.ZIP_BZIP2:
            content = bz2.BZ2Decompressor().decompress(packed, _LARGEST)
        case zipfile.ZIP_LZMA:
            content = _lzma(packed)
        case _:
            raise ImageError(f"compressed by method {method}: pack the archive anew as a plain ZIP")
    if zlib.crc32(content) != crc:
        raise ImageError("damaged: its checksum is wrong")
    return content


def _lzma(packed: bytes) -> bytes:
    (length,) = struct.unpack("<H", packed[2:4])
    # Private, but the only reader of properties that Python has; `zipfile` uses it too.
    properties = lzma._decode_filter_properties(lzma.FILTER_LZMA1, packed[4 : 4 + length])  # type: ignore[attr-defined]
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[properties])
    return decoder.decompress(packed[4 + length :], _LARGEST)


def zip_members(archive: File) -> list[Member]:
    """A ZIP archive's files; raises `SourceError` if it is damaged or truncated."""
    with (
        damage_told(f"--source {archive} is truncated or no ZIP archive"),
        archive.stream() as stream,
        zipfile.ZipFile(stream) as opened,
    ):
        _check_count(stream, archive, opened)
        return [
            Member(
                name=_clean(info.filename),
                offset=info.header_offset,
                size=info.compress_size,
                method=_ENCRYPTED if info.flag_bits & 1 else info.compress_type,
                crc=info.CRC,
            )
            for info in opened.infolist()
            if not info.is_dir()
        ]


def _check_count(stream: IO[bytes], archive: File, opened: zipfile.ZipFile) -> None:
    """The directory must list as many members as the archive's last record says (modulo 65,536)."""
    stream.seek(archive.size - _LAST - len(opened.comment))
    (said,) = struct.unpack("<H", stream.read(_LAST)[10:12])
    found = len(opened.infolist())
    if said not in (found % 65536, 65535):
        raise zipfile.BadZipFile(f"its directory lists {found:,} files instead of {said:,}")


def tar_members(archive: File) -> Iterator[Member]:
    """A tar archive's files, in order; compressed ones are unpacked into the cache first.

    Raises `SourceError` if it is damaged or truncated.
    """
    with damage_told(f"--source {archive} is a truncated or damaged tar archive"):
        plain = unpacked(archive)
        with plain.stream() as stream:
            yield from _tar_members(stream, plain.size)


def _tar_members(stream: IO[bytes], size: int) -> Iterator[Member]:
    placed: dict[str, Member] = {}  # Hard links name one that came before.
    opened = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115  # Its file is the caller's.
    while info := opened.next():
        opened.members.clear()  # type: ignore[attr-defined]  # Else it keeps a kilobyte for each.
        if info.offset_data + info.size > size and info.isreg():
            raise tarfile.ReadError(f"{info.name} ends beyond the end of the file")
        if info.issparse():
            raise tarfile.ReadError(f"{info.name} is stored with holes: pack without --sparse")
        name = _clean(info.name)
        if info.isreg():
            placed[info.name] = member = Member(name, info.offset_data, info.size)
            yield member
        elif info.islnk() and info.linkname in placed:
            target = placed[info.linkname]
            yield Member(name, target.offset, target.size)
        elif info.islnk() or info.issym():
            yield Member(name, -1, 0)
    _check_end(stream, opened.offset)


def _check_end(stream: IO[bytes], end: int) -> None:
    """What follows the last member must be zeros, and at least a block of them."""
    stream.seek(end)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError("its end marker is missing")
    if any(block):
        raise tarfile.ReadError(f"no header at byte {end:,}")
    while block := stream.read(1 << 20):
        if block.count(0) < len(block):
            raise tarfile.ReadError("more follows after its end: are these joined archives?")


class ArchiveFolders(MemberSource):
    """A ZIP or tar archive with one folder a class, perhaps below others that all files share."""

    def __init__(self, archive: File, options: SourceOptions, *, zipped: bool) -> None:
        """List the archive; raises `SourceError` if it is damaged or has no classes."""
        super().__init__([archive], options.window, zipped)
        listing = zip_members(archive) if zipped else list(tar_members(archive))
        members = {member.name: member for member in listing}
        files = [
            path
            for path, member in members.items()
            if member.offset >= 0 and not any(map(is_litter, path.split("/")))
        ]
        found = by_class(files, options.split, f"--source {archive}", rooted=True)
        if not found.classes:
            raise SourceError(
                f"--source {archive} has no classes: expected one folder a class with images in"
                f" it, found {len(files)} files"
            )
        self._keep([members[path] for path in found.paths], np.zeros(len(found.paths)))
        self.classes, self.labels = found.classes, found.labels
        self.held_out = found.held_out
        self.split = options.split if found.splits else None
        self.findings = gaps_of_names(self.classes)
        links = [path for path, member in members.items() if member.offset < 0]
        self.unreadable = len(links)
        self.rejected: list[Rejected] = [
            *listed([(path, "a link, which archives cannot follow") for path in links], len(links)),
            *listed(
                [(path, "lies outside any class folder") for path in found.outside],
                len(found.outside),
            ),
        ]

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        kind = "zip" if self.zipped else "tar"
        return describe(kind, self.archives[0], split=self.split, window=self.window)


def _clean(name: str) -> str:
    """A member's path as people write it: `./a//b` is `a/b`."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
