"""Where everything lives: one storage root, a local path or any URI that `pyarrow.fs` reads.

Under the root stand `datasets/NAME`, `runs/NAME`, `sweeps/NAME` and `models/NAME`. Whatever takes
a name also takes a full path or URI. A file is written whole or not at all, so that a reader never
sees half of one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar
from urllib.parse import urlsplit

from pyarrow import fs

from biggan.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_ROOT = "./storage"
PATIENCE = "BIGGAN_STORAGE_PATIENCE"
"""Variable for the seconds that training waits for storage which refuses, or is full."""
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable that Ray sets for a command run by `ray job submit`."""
Kind = Literal["datasets", "runs", "sweeps", "models"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class StorageError(UserError):
    """A name or place in storage that cannot be used, or does not hold what was asked for."""


class UnavailableError(StorageError):
    """Storage that refused for longer than anybody has patience."""

    resumable = True


def absolute(path: str) -> str:
    """A local path made absolute; a URI as it is.

    The working directory of a submitted job is a copy that is deleted after it. There, a relative
    path counts from the home directory instead.
    """
    if "://" in path:
        return path
    base = Path.home() if SUBMITTED in os.environ else Path.cwd()
    return str((base / Path(path).expanduser()).resolve())


def storage_root(root: str | None = None) -> str:
    """The storage root: `root` if given, else $BIGGAN_STORAGE, else ./storage; made absolute."""
    return absolute(root or os.environ.get("BIGGAN_STORAGE") or DEFAULT_ROOT)


def cache_folder() -> Path:
    """Where this machine keeps what it can fetch or make again.

    That is $BIGGAN_CACHE, else $XDG_CACHE_HOME/biggan, else ~/.cache/biggan.
    """
    if own := os.environ.get("BIGGAN_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "biggan"


def check_name(name: str) -> str:
    """Return `name` if it can name something in storage; raises `StorageError` otherwise."""
    if not _NAME.fullmatch(name):
        raise StorageError(
            f"name {name!r}: use letters, digits, '.', '_' and '-', beginning with a letter or"
            " digit (or give a full path or URI)"
        )
    return name


def locate(kind: Kind, name: str, root: str | None = None) -> Folder:
    """The folder of a dataset, run, sweep or model, by its name or by a full path or URI."""
    if "://" in name:
        return Folder(name.rstrip("/"))
    if "/" in name or name in (".", ".."):
        return Folder(absolute(name))
    return Folder(storage_root(root)) / kind / check_name(name)


def training_patience() -> float:
    """Seconds that training waits for storage: $BIGGAN_STORAGE_PATIENCE, by default 5 minutes."""
    given = os.environ.get(PATIENCE) or "300"
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise StorageError(f"{PATIENCE} = {given!r}: must be a number of seconds, 0 or more")
    return seconds


def insist(where: str, patience: float, operation: Callable[[], T]) -> T:
    """What `operation` gives; while it fails, it is tried again in ever longer intervals.

    Raises `UnavailableError`, which names `where`, after `patience` seconds; without patience what
    the operation raised, and always what is no refusal: that a file is not there, or is a folder.
    """
    deadline, pause = time.monotonic() + patience, 0.5
    while True:
        try:
            return operation()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError):
            raise
        except OSError as error:
            if not patience:
                raise
            if (left := deadline - time.monotonic()) <= 0:
                raise UnavailableError(f"{where} failed for {patience:g} s: {error}") from error
            print(f"{where}: {error}; trying again for {left:.0f} s", flush=True)
            # Not all workers of a cluster at the same moment.
            time.sleep(min(pause * random.uniform(0.5, 1.5), left))
            pause = min(2 * pause, 15)


def _insisting(
    method: Callable[Concatenate[Folder, P], T],
) -> Callable[Concatenate[Folder, P], T]:
    """An operation of a folder, tried for as long as the folder has patience."""

    @wraps(method)
    def patient(folder: Folder, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return insist(f"storage {folder}", folder.patience, lambda: method(folder, *args, **kwargs))

    return patient


@dataclass(frozen=True)
class Folder:
    """A folder in storage. `uri` is an absolute local path or a URI, query part included."""

    uri: str
    patience: float = field(default=0.0, compare=False)
    """Seconds that an operation is tried again for, if storage refuses it; then it raises
    `UnavailableError`."""

    def __truediv__(self, child: str) -> Folder:
        base, mark, query = self.uri.partition("?")
        return Folder(f"{base.rstrip('/')}/{child}{mark}{query}", self.patience)

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Folder:
        """The folder that holds this one."""
        base, mark, query = self.uri.partition("?")
        return Folder(f"{base.rstrip('/').rsplit('/', 1)[0]}{mark}{query}", self.patience)

    @cached_property
    def _resolved(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.uri:
            return fs.LocalFileSystem(), self.uri
        try:
            filesystem, path = fs.FileSystem.from_uri(self.uri)
        except Exception as error:  # pyarrow raises several kinds, none of which names the URI.
            scheme = urlsplit(self.uri).scheme
            raise StorageError(
                f"storage {self.uri!r} ({scheme}) is not readable: {error}"
            ) from None
        return filesystem, path

    @property
    def filesystem(self) -> fs.FileSystem:
        """The filesystem that holds the folder."""
        return self._resolved[0]

    @property
    def path(self) -> str:
        """The folder's path on its filesystem."""
        return self._resolved[1]

    @property
    def is_local(self) -> bool:
        """Whether the folder is on this machine's own filesystem."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def is_folder(self) -> bool:
        """Whether this is a folder, and not a file or nothing."""
        return bool(self._info("").type == fs.FileType.Directory)

    def exists(self, file: str = "") -> bool:
        """Whether the folder, or a file or folder in it, exists."""
        return bool(self._info(file).type != fs.FileType.NotFound)

    def size(self, file: str) -> int:
        """A file's size in bytes; 0 if there is none."""
        return self._info(file).size or 0

    @_insisting
    def _info(self, file: str) -> fs.FileInfo:
        return self.filesystem.get_file_info(f"{self.path}/{file}".rstrip("/"))

    @_insisting
    def children(self) -> list[str]:
        """Names of the files and folders directly within, sorted; empty if there is no folder."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    @_insisting
    def read_bytes(self, file: str) -> bytes:
        """A file's content; raises FileNotFoundError if there is none."""
        with self.filesystem.open_input_stream(f"{self.path}/{file}", compression=None) as stream:
            content: bytes = stream.read()
            return content

    def read_json(self, file: str) -> Any:
        """A JSON file's content; raises `StorageError` naming the file if it is not JSON."""
        content = self.read_bytes(file)
        try:
            return json.loads(content)
        except ValueError as error:
            raise StorageError(f"{self}/{file} is damaged: {error}") from None

    @_insisting
    def write_bytes(self, file: str, content: bytes | memoryview) -> None:
        """Create or replace a file in one atomic step, making folders as needed."""
        path = f"{self.path}/{file}"
        self.filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        # Object stores show an object only once it is complete; a local file needs a rename.
        target = f"{path}.{uuid.uuid4().hex}.tmp" if self.is_local else path
        try:
            with self.filesystem.open_output_stream(target, compression=None) as stream:
                stream.write(content)
            if target != path:
                Path(target).replace(path)
        except OSError:
            if target != path:  # On a full disk, what was written of it only takes up room.
                Path(target).unlink(missing_ok=True)
            raise

    def write_json(self, file: str, content: Any) -> None:
        """Create or replace a JSON file in one atomic step. NaN and infinities are refused."""
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_bytes(file, text.encode() + b"\n")

    @_insisting
    def delete(self) -> None:
        """Delete the folder and all in it; nothing happens if there is none."""
        if self.exists():
            self.filesystem.delete_dir(self.path)

    @_insisting
    def delete_file(self, file: str) -> None:
        """Delete a file; nothing happens if there is none."""
        if self.exists(file):
            self.filesystem.delete_file(f"{self.path}/{file}")

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """The folder as a local path: itself if it is local, else a temporary download."""
        if self.is_local:
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory() as temporary:
            fs.copy_files(self.path, temporary, source_filesystem=self.filesystem)
            yield Path(temporary)

    @_insisting
    def upload(self, local: Path) -> None:
        """Copy a local folder's content into this one."""
        self.filesystem.create_dir(self.path, recursive=True)
        fs.copy_files(str(local), self.path, destination_filesystem=self.filesystem)

    @contextmanager
    def created_whole(
        self, marker: str, *, replace: bool = True, key: str = ""
    ) -> Iterator[Folder]:
        """Fill a new folder that comes into being whole or not at all.

        Yields a folder with a temporary name beside this one. If the body succeeds it takes this
        one's place, without its children whose names begin with a dot; if it fails it is deleted.
        On a local disk that is one rename; on an object store the file `marker`, whose presence
        means the folder is complete, is copied last. Without `replace`, raises `StorageError` if
        there is such a folder by then.

        With a `key` (hexadecimal) the temporary folder is the same whenever the key is, and only a
        `UserError` that is not resumable deletes it: after anything else, the next body finds what
        this one has written.
        """
        draft = self.parent / f".{self.name}.{key or uuid.uuid4().hex[:8]}.partial"
        draft.filesystem.create_dir(draft.path, recursive=True)
        try:
            yield draft
            if not replace and self.exists(marker):
                raise StorageError(f"{self} has come into being meanwhile: run the command again")
            if self.is_local:
                self._replace_locally(draft)
            else:
                self._replace_remotely(draft, marker)
        except BaseException as error:
            if not key or (isinstance(error, UserError) and not error.resumable):
                draft.delete()
            raise
        draft.delete()

    def delete_drafts(self) -> None:
        """Delete what `created_whole` left beside this folder when its process was killed."""
        name = re.compile(rf"\.{re.escape(self.name)}\.[0-9a-f]+\.(partial|old)")
        for child in self.parent.children():
            if name.fullmatch(child):
                (self.parent / child).delete()

    def _replace_locally(self, draft: Folder) -> None:
        for child in draft.children():
            if child.startswith("."):
                (draft / child).delete()
        old = self.parent / f".{self.name}.{uuid.uuid4().hex[:8]}.old"
        if self.exists():
            Path(self.path).rename(old.path)
        Path(draft.path).rename(self.path)
        shutil.rmtree(old.path, ignore_errors=True)

    def _replace_remotely(self, draft: Folder, marker: str) -> None:
        self.delete()
        selector = fs.FileSelector(draft.path, recursive=True)
        files = [
            info.path.removeprefix(draft.path)
            for info in draft.filesystem.get_file_info(selector)
            if info.type == fs.FileType.File
        ]

        def copy(file: str) -> None:
            draft.filesystem.copy_file(draft.path + file, self.path + file)

        with ThreadPoolExecutor(16) as pool:
            taken = [file for file in files if not file.startswith("/.") and file != f"/{marker}"]
            list(pool.map(copy, taken))
        copy(f"/{marker}")
