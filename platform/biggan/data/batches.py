"""What each training step consumes: real images in order, and latents, this worker's share of them.

Draws are made for the whole batch and then shared out, so that two workers of 32 see together
exactly what one worker of 64 sees. Images travel to the device as bytes, and are scaled and
mirrored there.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from biggan.augmentation import NOISE
from biggan.config import ConfigError, RunConfig
from biggan.data.dataset import Dataset
from biggan.data.order import quotas
from biggan.data.reading import OpenStream, open_reader
from biggan.latents import ClassSampler, Stream, rng
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


@dataclass(frozen=True)
class Bytes:
    """Real images on the device as they are stored, with what is still to be done to them."""

    images: Tensor
    """uint8 `[n, C, H, W]`."""
    mirror: Tensor | None
    """Which of them to mirror: bool `[n]`; None if that is off."""
    labels: Tensor
    noise: Tensor | None

    def to_reals(self) -> Reals:
        """The images as D sees them."""
        images = from_uint8(self.images)
        if self.mirror is not None:
            images = torch.where(self.mirror[:, None, None, None], images.flip(3), images)
        return Reals(images, self.labels, self.noise)


@dataclass(frozen=True)
class Loaded:
    """A step's inputs as they arrive on the device."""

    d: list[list[tuple[Bytes, Fakes]]]
    g: list[Fakes]

    def to_inputs(self) -> StepInputs:
        """The inputs, ready for use."""
        return StepInputs(
            d=[[(real.to_reals(), fakes) for real, fakes in batch] for batch in self.d], g=self.g
        )

    def tensors(self) -> list[Tensor]:
        """All that it consists of."""
        parts = [part for batch in self.d for pair in batch for part in pair] + self.g
        return [t for part in parts for t in vars(part).values() if t is not None]


class Batches:
    """Makes the inputs of any step; a pure function of configuration, dataset and step number."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        workers: Workers,
        stream: OpenStream | None = None,
    ) -> None:
        """Raises `ConfigError` if the batch does not divide among workers and accumulation.

        `stream` serves a dataset that is not to be in memory; without it that is a `ConfigError`.
        """
        check_batch(config, workers.size)
        self.config = config
        self.workers = workers
        accumulation = config.optim.accumulation
        each = config.optim.batch_size // (accumulation * workers.size)
        # Micro-batch k of all workers together is the k-th slice of the batch, so that batch-norm
        # moments do not depend on the number of workers.
        starts = [(k * workers.size + workers.rank) * each for k in range(accumulation)]
        self.slices = [slice(start, start + each) for start in starts]
        share = np.concatenate([np.arange(part.start, part.stop) for part in self.slices])
        self.reader = open_reader(config, dataset, share, stream)
        counts = torch.bincount(dataset.labels, minlength=len(dataset.info.classes))
        self.class_sampler = ClassSampler(quotas(counts.tolist(), config.data.balance).tolist())

    def inputs(self, step: int) -> StepInputs:
        """This worker's share of what step number `step` (from 0) consumes."""
        return self.load(step).to_inputs()

    def load(self, step: int) -> Loaded:
        """The same, but for what is left to the device."""
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
        return Loaded(d=d, g=self._fakes(g_latents, g_noise))

    def close(self) -> None:
        """Let go of what reads ahead."""
        self.reader.close()

    def _reals(
        self, position: int, flips: np.random.Generator, noise: np.random.Generator
    ) -> list[Bytes]:
        flipped = torch.from_numpy(flips.random(self.config.optim.batch_size) < 0.5)
        drawn = self._noise(noise)
        images, labels = self.reader.read(position)
        each = len(images) // len(self.slices)
        parts = zip(images.split(each), labels.split(each), self.slices, drawn, strict=True)
        return [
            Bytes(
                self._here(image),
                self._here(flipped[part]) if self.config.data.flip else None,
                self._here(label),
                some,
            )
            for image, label, part, some in parts
        ]

    def _fakes(self, latents: np.random.Generator, noise: np.random.Generator) -> list[Fakes]:
        n, z_dim = self.config.optim.batch_size, self.config.model.z_dim
        z = torch.from_numpy(latents.standard_normal((n, z_dim), dtype=np.float32))
        labels = self.class_sampler.draw(latents, n)
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
        if self.workers.device.type != "cuda":
            return tensor.to(self.workers.device)
        # Only from pinned memory does a copy run beside what the device computes.
        return tensor.pin_memory().to(self.workers.device, non_blocking=True)


class Prefetch:
    """Hands out steps' inputs; a thread makes the next step's while the device computes.

    Which step comes next is a guess, that may be wrong after a rollback: then nothing is gained.
    What goes wrong in the thread is raised where the inputs are asked for.
    """

    def __init__(self, batches: Batches, first: int) -> None:
        """Begins with step number `first`, at once."""
        self.batches = batches
        device = batches.workers.device
        # Copies go through a stream of their own, beside the kernels of the step before.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead = self._begin(first)

    def inputs(self, step: int) -> StepInputs:
        """What `Batches.inputs` gives."""
        if self._ahead[0] != step:
            self._ahead[1].cancel()
            self._ahead = self._begin(step)
        loaded = self._ahead[1].result()
        if self._copies:
            for tensor in loaded.tensors():  # Not to be used anew before this step is through.
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        inputs = loaded.to_inputs()
        self._ahead = self._begin(step + 1)
        return inputs

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.batches.close()

    def _begin(self, step: int) -> tuple[int, Future[Loaded]]:
        return step, self._thread.submit(self._load, step)

    def _load(self, step: int) -> Loaded:
        with torch.cuda.stream(self._copies) if self._copies else nullcontext():
            loaded = self.batches.load(step)
            if self._copies:
                self._copies.synchronize()  # Here, and not where the step waits.
            return loaded
