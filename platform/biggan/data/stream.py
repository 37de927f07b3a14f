"""Reading in a stream: Ray Data decodes ahead of training what would not fit in memory.

An epoch's order is dealt out in windows of whole parts (`biggan.data.order.WindowedOrder`). Each
worker runs a pipeline of its own over the windows, in order; a task reads a window's parts and
decodes the rows that fall to the worker. So every worker reads every part of an epoch once, in its
encoded form: W workers read W times the dataset's bytes from storage, each decodes one W-th of it.
A few windows are ready or on their way at a time, the rest waits.

Resuming at a position begins at the window that holds it, and skips what comes before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import DataContext, ExecutionResources
from torch import Tensor

from biggan.cluster import quiet_ray_data
from biggan.config import RunConfig
from biggan.data.dataset import Dataset
from biggan.data.order import WindowedOrder

AHEAD = 3
"""Windows, of a worker's rows, that are kept ready in Ray's object store."""
TASKS = 2
"""Windows that are read at a time for each worker."""
WINDOWS_PER_PIPELINE = 512
"""A pipeline is planned over so many windows; the next one is begun after its last."""


class StreamReader:
    """Reads this worker's share of batches, one after the other; a `biggan.data.reading.Reader`."""

    def __init__(self, config: RunConfig, dataset: Dataset, share: np.ndarray) -> None:
        """`share` are offsets into a batch, ascending. Nothing is read before it is asked for."""
        stored = dataset.stored
        image_bytes = stored.nbytes // max(1, len(stored))
        window = int(config.data.window_mib * 2**20) // image_bytes
        self.order = WindowedOrder(stored.counts.tolist(), window, config.seed)
        self.batch_size = config.optim.batch_size
        self.share = share
        self.labels = dataset.labels.numpy()
        self._stored = stored
        self._next_start = -1
        self._blocks: Iterator[dict[str, np.ndarray]] = iter(())
        self._block: dict[str, np.ndarray] = {}
        self._used = 0

    def read(self, start: int) -> tuple[Tensor, Tensor]:
        """Images (uint8) and class ids of the share of the batch that begins at a position."""
        wanted = start + self.share
        if start != self._next_start:
            self._begin(int(wanted[0]))
        positions, indices, images = self._take(len(wanted))
        assert np.array_equal(positions, wanted), "a stream keeps to its order"
        self._next_start = start + self.batch_size
        return torch.from_numpy(images), torch.from_numpy(self.labels[indices])

    def close(self) -> None:
        """End the pipeline."""
        self._blocks, self._block, self._next_start = iter(()), {}, -1

    def _begin(self, position: int) -> None:
        """Start a pipeline at the window that holds a position, and skip to it."""
        self.close()
        self._blocks = self._windows(self.order.window_at(position))
        self._block = next(self._blocks)
        while not np.any(self._block["position"] >= position):
            self._block = next(self._blocks)
        self._used = int(np.argmax(self._block["position"] >= position))

    def _take(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next n rows: positions, image indices, images."""
        pieces = []
        while n:
            if self._used == len(self._block["position"]):
                self._block, self._used = next(self._blocks), 0
            rows = slice(self._used, self._used + n)
            pieces.append([self._block[key][rows] for key in ("position", "index", "image")])
            taken = len(pieces[-1][0])
            self._used, n = self._used + taken, n - taken
        # Copied, since blocks lie in Ray's object store, where they cannot be written to.
        positions, indices, images = (
            np.concatenate(column) for column in zip(*pieces, strict=True)
        )
        return positions, indices, images

    def _windows(self, first: int) -> Iterator[dict[str, np.ndarray]]:
        """The worker's rows of each window from one on, without end, in one block or several."""
        while True:
            with DataContext.current(self._context()):
                plan = ray.data.from_items(
                    [{"window": first + i} for i in range(WINDOWS_PER_PIPELINE)],
                    override_num_blocks=WINDOWS_PER_PIPELINE,
                )
                # No CPU is claimed: where the workers have claimed all, tasks would wait for ever.
                windows = plan.map_batches(
                    self._task(), batch_size=None, num_cpus=0, concurrency=TASKS
                )
                blocks = windows.iter_batches(batch_size=None)
            yield from blocks
            first += WINDOWS_PER_PIPELINE

    def _task(self) -> Any:
        """What reads one window; holds what it needs, and not the reader."""
        order, stored = self.order, self._stored
        mine = np.zeros(self.batch_size, dtype=bool)
        mine[self.share] = True

        def read(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            start, indices = order.window(int(batch["window"][0]))
            positions = start + np.arange(len(indices))
            here = mine[positions % len(mine)]
            return {
                "position": positions[here],
                "index": indices[here],
                "image": stored.take(indices[here]),
            }

        return read

    def _context(self) -> DataContext:
        quiet_ray_data()
        context = DataContext.get_current().copy()
        options = context.execution_options
        options.preserve_order = True
        rows = int(self.order.counts.max()) * self.order.parts_per_window
        nbytes = rows * self._stored.nbytes // max(1, len(self._stored))
        options.resource_limits = ExecutionResources(
            object_store_memory=AHEAD * max(1, nbytes * len(self.share) // self.batch_size)
        )
        return context
