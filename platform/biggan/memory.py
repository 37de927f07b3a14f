"""Memory: what to do when a batch does not fit, and how to keep the system from taking it back."""

from __future__ import annotations

import ctypes
import gc

import torch

from biggan.config import RunConfig
from biggan.errors import UserError
from biggan.storage import Folder

ACCUMULATION = "accumulation.json"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # Of glibc's malloc.h.


class DoesNotFitError(UserError):
    """A micro-batch does not fit in memory; says which one would."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or off it."""
    # The third is oneDNN's, when there is no room for its code or scratch memory.
    said = (
        "can't allocate memory",
        "out of memory",
        "could not create a primitive",
        "bad_alloc",
        "ALLOC_FAILED",
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    )


def with_fitting_accumulation(config: RunConfig, run: Folder) -> RunConfig:
    """The configuration with the accumulation that an attempt before found necessary."""
    if not run.exists(ACCUMULATION):
        return config
    accumulation = run.read_json(ACCUMULATION)["accumulation"]
    return with_accumulation(config, max(config.optim.accumulation, accumulation))


def with_accumulation(config: RunConfig, accumulation: int) -> RunConfig:
    """The same optimizer's batch in more and smaller micro-batches."""
    return config.override({"optim.accumulation": accumulation})


def remember_accumulation(run: Folder, accumulation: int) -> None:
    """Let this attempt and those after it accumulate so often."""
    run.write_json(ACCUMULATION, {"accumulation": accumulation})


def smaller_accumulations(config: RunConfig, workers: int) -> list[int]:
    """Accumulations with smaller micro-batches than the configured, the least first.

    Batch norm needs two images in each micro-batch.
    """
    share = config.optim.batch_size // workers
    return [a for a in range(config.optim.accumulation + 1, share // 2 + 1) if share % a == 0]


def free_unused_memory() -> None:
    """Give back what nothing refers to any more, and what torch or the C library keep of it."""
    gc.collect()
    if libc := _glibc():
        libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Have the C library keep freed memory: a step needs the same again, and page faults are dear.

    For glibc; elsewhere nothing happens. The gain is in `benchmarks/README.md`.
    """
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") else None
