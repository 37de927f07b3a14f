"""Images as files: a folder with one sub-folder a class, on disk or at any URI."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import fs

from biggan.data.dataset import Rejected
from biggan.data.sources.decoding import decode_image
from biggan.data.sources.dicom import Window
from biggan.data.sources.labels import gaps_of_names, listed
from biggan.data.sources.options import DEFAULTS, SourceOptions, Split
from biggan.data.sources.source import Sample, Source, SourceError, natural
from biggan.data.sources.splits import choose, split_named
from biggan.storage import Folder

# What operating systems leave in folders; not worth a line in a report.
_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass
class Listing:
    """What lies under a root, by path relative to it."""

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def is_litter(name: str) -> bool:
    """Whether a file or folder is one that operating systems leave behind."""
    return name.startswith(".") or name.lower() in _LITTER


def list_folder(root: Folder) -> Listing:
    """All that lies under a folder."""
    return _list_local(root.path) if root.is_local else _list_remote(root)


def _list_local(root: str) -> Listing:
    """List a folder on disk, through links, with what cannot be read as rejected."""
    listing = Listing()

    def reject(path: str, reason: str) -> None:
        shown = os.fsencode(os.path.relpath(path, root)).decode("utf-8", "backslashreplace")
        listing.rejected.append(Rejected(path=shown, reason=reason))

    def on_error(error: OSError) -> None:
        reject(str(error.filename), f"cannot be listed: {error.strerror}")

    for folder, folders, files in os.walk(root, followlinks=True, onerror=on_error):
        logical = Path(folder)  # A way that leads through links has other folders above it.
        above = {at.resolve() for at in (logical, *logical.parents)}
        folders[:] = [name for name in folders if not is_litter(name)]
        for name in list(folders):
            path = Path(folder, name)
            if os.path.islink(path) and path.resolve() in above:  # noqa: PTH114  # As below.
                folders.remove(name)
                reject(str(path), "a link to a folder that it lies in")
            elif _is_text(str(path)):
                listing.folders.append(os.path.relpath(path, root))
        for name in files:
            path = Path(folder, name)
            if is_litter(name):
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


def _list_remote(root: Folder) -> Listing:
    listing = Listing()
    for info in root.filesystem.get_file_info(fs.FileSelector(root.path, recursive=True)):
        path = info.path.removeprefix(root.path).lstrip("/")
        if any(is_litter(part) for part in path.split("/")):
            continue
        if info.type == fs.FileType.Directory:
            listing.folders.append(path)
        else:
            listing.files.append(path)
    return listing


def entries(place: Folder) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders right in a folder, without litter; sorted."""
    if place.is_local:
        found = [(entry.name, entry.is_file(), entry.is_dir()) for entry in os.scandir(place.path)]
    else:
        infos = place.filesystem.get_file_info(fs.FileSelector(place.path))
        found = [
            (info.base_name, info.is_file, info.type == fs.FileType.Directory) for info in infos
        ]
    shown = sorted(entry for entry in found if not is_litter(entry[0]) and _is_text(entry[0]))
    return [name for name, file, _ in shown if file], [name for name, _, folder in shown if folder]


@dataclass(frozen=True)
class ByClass:
    """Paths sorted by the class folders that they lie in."""

    paths: list[str]
    classes: list[str]
    labels: np.ndarray
    """int32 `[n]`."""
    held_out: np.ndarray | None
    outside: list[str]
    """Paths that lie in no class folder."""
    depth: int
    """How many folders lie above those of the classes: 1 if they come in splits."""
    splits: bool


def by_class(paths: Sequence[str], split: Split, where: object, *, rooted: bool) -> ByClass:
    """Sort paths by class: the first folder, or the second where the first are splits (train, ...).

    With `rooted`, folders that all paths share lie above the classes, as in archives.
    """
    ordered = sorted(paths, key=natural)
    depth = _shared(ordered) if rooted else 0
    parts = [path.split("/") for path in ordered]
    firsts = {part[depth] for part in parts if len(part) > depth + 1}
    splits = bool(firsts) and all(split_named(name) for name in firsts)
    deep = any(len(part) > depth + 2 for part in parts)
    if splits and not deep and len(firsts) > 1:
        raise SourceError(
            f"{where} has folders {', '.join(sorted(firsts))}, and no folders of classes in them:"
            " put the images into one sub-folder a class"
        )
    splits = splits and deep
    level = depth + splits
    inside = [i for i, part in enumerate(parts) if len(part) > level + 1]
    outside = [ordered[i] for i, part in enumerate(parts) if len(part) <= level + 1]
    of = [split_named(parts[i][depth]) if splits else "" for i in inside]
    chosen, held_out = choose(of, split, where)
    inside = [inside[i] for i in chosen.tolist()]
    names = [parts[i][level] for i in inside]
    classes = sorted(set(names), key=natural)
    code = {name: i for i, name in enumerate(classes)}
    labels = np.array([code[name] for name in names], dtype=np.int32)
    kept = [ordered[i] for i in inside]
    return ByClass(kept, classes, labels, held_out, outside, level, splits)


def _shared(paths: Sequence[str]) -> int:
    """How many leading folders all paths share, above one more that is their class's."""
    if not paths:
        return 0
    parts = [path.split("/")[:-1] for path in paths]
    shortest = min(map(len, parts))
    shared = 0
    while shared < shortest - 1 and len({part[shared] for part in parts}) == 1:
        if split_named(parts[0][shared]):
            break
        shared += 1
    return shared


class FileSource(Source):
    """Images in files of their own, by path: under a root, absolute, or a URI."""

    def __init__(self, root: Folder, paths: Sequence[str], window: Window) -> None:
        self.root = root
        self.paths = pa.array(paths, pa.string())  # A fraction of what Python's own strings take.
        self.window = window

    def read(self, items: np.ndarray) -> Iterator[Sample]:
        """The images at the items' paths."""
        for path in self.refs(items):
            yield Sample(path, partial(self._load, path))

    def refs(self, items: np.ndarray) -> list[str]:
        """The items' paths."""
        paths: list[str] = self.paths.take(pa.array(items, pa.int64())).to_pylist()
        return paths

    def _load(self, path: str) -> Image.Image | np.ndarray:
        folder, name = placed(self.root, path)
        return decode_image(folder.read_bytes(name), self.window)


def placed(root: Folder, path: str) -> tuple[Folder, str]:
    """The folder that a path counts from, and what is left of the path."""
    if "://" in path or path.startswith("/"):
        above, _, name = path.rpartition("/")
        return _folder(above or "/"), name
    return root, path


@lru_cache(maxsize=256)
def _folder(uri: str) -> Folder:  # Object stores take a while to be found.
    return Folder(uri)


class ClassFolders(FileSource):
    """A folder with one sub-folder a class; images may lie deeper within. Local or any URI.

    Where the sub-folders are train, test and val, theirs are the classes.
    """

    kind = "folders"

    def __init__(self, root: Folder, options: SourceOptions = DEFAULTS) -> None:
        """List the folder; raises `SourceError` if it has no classes."""
        if not root.exists():
            raise SourceError(f"--source {root} does not exist")
        if not root.is_folder():
            raise SourceError(
                f"--source {root} is a file: expected a folder with one sub-folder a class"
            )
        listing = list_folder(root)
        found = by_class(listing.files, options.split, f"--source {root}", rooted=False)
        folders = {path for path in listing.folders if "/" not in path}
        if not found.classes:
            raise SourceError(
                f"--source {root} has no classes: expected one sub-folder a class with images"
                f" in it, found {len(folders)} empty sub-folders and {len(listing.files)} files"
                + "".join(f"; {r.path}: {r.reason}" for r in listing.rejected[:1])
            )
        super().__init__(root, found.paths, options.window)
        self.unreadable = len(listing.rejected)
        self.classes, self.labels = found.classes, found.labels
        self.held_out = found.held_out
        self.split = options.split if found.splits else None
        self.findings = gaps_of_names(self.classes)
        self.rejected = [
            *listing.rejected,
            *(
                Rejected(path=path, reason="class folder without any file")
                for path in _empty(listing, found.depth)
            ),
            *listed(
                [(path, "lies outside any class folder") for path in found.outside],
                len(found.outside),
            ),
        ]

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        return describe(self.kind, self.root, split=self.split, window=self.window)


def _empty(listing: Listing, depth: int) -> list[str]:
    """Class folders, `depth` below the root, with no file in or under them."""
    used = {"/".join(path.split("/")[: depth + 1]) for path in listing.files}
    folders = {path for path in listing.folders if path.count("/") == depth}
    return sorted(folders - used, key=natural)


def describe(kind: str, place: object, **options: Any) -> dict[str, Any]:
    """What `dataset.json` says of a source: the options that are set, beside kind and place."""
    given = {name: value for name, value in options.items() if value not in (None, "", ())}
    # As JSON gives it back.
    listed_ = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    return {"kind": kind, "uri": str(place), **listed_}
