"""A folder with one sub-folder of images a class, on disk or at any URI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import fs

from biggan.data.dataset import Rejected
from biggan.data.sources.source import Sample, Source, SourceError, natural
from biggan.storage import Folder

# What operating systems leave in folders; not worth a line in a report.
_LITTER = {"thumbs.db", "desktop.ini"}


@dataclass
class _Listing:
    """What lies under a root, by path relative to it."""

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _list_local(root: str) -> _Listing:
    """List a folder on disk, through links, with what cannot be read as rejected."""
    listing = _Listing()

    def reject(path: str, reason: str) -> None:
        shown = os.fsencode(os.path.relpath(path, root)).decode("utf-8", "backslashreplace")
        listing.rejected.append(Rejected(path=shown, reason=reason))

    def on_error(error: OSError) -> None:
        reject(str(error.filename), f"cannot be listed: {error.strerror}")

    for folder, folders, files in os.walk(root, followlinks=True, onerror=on_error):
        logical = Path(folder)  # A way that leads through links has other folders above it.
        above = {at.resolve() for at in (logical, *logical.parents)}
        folders[:] = [name for name in folders if not _is_litter(name)]
        for name in list(folders):
            path = Path(folder, name)
            if os.path.islink(path) and path.resolve() in above:  # noqa: PTH114  # As below.
                folders.remove(name)
                reject(str(path), "a link to a folder that it lies in")
            elif _is_text(str(path)):
                listing.folders.append(os.path.relpath(path, root))
        for name in files:
            path = Path(folder, name)
            if _is_litter(name):
                continue
            if not _is_text(str(path)):
                reject(str(path), "its name is not valid UTF-8: rename it")
            elif not os.path.isfile(path):  # noqa: PTH113  # Path's raises where it may not look.
                reject(str(path), "not a file, or a link that leads nowhere")
            else:
                listing.files.append(os.path.relpath(path, root))
    return listing


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list_remote(root: Folder) -> _Listing:
    listing = _Listing()
    for info in root.filesystem.get_file_info(fs.FileSelector(root.path, recursive=True)):
        path = info.path.removeprefix(root.path).lstrip("/")
        if any(_is_litter(part) for part in path.split("/")):
            continue
        if info.type == fs.FileType.Directory:
            listing.folders.append(path)
        else:
            listing.files.append(path)
    return listing


class ClassFolders(Source):
    """A folder with one sub-folder a class; images may lie deeper within. Local or any URI."""

    def __init__(self, root: Folder) -> None:
        """List the folder; raises `SourceError` if it has no classes."""
        if not root.exists():
            raise SourceError(f"--source {root} does not exist")
        if not root.is_folder():
            raise SourceError(
                f"--source {root} is a file: expected a folder with one sub-folder a class"
            )
        self.root = root
        listing = _list_local(root.path) if root.is_local else _list_remote(root)
        files = sorted(listing.files, key=natural)
        folders = {path for path in listing.folders if "/" not in path}
        used = {path.split("/")[0] for path in files if "/" in path}
        if not used:
            raise SourceError(
                f"--source {root} has no classes: expected one sub-folder a class with images"
                f" in it, found {len(folders)} empty sub-folders and {len(files)} files"
                + "".join(f"; {r.path}: {r.reason}" for r in listing.rejected[:1])
            )
        self.unreadable = len(listing.rejected)
        self.classes = sorted(used, key=natural)
        index = {name: i for i, name in enumerate(self.classes)}
        paths = [path for path in files if "/" in path]
        self.labels = np.array([index[path.split("/")[0]] for path in paths], dtype=np.int32)
        self.paths = pa.array(paths)  # A fraction of what Python's own strings take.
        self.rejected = [
            *listing.rejected,
            *(
                Rejected(path=path, reason="class folder without any file")
                for path in sorted(folders - used, key=natural)
            ),
            *(
                Rejected(path=path, reason="lies outside any class folder")
                for path in files
                if "/" not in path
            ),
        ]

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        return {"kind": "folders", "uri": self.root.uri}

    def read(self, items: np.ndarray) -> Iterator[Sample]:
        """The images at the items' paths."""
        for path in self.paths.take(items).to_pylist():
            yield Sample(path, partial(self._open, path))

    def _open(self, path: str) -> Image.Image:
        return Image.open(BytesIO(self.root.read_bytes(path)))
