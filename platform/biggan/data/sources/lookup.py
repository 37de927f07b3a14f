"""Where the files are that a table names."""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from pyarrow import fs

from biggan.data.sources.decoding import is_image_name
from biggan.data.sources.folders import entries, list_folder, placed
from biggan.storage import Folder


class Within:
    """Files of a folder, by path or name, with or without their suffix.

    Folders that a path begins with may be other than the folder's own; those within must be right,
    since another class may have a file of the same name.
    """

    def __init__(self, root: Folder) -> None:
        self.files = list_folder(root).files
        self.paths = _index(self.files, str)
        self.stems = _index(self.files, _stem)
        self.names = _index(self.files, _name)
        self.name_stems = _index(self.files, _name_stem)

    def find(self, word: str) -> str | None:
        """The file that a row names; None if there is none, or several."""
        word = posixpath.normpath(word.replace("\\", "/")).removeprefix("/")
        if "/" not in word:
            return self.names.get(word) or self.name_stems.get(word)
        while word:
            found = self.paths.get(word) or self.stems.get(word)
            if found:
                return found
            word = word.partition("/")[2]
        return None


def may_be_image(path: str) -> bool:
    """Whether a file is an image by its name, or has a name that says nothing."""
    return is_image_name(path) or "." not in posixpath.basename(path)


def _stem(path: str) -> str:
    return str(posixpath.splitext(path)[0])


def _name(path: str) -> str:
    return str(posixpath.basename(path))


def _name_stem(path: str) -> str:
    return _stem(_name(path))


def _index(files: Sequence[str], way: Callable[[str], str]) -> dict[str, str]:
    """Files by a key; those that share theirs with another are left out."""
    keys = Counter(map(way, files))
    return {way(file): file for file in files if keys[way(file)] == 1}


class Beside:
    """Files by their paths from a table's folder, absolute paths, and URIs."""

    def __init__(self, root: Folder, words: Sequence[str | None]) -> None:
        self.root = root
        relative = {_plain(word) for word in words if word and not _is_absolute(word)}
        tops = {path.partition("/")[0] for path in relative if "/" in path}
        direct = any("/" not in path for path in relative)
        self.files = list(_listed(root, tops, direct))
        self.there = set(self.files)
        self.there |= _existing([w for w in words if w and _is_absolute(_placed_at(root, w))], root)

    def find(self, word: str) -> str | None:
        """The file that a row names; None if there is none, or several."""
        word = _placed_at(self.root, word)
        path = word if _is_absolute(word) else _plain(word)
        return path if path in self.there else None


def whole(root: Folder, path: str) -> str:
    """A path on its filesystem."""
    folder, name = placed(root, path)
    return f"{folder.path.rstrip('/')}/{name}"


def _plain(word: str) -> str:
    return posixpath.normpath(word.strip().replace("\\", "/"))


def _is_absolute(word: str) -> bool:
    return "://" in word or word.startswith("/")


def _placed_at(root: Folder, word: str) -> str:
    """A path that leads out of the root, made absolute; another as it is."""
    word = word.strip()
    if _is_absolute(word) or not _plain(word).startswith("../"):
        return word
    base, _, path = root.uri.rpartition("://")
    joined = posixpath.normpath(f"{path}/{_plain(word)}")
    return f"{base}://{joined}" if base else joined


def _listed(root: Folder, tops: set[str], direct: bool) -> Iterator[str]:
    files, folders = entries(root)
    for top in sorted(tops & set(folders)):
        for path in list_folder(root / top).files:
            yield f"{top}/{path}"
    if direct:
        yield from files


def _existing(words: Sequence[str], root: Folder) -> set[str]:
    """Those absolute paths and URIs that are files; looked up a folder at a time."""
    by_folder: dict[Folder, list[tuple[str, str]]] = defaultdict(list)
    for word in words:
        path = _placed_at(root, word)
        folder, _ = placed(root, path)
        by_folder[folder].append((path, whole(root, path)))
    there = set()
    for folder, paths in by_folder.items():
        infos = folder.filesystem.get_file_info([path for _, path in paths])
        for (path, _), info in zip(paths, infos, strict=True):
            if info.type == fs.FileType.File:
                there.add(path)
    return there
