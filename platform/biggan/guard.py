"""Sees a collapse while it happens, from signals of the networks themselves.

Section 4 of the paper: before a GAN collapses, the largest singular values of its weights run
away, D tells real from fake without fail, or G's images of a class come to be all alike. FID shows
the same only later. Readings are taken ten times a window; a window is a thousand
steps unless the configuration says otherwise, and the first one is a respite, in which everything
still moves fast.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from biggan.config import RunConfig
from biggan.data.dataset import Dataset
from biggan.latents import Stream, rng
from biggan.layers import spectral_norms
from biggan.networks import Generator
from biggan.parallel import Workers
from biggan.pixels import from_uint8
from biggan.training import TrainState

READINGS = 10
"""Readings a window."""
WINDOW_STEPS = 1000
"""Length of a window whose length is not configured."""
CLASSES, IMAGES = 8, 8
"""Classes looked at, and images of each."""
REALS = 16_384
"""The real images that these are held against are among the first so many, which are a sample:
datasets are stored shuffled, and a stream has no others at hand."""


class Reading(BaseModel):
    """The signals at one moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kimg: float
    sigma: dict[str, float]
    """Largest singular value of every layer's raw weight, by `G.` or `D.` and the layer's name."""
    accuracy_real: float
    """Part of the real images since the reading before that D took for real."""
    accuracy_fake: float
    """Part of the fakes since the reading before that D took for fake."""
    class_variance: float
    """Pixel variance of fakes within a class, as a part of that of the real images."""


class GuardState(BaseModel):
    """What the guard remembers; part of every checkpoint."""

    model_config = ConfigDict(extra="forbid")

    readings: list[Reading] = []
    """Those of the last window, oldest first."""
    accuracies: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """D's accuracies on real and fake summed since the last reading, and the steps."""
    calm: bool = True
    """Whether the last reading was far from every limit: a good place to return to."""


class Guard:
    """Takes readings in the course of a run, and says which signal, if any, tells of a collapse."""

    def __init__(self, config: RunConfig, dataset: Dataset, workers: Workers) -> None:
        """`dataset` is what the variance of fakes is held against."""
        self.limits = config.collapse
        self.workers = workers
        default = WINDOW_STEPS * config.step_images / 1000
        self.window_kimg = config.collapse.window_kimg or default
        self.every_kimg = self.window_kimg / READINGS
        sample = dataset.labels[:REALS]
        counts = torch.bincount(sample, minlength=len(dataset.info.classes))
        self.classes = _classes_to_watch(counts.tolist())
        self.real_variance = _real_variance(dataset, self.classes)

    def count(self, state: GuardState, measured: Mapping[str, float]) -> None:
        """Note a step's accuracies of D."""
        real, fake, steps = state.accuracies
        state.accuracies = (
            real + measured["accuracy_real"],
            fake + measured["accuracy_fake"],
            steps + 1,
        )

    def read(self, training: TrainState, state: GuardState) -> str:
        """Take a reading; returns the signal that fired with its figures, or nothing."""
        real, fake, steps = state.accuracies
        reading = Reading(
            kimg=training.kimg,
            sigma=singular_values(training, self.workers),
            accuracy_real=real / max(steps, 1),
            accuracy_fake=fake / max(steps, 1),
            class_variance=self._class_variance(training.G),
        )
        state.accuracies = (0.0, 0.0, 0.0)
        since = training.kimg - self.window_kimg * (1 + 1e-9)
        state.readings = [r for r in state.readings if r.kimg >= since] + [reading]
        state.calm = not self._signal(state.readings, caution=True)
        return self._signal(state.readings)

    def _signal(self, readings: list[Reading], caution: bool = False) -> str:
        """With `caution`, limits are half-way, and there is no respite at the beginning."""
        limits, now = self.limits, readings[-1]
        half = 0.5 if caution else 1.0
        if not caution and now.kimg <= self.window_kimg:
            return ""
        layer, growth = sigma_growth(readings)
        if growth > limits.sigma_growth**half:
            return (
                f"the largest singular value of {layer} grew {growth:.1f} times over, to"
                f" {now.sigma[layer]:.3g}, within {self.window_kimg:g} kimg"
                f" (collapse.sigma_growth {limits.sigma_growth:g})"
            )
        if now.class_variance < limits.class_variance / half:
            return (
                f"images of a class vary {now.class_variance:.4f} times as much as the real ones"
                f" (collapse.class_variance {limits.class_variance:g})"
            )
        judged = readings[-1:] if caution else readings
        accuracy = min(min(r.accuracy_real, r.accuracy_fake) for r in judged)
        # Where a window is a few steps long, it holds fewer readings.
        whole = now.kimg - readings[0].kimg >= 0.8 * self.window_kimg
        if accuracy >= limits.d_accuracy and (caution or whole):
            return (
                f"D told real from fake in {accuracy:.2%} of all cases or more for"
                f" {self.window_kimg:g} kimg (collapse.d_accuracy {limits.d_accuracy:g})"
            )
        return ""

    @torch.no_grad()
    def _class_variance(self, G: Generator) -> float:
        """Of the same latents and classes every time; the mean over workers, so that all agree."""
        draws = rng(0, Stream.GUARD)
        z = torch.from_numpy(
            draws.standard_normal((len(self.classes) * IMAGES, G.z_dim), dtype=np.float32)
        )
        ids = torch.tensor(self.classes).repeat_interleave(IMAGES)
        device = self.workers.device
        was_training = G.training
        G.eval()
        images = G(z.to(device), ids.to(device)).float()
        G.train(was_training)
        variance = _variance_within(images.unflatten(0, (len(self.classes), IMAGES)))
        return float(self.workers.mean(variance)) / max(self.real_variance, 1e-12)


def sigma_growth(readings: list[Reading]) -> tuple[str, float]:
    """The layer whose singular value grew most since its least one in the readings, and how far."""
    now = readings[-1].sigma
    growth = {name: now[name] / max(min(r.sigma[name] for r in readings), 1e-12) for name in now}
    layer = max(growth, key=lambda name: growth[name])
    return layer, growth[layer]


def singular_values(training: TrainState, workers: Workers) -> dict[str, float]:
    """Estimated largest singular value of every layer of G and D; the mean over workers."""
    layers = {
        f"{name}.{layer}": norm
        for name, network in (("G", training.G), ("D", training.D))
        for layer, norm in spectral_norms(network).items()
    }
    values = workers.mean(torch.stack([norm.estimate().float() for norm in layers.values()]))
    return dict(zip(layers, values.tolist(), strict=True))


def _classes_to_watch(counts: list[int]) -> list[int]:
    """Classes with enough images to have a variance, spread evenly; all if there are few."""
    enough = [k for k, count in enumerate(counts) if count >= 2] or list(range(len(counts)))
    n = min(CLASSES, len(enough))
    return [enough[i * len(enough) // n] for i in range(n)]


def _real_variance(dataset: Dataset, classes: list[int]) -> float:
    variances = []
    for k in classes:
        some = (dataset.labels[:REALS] == k).nonzero()[:256, 0]
        variances.append(_variance_within(from_uint8(dataset.images[some])[None]))
    return float(torch.stack(variances).mean())


def _variance_within(images: Tensor) -> Tensor:
    """The mean over classes and pixels of the variance of `[classes, images, C, H, W]`."""
    return images.var(1, correction=0).mean()
