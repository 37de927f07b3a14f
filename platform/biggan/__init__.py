"""BigGAN on Ray: from a folder of labelled images to an autoscaling endpoint.

The public API, imported on first use, so that an application that only calls an endpoint loads
neither torch nor Ray:

    train           train a run, or resume it
    sweep           search hyper-parameters
    evaluate        FID of a run, a checkpoint or a model
    promote         export the best generator to the model store
    load_generator  a generator from the model store
    presets         named recipes
    Client          an endpoint's HTTP client
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biggan import presets as presets
    from biggan.client import Client as Client
    from biggan.distributed import train as train
    from biggan.evaluation import evaluate as evaluate
    from biggan.models import load_generator as load_generator
    from biggan.promotion import promote as promote
    from biggan.search import sweep as sweep

# Ray reads these when it is imported. Its colours and "repeated 3x across cluster" summaries would
# garble progress lines, and its way of catching prints would show each of them twice.
os.environ.setdefault("RAY_COLOR_PREFIX", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

_HOMES = {
    "train": "biggan.distributed",
    "sweep": "biggan.search",
    "evaluate": "biggan.evaluation",
    "promote": "biggan.promotion",
    "load_generator": "biggan.models",
    "Client": "biggan.client",
}

__all__ = ["Client", "evaluate", "load_generator", "presets", "promote", "sweep", "train"]


def __getattr__(name: str) -> Any:
    if name == "presets":
        return importlib.import_module("biggan.presets")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'biggan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
