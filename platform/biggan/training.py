"""One BigGAN training step: updates of D, then one of G, then the average of G's weights.

The mathematics alone. Nothing here knows of Ray, of other workers or of files: what a step
consumes comes in as `StepInputs`, and a distributed run hands in D and G wrapped so that their
gradients arrive averaged over workers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from biggan.config import RunConfig
from biggan.losses import LOSSES, add_orthogonal_gradient, regularized_weights
from biggan.networks import Discriminator, Generator

T = TypeVar("T")


@dataclass(frozen=True)
class Fakes:
    """What G is asked for: latents `[n, z_dim]` and class ids `[n]`."""

    z: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Reals:
    """Images in [-1, 1], `[n, C, H, W]`, and their class ids `[n]`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class StepInputs:
    """Everything random or real that one step consumes, already this worker's share."""

    d: list[list[tuple[Reals, Fakes]]]
    """For each update of D its micro-batches."""
    g: list[Fakes]
    """The micro-batches of G's update."""


@dataclass
class TrainState:
    """All that training changes."""

    G: Generator
    D: Discriminator
    G_ema: Generator
    optim_G: torch.optim.Adam
    optim_D: torch.optim.Adam
    step: int = 0
    images_seen: int = 0

    @property
    def kimg(self) -> float:
        """Thousand real images shown to D so far."""
        return self.images_seen / 1000


def build(
    config: RunConfig, *, resolution: int, channels: int, n_classes: int, device: torch.device
) -> TrainState:
    """Networks and optimizers at step 0; initial weights depend on `config.seed` alone."""
    shape = {"resolution": resolution, "channels": channels, "n_classes": n_classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        G = Generator(config.model, **shape).to(device)
        D = Discriminator(config.model, **shape).to(device)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)

    def adam(network: nn.Module, lr: float) -> torch.optim.Adam:
        optim = config.optim
        return torch.optim.Adam(
            network.parameters(), lr=lr, betas=(optim.beta1, optim.beta2), eps=optim.eps
        )

    return TrainState(G, D, G_ema, adam(G, config.optim.lr_g), adam(D, config.optim.lr_d))


class TrainStep:
    """Advances a `TrainState` by one step a call."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        parallel: Callable[[nn.Module], nn.Module] = lambda network: network,
    ) -> None:
        """`parallel` wraps a network so that its backward averages gradients over workers."""
        self.config = config
        self.state = state
        self.loss = LOSSES[config.loss.name]
        # The updates run through these; all else uses the bare networks, since a wrapped network
        # must not be run forward twice before one backward.
        self.D_update = parallel(state.D)
        self.G_update = parallel(state.G)

    def __call__(self, inputs: StepInputs) -> dict[str, Tensor]:
        """One step. Returns this worker's losses of the last D update and the G update, detached.

        Keys: `loss_D`, `loss_G`, and the mean logits `D_real` and `D_fake`.
        """
        state = self.state
        state.G.train()
        state.D.train()
        for micro_batches in inputs.d:
            losses = self._update_D(micro_batches)
        losses["loss_G"] = self._update_G(inputs.g)
        state.step += 1
        state.images_seen += self.config.step_images
        self._average()
        return losses

    def _update_D(self, micro_batches: list[tuple[Reals, Fakes]]) -> dict[str, Tensor]:
        state, config = self.state, self.config.loss
        state.optim_D.zero_grad()
        totals = torch.zeros(3, device=micro_batches[0][0].images.device)
        for accumulate, (reals, fakes) in _micro_batches(micro_batches, self.D_update):
            with torch.no_grad():
                generated = state.G(fakes.z, fakes.labels)
            with accumulate:
                logits = self.D_update(
                    torch.cat([reals.images, generated]), torch.cat([reals.labels, fakes.labels])
                )
                real, fake = logits.split([len(reals.labels), len(fakes.labels)])
                loss = self.loss.d(real, fake) / len(micro_batches)
                loss.backward()
            totals += torch.stack([loss, *(x.mean() / len(micro_batches) for x in (real, fake))])
        if config.ortho_d:
            weights = regularized_weights(state.D)
            add_orthogonal_gradient(weights, config.ortho_d, config.ortho_variant)
        state.optim_D.step()
        return dict(zip(("loss_D", "D_real", "D_fake"), totals.detach(), strict=True))

    def _update_G(self, micro_batches: list[Fakes]) -> Tensor:
        state, config = self.state, self.config.loss
        state.optim_G.zero_grad()
        total = torch.zeros((), device=micro_batches[0].z.device)
        with _frozen(state.D):
            for accumulate, fakes in _micro_batches(micro_batches, self.G_update):
                with accumulate:
                    generated = self.G_update(fakes.z, fakes.labels)
                    loss = self.loss.g(state.D(generated, fakes.labels)) / len(micro_batches)
                    loss.backward()
                total += loss.detach()
        if config.ortho_g:
            weights = regularized_weights(state.G)
            add_orthogonal_gradient(weights, config.ortho_g, config.ortho_variant)
        state.optim_G.step()
        return total

    @torch.no_grad()
    def _average(self) -> None:
        """G_ema <- decay * G_ema + (1 - decay) * G over parameters and buffers; a copy at first."""
        ema, state = self.config.ema, self.state
        decay = ema.decay if state.kimg > ema.start_kimg else 0.0
        averaged = [*state.G_ema.parameters(), *state.G_ema.buffers()]
        current = [*state.G.parameters(), *state.G.buffers()]
        torch._foreach_lerp_(averaged, current, 1 - decay)


def _micro_batches(
    items: list[T], network: nn.Module
) -> Iterator[tuple[AbstractContextManager[None], T]]:
    """Each micro-batch with the context for its backward: workers synchronize on the last alone."""
    no_sync = getattr(network, "no_sync", nullcontext)
    for item in items[:-1]:
        yield no_sync(), item
    yield nullcontext(), items[-1]


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Spare the gradients of D's weights while G's gradient flows through D."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
