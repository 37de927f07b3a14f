"""IDX files, as MNIST, Fashion-MNIST, EMNIST and their kin come in, plain or compressed."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np

from biggan.data.sources.arrays import ArraySource, Block
from biggan.data.sources.files import DAMAGE, File, damage_told, decompressed, local, unpacked
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.source import SourceError
from biggan.data.sources.splits import choose, split_of
from biggan.storage import Folder

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IMAGES = re.compile(r"(.*)images(.*?)[-.]?idx[34]-u?\w+(\.gz|\.bz2|\.xz)?")


def is_idx(head: bytes) -> bool:
    """Whether a file that begins so is IDX: two zeros, a type, and 1 to 4 dimensions."""
    return len(head) >= 4 and head[:2] == b"\0\0" and head[2] in _TYPES and 1 <= head[3] <= 4


def images_files(names: Sequence[str]) -> list[str]:
    """Those of a folder's files that are IDX images by their names; unpacked, if both are there."""
    found = {match.string: match for match in map(_IMAGES.fullmatch, names) if match}
    packed = {name: name.removesuffix(match[3] or "") for name, match in found.items()}
    return [name for name in found if packed[name] == name or packed[name] not in found]


class IdxSource(ArraySource):
    """Pairs of files: `train-images-idx3-ubyte.gz` and `train-labels-idx1-ubyte.gz`, and `t10k-`.

    A folder may hold one set's pairs; a file stands for its own pair. Images are as stored: those
    of EMNIST lie on their side.
    """

    def __init__(self, place: Folder, options: SourceOptions) -> None:
        """Read the labels; raises `SourceError` if a file is missing, damaged or truncated."""
        if place.is_folder():
            folder, images = place, images_files(place.children())
            self._check_one_set(place, images)
        else:
            folder, images = place.parent, [place.name.replace("labels", "images")]
            images = [_sibling(folder, images[0], "images")] if "labels" in place.name else images
        splits = [split_of(name) for name in images]
        named = not place.is_folder()
        chosen, held_out = choose(splits, options.split, f"--source {place}", named=named)
        blocks = [_block(folder, images[i], splits[i]) for i in chosen.tolist()]
        split = options.split if any(splits) else None
        super().__init__("idx", place, blocks, split=split, held_out=held_out)

    @staticmethod
    def _check_one_set(place: Folder, images: Sequence[str]) -> None:
        if not images:
            raise SourceError(
                f"--source {place} holds no IDX images: expected train-images-idx3-ubyte and"
                " train-labels-idx1-ubyte, plain or .gz"
            )
        splits = [split_of(name) for name in images]
        if len(set(splits)) < len(splits):
            raise SourceError(
                f"--source {place} holds several sets: give the path of one of {', '.join(images)}"
            )


def _sibling(folder: Folder, name: str, role: str) -> str:
    """The file of a pair in the other role, whatever its dimensions and compression."""
    pattern = re.sub(r"idx[1-4]", "idx[1-4]", re.escape(name).replace(r"\-", "-"))
    pattern = re.sub(r"\\\.(gz|bz2|xz)$", "", pattern) + r"(\.gz|\.bz2|\.xz)?"
    found = [child for child in folder.children() if re.fullmatch(pattern, child)]
    if not found:
        raise SourceError(f"--source {folder}: the {role} {name} are missing: put them beside")
    return found[0]


def _block(folder: Folder, images: str, split: str) -> Block:
    if "images" not in images:
        raise SourceError(
            f"--source {folder / images}: expected a name such as train-images-idx3-ubyte, which"
            " says where the labels are"
        )
    labels = _sibling(folder, images.replace("images", "labels"), "labels")
    image_file, label_file = File.find(folder / images), File.find(folder / labels)
    for file in (image_file, label_file):
        _check(file)
    shape = open_idx(image_file).shape
    values = np.array(open_idx(label_file))
    if values.ndim != 1:
        raise SourceError(
            f"--source {label_file} has shape {values.shape}: expected one label an image"
        )
    values = values.astype(values.dtype.newbyteorder("="))
    return Block(images, partial(open_idx, image_file), shape, values, split)


def _check(file: File) -> None:
    """Raises `SourceError` unless the file holds just what its header promises."""
    with damage_told(f"--source {file} is a truncated or damaged IDX file"):
        plain = unpacked(file)
        dtype, shape, offset = _header(plain)
    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if plain.size != expected:
        kind = "truncated" if plain.size < expected else "damaged"
        promised = "x".join(map(str, shape))
        raise SourceError(
            f"--source {file} is {kind}: {promised} values take {expected:,} bytes, it has"
            f" {plain.size:,}; copy it again"
        )


def _header(file: File) -> tuple[np.dtype, tuple[int, ...], int]:
    head = file.read(0, min(file.size, 20))
    if not is_idx(head):
        raise ValueError("it does not begin as IDX files do")
    dimensions = head[3]
    shape = struct.unpack(f">{dimensions}I", head[4 : 4 + 4 * dimensions])
    return np.dtype(_TYPES[head[2]]), shape, 4 + 4 * dimensions


@lru_cache(maxsize=16)
def open_idx(file: File) -> np.ndarray:
    """The array of an IDX file, mapped into memory."""
    plain = unpacked(file)
    dtype, shape, offset = _header(plain)
    return np.memmap(local(plain), dtype, "r", offset, shape)


def begins_as_idx(file: File) -> bool:
    """Whether a file is IDX by its first bytes, decompressed if need be."""
    try:
        with decompressed(file) as content:
            return is_idx(content.read(4))
    except DAMAGE:
        return False
