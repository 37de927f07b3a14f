"""What a machine does and how fast: memory, arithmetic, processes of one's own."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

try:
    import biggan  # noqa: F401
except ModuleNotFoundError:  # Not installed: a checkout alone will do.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from biggan.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

FRUGAL_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""One arena, and large blocks straight from and back to the system: the peak is then what was
alive at once, not what malloc kept for later."""


class BenchmarkError(UserError):
    """What was asked for cannot be measured: says what, and the mend."""


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; raises `BenchmarkError` where there is none."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise BenchmarkError("--device cuda: torch finds no GPU; use --device cpu")
    return torch.device("cuda" if cuda and name != "cpu" else "cpu")


def describe(device: torch.device) -> str:
    """The hardware, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def new_process() -> ProcessPoolExecutor:
    """A fresh process that runs what is submitted to it, with as many threads as this one."""
    threads = torch.get_num_threads()
    return ProcessPoolExecutor(
        1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    )


def in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(...)` in a fresh process, whose malloc keeps nothing."""
    os.environ.update(FRUGAL_MALLOC)
    try:
        with new_process() as child:
            return child.submit(function, *args, **kwargs).result()
    except BrokenProcessPool:
        raise BenchmarkError("its process was killed: most likely out of memory") from None
    finally:
        for name in FRUGAL_MALLOC:
            del os.environ[name]


def resident_bytes(peak: bool) -> int:
    """Memory of this process in RAM now, or the most there ever was."""
    status = Path("/proc/self/status")
    if status.exists():
        _, _, rest = status.read_text().partition("VmHWM:" if peak else "VmRSS:")
        return int(rest.split()[0]) * 1024
    # Elsewhere only the peak is known. (On Linux this one would begin at the parent's peak.)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matmul_rate(precision: str, device: torch.device) -> float:
    """FLOP a second that large matrix products of this precision sustain."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = a @ b
    rates = []
    for _ in range(5):
        synchronize()
        begin, products = time.perf_counter(), 0
        while time.perf_counter() - begin < 0.4:
            for _ in range(10 if device.type == "cuda" else 1):
                torch.mm(a, b, out=out)
                products += 1
            synchronize()
        rates.append(2 * n**3 * products / (time.perf_counter() - begin))
    return statistics.median(rates)


class FlopCounter(TorchDispatchMode):
    """Adds up FLOPs by the formulas of `torch.utils.flop_counter`, and notes what has none.

    Its own `FlopCounterMode` also follows modules, by hooks that a network run without gradient
    but with trained weights does not always survive.
    """

    PRODUCTS = frozenset({"mv", "addmv", "dot", "vdot", "addr", "linear", "mkldnn_convolution"})

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.uncounted: Counter[str] = Counter()
        """How often operators ran that have no formula."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        elif func.namespace not in ("aten", "prims", "profiler") or (
            packet.__name__ in self.PRODUCTS
        ):
            self.uncounted[packet.__name__] += 1
        return out
