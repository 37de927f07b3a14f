"""What each training step consumes: real images in order, and latents, this worker's share of them.

Draws are made for the whole batch and then shared out, so that two workers of 32 see together
exactly what one worker of 64 sees.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from biggan.augmentation import NOISE
from biggan.config import ConfigError, RunConfig
from biggan.data.dataset import Dataset, ShuffledOrder
from biggan.latents import Stream, rng
from biggan.parallel import Workers
from biggan.pixels import from_uint8
from biggan.training import Fakes, Reals, StepInputs


def check_batch(config: RunConfig, workers: int) -> None:
    """Raise `ConfigError` unless the batch divides among workers and accumulated micro-batches."""
    optim = config.optim
    parts = optim.accumulation * workers
    if optim.batch_size % parts:
        near = max(round(optim.batch_size / parts), 1) * parts
        raise ConfigError(
            f"optim.batch_size = {optim.batch_size}: does not divide among {workers} workers x"
            f" {optim.accumulation} accumulated micro-batches; try {near}"
        )


class Batches:
    """Makes the inputs of any step; a pure function of configuration, dataset and step number."""

    def __init__(self, config: RunConfig, dataset: Dataset, workers: Workers) -> None:
        """Raises `ConfigError` if the batch does not divide among workers and accumulation."""
        check_batch(config, workers.size)
        self.config = config
        self.dataset = dataset
        self.workers = workers
        self.order = ShuffledOrder(len(dataset), config.seed)
        accumulation = config.optim.accumulation
        each = config.optim.batch_size // (accumulation * workers.size)
        # Micro-batch k of all workers together is the k-th slice of the batch, so that batch-norm
        # moments do not depend on the number of workers.
        starts = [(k * workers.size + workers.rank) * each for k in range(accumulation)]
        self.slices = [slice(start, start + each) for start in starts]

    def inputs(self, step: int) -> StepInputs:
        """This worker's share of what step number `step` (from 0) consumes."""
        config, optim = self.config, self.config.optim
        flips, latents, noise, g_latents, g_noise = (
            rng(config.seed, stream, step)
            for stream in (
                Stream.FLIPS,
                Stream.D_LATENTS,
                Stream.D_NOISE,
                Stream.G_LATENTS,
                Stream.G_NOISE,
            )
        )
        d = []
        for k in range(optim.num_D_steps):
            position = step * config.step_images + k * optim.batch_size
            reals = self._reals(position, flips, noise)
            d.append(list(zip(reals, self._fakes(latents, noise), strict=True)))
        return StepInputs(d=d, g=self._fakes(g_latents, g_noise))

    def _reals(
        self, position: int, flips: np.random.Generator, noise: np.random.Generator
    ) -> list[Reals]:
        indices = self.order.indices(position, self.config.optim.batch_size)
        flipped = flips.random(len(indices)) < 0.5
        drawn = self._noise(noise)
        return [
            self._load(indices[part], flipped[part], some)
            for part, some in zip(self.slices, drawn, strict=True)
        ]

    def _load(self, indices: np.ndarray, flipped: np.ndarray, noise: Tensor | None) -> Reals:
        device = self.workers.device
        index = torch.from_numpy(indices)
        images = from_uint8(self.dataset.images[index].to(device, non_blocking=True))
        if self.config.data.flip:
            mirror = torch.from_numpy(flipped).to(device)[:, None, None, None]
            images = torch.where(mirror, images.flip(3), images)
        return Reals(images, self.dataset.labels[index].to(device), noise)

    def _fakes(self, latents: np.random.Generator, noise: np.random.Generator) -> list[Fakes]:
        n, z_dim = self.config.optim.batch_size, self.config.model.z_dim
        z = torch.from_numpy(latents.standard_normal((n, z_dim), dtype=np.float32))
        labels = self.dataset.class_sampler.draw(latents, n)
        return [
            Fakes(self._here(z[part]), self._here(labels[part]), some)
            for part, some in zip(self.slices, self._noise(noise), strict=True)
        ]

    def _noise(self, generator: np.random.Generator) -> list[Tensor | None]:
        """What augmentation draws for a batch, in this worker's micro-batches."""
        if not self.config.needs_noise:
            return [None] * len(self.slices)
        drawn = generator.random((self.config.optim.batch_size, NOISE), dtype=np.float32)
        return [self._here(torch.from_numpy(drawn[part])) for part in self.slices]

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.workers.device, non_blocking=True)
