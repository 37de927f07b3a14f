"""How a run reads its images: from memory or in a stream, in which order, in what proportions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from biggan.config import ConfigError, RunConfig
from biggan.data import decoded
from biggan.data.dataset import Dataset, DatasetInfo, Mode
from biggan.data.order import BalancedOrder, Order, ShuffledOrder
from biggan.parallel import Workers
from biggan.storage import Folder

READING = "reading.json"


class Reader(Protocol):
    """Reads this worker's share of batches of real images."""

    def read(self, start: int) -> tuple[Tensor, Tensor]:
        """Images (uint8) and class ids of the share of the batch that begins at a position."""

    def close(self) -> None:
        """Let go of what reads ahead."""


OpenStream = Callable[[RunConfig, Dataset, np.ndarray], Reader]
"""Makes a `Reader` that streams; the last argument is the share, as offsets into a batch,
ascending. `biggan.data.stream.StreamReader` is one; it needs Ray, which nothing here does."""


class MemoryReader:
    """Reads images that are in memory, from any position at once."""

    def __init__(self, config: RunConfig, dataset: Dataset, share: np.ndarray) -> None:
        """`share` are offsets into a batch."""
        self.order = _order(config, dataset)
        self.batch_size = config.optim.batch_size
        self.share = share
        self.labels = dataset.labels
        # NumPy gathers in one thread, and so leaves the others to the step that runs meanwhile.
        self.pixels = np.asarray(dataset.images)

    def read(self, start: int) -> tuple[Tensor, Tensor]:
        """Images (uint8) and class ids of the share of the batch that begins at a position."""
        indices = self.order.indices(start, self.batch_size)[self.share]
        images = torch.from_numpy(self.pixels.take(indices, axis=0))
        return images, self.labels[torch.from_numpy(indices)]

    def close(self) -> None:
        """Nothing reads ahead."""


def _order(config: RunConfig, dataset: Dataset) -> Order:
    if config.data.balance == "off":
        return ShuffledOrder(len(dataset), config.seed)
    return BalancedOrder(dataset.labels.numpy(), config.data.balance, config.seed)


def open_reader(
    config: RunConfig, dataset: Dataset, share: np.ndarray, stream: OpenStream | None
) -> Reader:
    """The reader that configuration and dataset ask for; raises `ConfigError` without a `stream`.

    Where the configuration leaves the mode open, it is the one that the dataset was opened with.
    """
    mode = dataset.mode if config.data.mode == "auto" else config.data.mode
    if mode == "memory":
        return MemoryReader(config, dataset, share)
    _check_balance(config, dataset.stored.nbytes)
    if stream is None:
        raise ConfigError(
            "data.mode is stream, which reads with Ray Data: train with `biggan.train` or"
            " jobs/train.py, or set data.mode to memory"
        )
    return stream(config, dataset, share)


def _check_balance(config: RunConfig, nbytes: int) -> None:
    if config.data.balance != "off":
        raise ConfigError(
            f"data.balance = {config.data.balance!r} needs the dataset in memory, where its"
            f" {nbytes / decoded.GIB:.3g} GiB do not fit: set data.mode to memory to map them from"
            " disk all the same, or data.balance to off"
        )


def with_settled_mode(
    config: RunConfig, info: DatasetInfo, run: Folder, workers: Workers
) -> RunConfig:
    """The configuration with `data.mode` no longer open: what the run began with, now and later.

    A run that has just begun reads from memory if every worker's machine has room for that.
    """
    if config.data.mode != "auto":
        return config
    remembered = run.read_json(READING)["mode"] if run.exists(READING) else ""
    mode = workers.agree(remembered) or _settle(config, info, workers)
    if workers.is_main and not remembered:
        run.write_json(READING, {"mode": mode})
    return config.override({"data.mode": mode})


def _settle(config: RunConfig, info: DatasetInfo, workers: Workers) -> Mode:
    nbytes = info.n_images * info.channels * info.resolution**2
    lacking = torch.tensor(0.0 if decoded.fits(nbytes) else 1.0, device=workers.device)
    mode: Literal["memory", "stream"] = "stream" if workers.sum(lacking).item() else "memory"
    if mode == "stream":
        _check_balance(config, nbytes)
    return mode
