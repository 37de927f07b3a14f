"""Where images come from: what a dataset is prepared from.

A source lists its items cheaply on the driver; workers load them one by one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from pyarrow import fs

from biggan.data.dataset import Rejected
from biggan.errors import UserError
from biggan.storage import Folder


class SourceError(UserError):
    """A source that holds nothing usable, and what it should hold."""


@dataclass(frozen=True)
class Item:
    """One image of a source, and its class by index."""

    ref: str
    label: int


class Source(Protocol):
    """Labelled images."""

    classes: list[str]
    items: list[Item]
    rejected: list[Rejected]
    """What was found unfit while listing."""
    unreadable: int
    """How many of those are files (or folders of them) that should have been images."""

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""

    def load(self, ref: str) -> Image.Image:
        """An item's image, perhaps not yet decoded; raises whatever a damaged one makes it."""


def open_source(spec: str) -> Source:
    """The source that `spec` names.

    That is `digits`, or a folder (path or URI) with one sub-folder of images a class. Raises
    `SourceError` if there is nothing usable.
    """
    if spec == "digits":
        return DigitsSource()
    return ClassFolders(Folder(spec if "://" in spec else str(Path(spec).expanduser().resolve())))


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8), labels


class DigitsSource:
    """scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels in ten classes.

    They come with scikit-learn, so this source works offline. (Alpaydin and Kaynak 1998, UCI
    "Optical Recognition of Handwritten Digits", test part; CC BY 4.0.)
    """

    def __init__(self) -> None:
        self.classes = [str(digit) for digit in range(10)]
        self.items = [Item(str(i), int(label)) for i, label in enumerate(_digits()[1])]
        self.rejected: list[Rejected] = []
        self.unreadable = 0
        self.description = {"kind": "digits"}

    def load(self, ref: str) -> Image.Image:
        """Scan number `ref`."""
        return Image.fromarray(_digits()[0][int(ref)])


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


@dataclass
class ClassFolders:
    """A folder with one sub-folder a class; images may lie deeper within. Local or any URI."""

    root: Folder
    classes: list[str] = field(init=False)
    items: list[Item] = field(init=False)
    rejected: list[Rejected] = field(init=False)
    unreadable: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.root.exists():
            raise SourceError(f"--source {self.root} does not exist")
        if not self.root.is_folder():
            raise SourceError(
                f"--source {self.root} is a file: expected a folder with one sub-folder a class"
            )
        listing = _list_local(self.root.path) if self.root.is_local else _list_remote(self.root)
        files = sorted(listing.files, key=natural)
        folders = {path for path in listing.folders if "/" not in path}
        used = {path.split("/")[0] for path in files if "/" in path}
        if not used:
            raise SourceError(
                f"--source {self.root} has no classes: expected one sub-folder a class with images"
                f" in it, found {len(folders)} empty sub-folders and {len(files)} files"
                + "".join(f"; {r.path}: {r.reason}" for r in listing.rejected[:1])
            )
        self.unreadable = len(listing.rejected)
        self.classes = sorted(used, key=natural)
        index = {name: i for i, name in enumerate(self.classes)}
        self.items = [Item(path, index[path.split("/")[0]]) for path in files if "/" in path]
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

    def load(self, ref: str) -> Image.Image:
        """The image at path `ref` under the root."""
        return Image.open(BytesIO(self.root.read_bytes(ref)))


def natural(text: str) -> tuple[list[str | int], str]:
    """Sort key under which "class 10" follows "class 9"."""
    parts = re.split(r"([0-9]+)", text)  # Every second part is a number.
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text
