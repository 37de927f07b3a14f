"""A dataset's images decoded, once a machine: a file that is mapped into memory.

The file holds the pixels alone, uint8 `[N, C, H, W]`. All processes of a machine share it through
the page cache, so that it takes memory once, and a second run begins at once. It lies in
`decoded/KEY.u8` in the machine's cache folder (`storage.cache_folder`); KEY stands for the
dataset's description and the names and sizes of its parts. Decoded data may take $BIGGAN_CACHE_GIB
there, by default half of what would be free without it; those that were not used for longest go
first.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from biggan.data.parts import StoredImages
from biggan.errors import UserError
from biggan.storage import StorageError, cache_folder

IN_MEMORY = 64 * 2**20
"""Decoded data no larger than this stays in each process's own memory: decoding it again takes
about a second, which no file left behind is worth."""
SAY_EVERY_SECONDS = 5.0
GIB = 2**30


def fits(nbytes: int) -> bool:
    """Whether decoded images of that many bytes have room on this machine.

    On the disk of the cache, and in $BIGGAN_MEMORY_GIB of memory, by default half of what is
    available.
    """
    limit = _gib_from("BIGGAN_MEMORY_GIB")
    if nbytes > (available_memory() // 2 if limit is None else limit):
        return False
    return nbytes <= IN_MEMORY or nbytes <= cache_limit()


def available_memory() -> int:
    """Bytes that this machine, or the container, has for a process; without limit if unknown."""
    found = [2**63 - 1]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        _, _, rest = meminfo.read_text().partition("MemAvailable:")
        found.append(int(rest.split()[0]) * 1024)
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (text := container.read_text().strip()) != "max":
        found.append(int(text))
    return min(found)


def cache_limit() -> int:
    """Bytes that decoded data may take altogether."""
    if (limit := _gib_from("BIGGAN_CACHE_GIB")) is not None:
        return limit
    folder = _made(cache_folder() / "decoded")
    disk = os.statvfs(folder)
    return (disk.f_bavail * disk.f_frsize + sum(_entries(folder).values())) // 2


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"decoded images cannot be kept in {folder} ({error}): set BIGGAN_CACHE to a folder"
            " that can be written to"
        ) from None
    return folder


def _gib_from(variable: str) -> int | None:
    if not (text := os.environ.get(variable)):
        return None
    try:
        return int(float(text) * GIB)
    except ValueError:
        raise UserError(f"{variable} is {text!r}: must be a number of GiB, such as 200") from None


def load(stored: StoredImages, key: str, progress: Callable[[str], None] | None = None) -> Tensor:
    """All of the images decoded: uint8 `[N, C, H, W]`, which must not be written to.

    Raises `StorageError` if there is no room for them.
    """
    if stored.nbytes <= IN_MEMORY:
        return torch.from_numpy(np.concatenate(list(stored.parts())))
    file = _made(cache_folder() / "decoded") / f"{key}.u8"
    with _locked(file):
        if not (file.exists() and file.stat().st_size == stored.nbytes):
            _make_room(file, stored)
            _decode(stored, file, progress or (lambda _line: None))
        os.utime(file)  # Used now.
        # A private mapping of a file that nobody writes to: read-only, without torch's warning.
        flat = torch.from_file(str(file), shared=False, size=stored.nbytes, dtype=torch.uint8)
    return flat.view(stored.shape)


def _decode(stored: StoredImages, file: Path, progress: Callable[[str], None]) -> None:
    """Write the file in one atomic step; only the holder of its lock does."""
    draft = file.with_suffix(".partial")
    begin = said = time.monotonic()
    done, name = 0, stored.folder.name
    try:
        with draft.open("wb") as out:
            for images in stored.parts():
                out.write(images.data)
                done += len(images)
                if (now := time.monotonic()) - said >= SAY_EVERY_SECONDS or done == len(stored):
                    said, rate = now, done / max(now - begin, 1e-9)
                    progress(
                        f"decoding {name} for this machine: {done:,}/{len(stored):,} images,"
                        f" {rate:,.0f} images/s"
                    )
            out.flush()
            os.fsync(out.fileno())
        draft.replace(file)
    except OSError as error:
        raise StorageError(
            f"dataset {stored.folder} could not be decoded to {file}, which needs"
            f" {stored.nbytes / GIB:.3g} GiB ({error}): make room there, set BIGGAN_CACHE to"
            " another disk, or set data.mode to stream"
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def _make_room(file: Path, stored: StoredImages) -> None:
    """Delete what was not used for longest, until `stored` has room in the cache."""
    limit = cache_limit()
    if stored.nbytes > limit:
        raise StorageError(
            f"dataset {stored.folder} takes {stored.nbytes / GIB:.3g} GiB decoded, and"
            f" {file.parent} has room for {limit / GIB:.3g}: set BIGGAN_CACHE to a larger disk,"
            " raise BIGGAN_CACHE_GIB, or set data.mode to stream"
        )
    entries = {path: size for path, size in _entries(file.parent).items() if path.stem != file.stem}
    used = stored.nbytes + sum(entries.values())
    for path, size in entries.items():
        if used <= limit:
            break
        # Whoever has it mapped keeps it until it lets go; whoever is making it holds the lock.
        with _locked(path, wait=False) as mine:
            if mine:
                path.unlink(missing_ok=True)
                used -= size


def _entries(folder: Path) -> dict[Path, int]:
    """The cache's files and their sizes, those not used for longest first."""
    found = []
    for path in folder.iterdir():
        if path.suffix in (".u8", ".partial"):
            try:
                status = path.stat()
            except FileNotFoundError:  # Another process has just removed it.
                continue
            found.append((status.st_mtime, path, status.st_size))
    return {path: size for _, path, size in sorted(found)}


@contextmanager
def _locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of an entry, among the processes of this machine; yields whether it is held.

    The lock ends with its holder, however that ends. Its empty file stays.
    """
    with file.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
