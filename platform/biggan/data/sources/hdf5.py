"""HDF5 as BigGAN-PyTorch's `make_hdf5.py` writes it: `imgs` and `labels`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from biggan.data.sources.arrays import ArraySource, Block
from biggan.data.sources.columns import present
from biggan.data.sources.files import File, damage_told, local
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.rows import LONGEST_RUN
from biggan.data.sources.source import SourceError

MAGIC = b"\x89HDF\r\n\x1a\n"
_CHUNKS = 256 * 2**20
"""Bytes of chunks that are kept in memory, so that neighbours are decompressed once."""
_IMAGES = ("imgs", "images", "image", "data", "x", "X")
_LABELS = ("labels", "label", "targets", "target", "y", "Y")


class Hdf5Source(ArraySource):
    """An array of images and one of labels; a remote file is copied to each machine."""

    def __init__(self, file: File, options: SourceOptions) -> None:
        """Read the labels; raises `SourceError` if the file is damaged or h5py not installed."""
        # HDF5 would take a file that it still has open for the one that replaced it.
        _handle.cache_clear()
        with (
            damage_told(f"--source {file} is a truncated or damaged HDF5 file"),
            _opened(file) as opened,
        ):
            arrays = [name for name, item in opened.items() if hasattr(item, "shape")]
            images = _name(file, arrays, options.image_column, _IMAGES, "image")
            labels = _name(file, arrays, options.label_column, _LABELS, "label")
            shape, chunks = opened[images].shape, opened[images].chunks
            values = np.asarray(opened[labels][:])
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            raise SourceError(
                f"--source {file}: {labels!r} has shape {values.shape}: expected one label an image"
            )
        if values.dtype.kind in "OS":
            values = np.array([x.decode() if isinstance(x, bytes) else x for x in values.tolist()])
        block = Block(f"{file.name} {images}", partial(_array, file, images), shape, values)
        super().__init__(
            "hdf5",
            file,
            [block],
            split=None,
            held_out=None,
            run_length=min(chunks[0], LONGEST_RUN) if chunks else 1,
            image_column=images,
            label_column=labels,
        )


def _name(file: File, arrays: Sequence[str], wanted: str, known: Sequence[str], role: str) -> str:
    if wanted:
        return present(arrays, wanted, role, f"--source {file}")
    for name in known:
        if name in arrays:
            return name
    raise SourceError(
        f"--source {file} holds arrays {', '.join(arrays) or '(none)'}: expected {known[0]}; give"
        f" --{role}-column"
    )


def _opened(file: File) -> Any:
    try:
        import h5py
    except ImportError:
        raise SourceError(
            "HDF5 files need h5py, which is not installed: pip install 'biggan-platform[hdf5]'"
        ) from None
    return h5py.File(local(file), "r", rdcc_nbytes=_CHUNKS)


_handle = lru_cache(maxsize=4)(_opened)


def _array(file: File, name: str) -> Any:
    return _handle(file)[name]
