"""One BigGAN training step: updates of D, then one of G, then the average of G's weights.

The mathematics alone. Nothing here knows of Ray or of files: what a step consumes comes in as
`StepInputs`, and `Workers` averages what several processes have to agree on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from biggan.augmentation import (
    adapt_probability,
    adaptive_augment,
    diff_augment,
    flip_and_shift,
)
from biggan.config import RunConfig
from biggan.layers import shared_power_iteration
from biggan.losses import LOSSES, add_orthogonal_gradient, regularized_weights
from biggan.networks import Discriminator, Generator
from biggan.parallel import ALONE, Workers
from biggan.regularization import (
    consistency_penalty,
    lecam_penalty,
    move_anchors,
    r1_penalty,
    topk_fraction,
    topk_mask,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Fakes:
    """What G is asked for: latents `[n, z_dim]` and class ids `[n]`."""

    z: Tensor
    labels: Tensor
    noise: Tensor | None = None
    """Uniform numbers `[n, augmentation.NOISE]` for what happens to the images before D."""


@dataclass(frozen=True)
class Reals:
    """Images in [-1, 1], `[n, C, H, W]`, and their class ids `[n]`."""

    images: Tensor
    labels: Tensor
    noise: Tensor | None = None
    """Uniform numbers `[n, augmentation.NOISE]` for what happens to the images before D."""


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
    scaler_G: torch.amp.GradScaler
    scaler_D: torch.amp.GradScaler
    running: dict[str, Tensor]
    """What regularizers remember: `anchors` of LeCam, the probability `p` of ADA."""
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
    if config.speed.channels_last:
        for network in (G, D):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)

    def adam(network: nn.Module, lr: float) -> torch.optim.Adam:
        optim, fused = config.optim, config.speed.fused_optimizer
        betas = (optim.beta1, optim.beta2)
        # Without `fused` torch picks its multi-tensor form on GPUs.
        return torch.optim.Adam(
            network.parameters(), lr=lr, betas=betas, eps=optim.eps, fused=fused or None
        )

    def scaler(*precisions: str) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type, enabled="float16" in precisions)

    speed = config.speed
    return TrainState(
        G,
        D,
        G_ema,
        adam(G, config.optim.lr_g),
        adam(D, config.optim.lr_d),
        scaler(speed.precision_g, speed.precision_d),  # G's gradient comes through D.
        scaler(speed.precision_d),
        running={
            "anchors": torch.zeros(3, device=device),
            "p": torch.zeros((), device=device),
        },
    )


class TrainStep:
    """Advances a `TrainState` by one step a call."""

    def __init__(self, config: RunConfig, state: TrainState, workers: Workers = ALONE) -> None:
        """`workers` share the step: gradients, and what regularizers average, are of all."""
        self.config = config
        self.state = state
        self.workers = workers
        self.device = state.G.linear.weight.device
        self.loss = LOSSES[config.loss.name]
        speed = config.speed
        for network in (state.G, state.D):
            network.recompute = speed.recompute
            if speed.compile != "off":
                network.compile(mode=speed.compile)
        tf32 = "tf32" in (speed.precision_g, speed.precision_d)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        # The updates run through these; all else uses the bare networks, since a wrapped network
        # must not be run forward twice before one backward.
        self.D_update = workers.wrap(state.D)
        self.G_update = workers.wrap(state.G)

    def __call__(self, inputs: StepInputs) -> dict[str, Tensor]:
        """One step. Returns what this worker measured in the last D update and G's, detached.

        Keys: `loss_D`, `loss_G`, the mean logits `D_real` and `D_fake`, D's accuracies
        `accuracy_real` and `accuracy_fake`, and with ADA its probability `ada_p`.
        """
        state = self.state
        state.G.train()
        state.D.train()
        reuse = self.config.speed.reuse_fakes
        if self.config.speed.compile in ("reduce-overhead", "max-autotune"):
            torch.compiler.cudagraph_mark_step_begin()
        with shared_power_iteration(state.G):
            for k, micro_batches in enumerate(inputs.d):
                lend = reuse and k == len(inputs.d) - 1
                measured, lent = self._update_D(micro_batches, lend)
            measured["loss_G"] = self._update_G(inputs.g, lent)
        state.step += 1
        state.images_seen += self.config.step_images
        self._average()
        if self.config.augment.name == "ada":
            measured["ada_p"] = state.running["p"].clone()
        return measured

    def _update_D(
        self, micro_batches: list[tuple[Reals, Fakes]], lend: bool
    ) -> tuple[dict[str, Tensor], list[tuple[Fakes, Tensor]]]:
        """Also returns, if asked to lend them, the fakes with G's graph behind them."""
        state = self.state
        state.optim_D.zero_grad()
        lent = []
        totals: dict[str, Tensor] = {}
        share = 1 / len(micro_batches)
        with shared_power_iteration(state.D):
            for accumulate, (reals, fakes) in _micro_batches(micro_batches, self.D_update):
                generated = self._generate(fakes, learn=lend)
                if lend:
                    lent.append((fakes, generated))
                with accumulate:
                    loss, measured = self._loss_D(reals, fakes, generated.detach())
                    state.scaler_D.scale(loss * share).backward()
                for name, value in measured.items():
                    totals[name] = totals.get(name, 0) + value.detach() * share
        self._step(state.D, state.optim_D, state.scaler_D, self.config.loss.ortho_d)
        self._remember(totals)
        totals.pop("sign_real")
        return totals, lent

    def _loss_D(
        self, reals: Reals, fakes: Fakes, generated: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What D minimizes over one micro-batch, and what is told of it."""
        config, anchors = self.config.loss, self.state.running["anchors"]
        penalize_slope = bool(config.r1) and self.state.step % config.r1_every == 0
        images = reals.images.detach().requires_grad_(penalize_slope)
        # Real and fake go through D together, and for consistency once more.
        seen = [self._augment(images, reals.noise), self._augment(generated, fakes.noise)]
        labels = [reals.labels, fakes.labels]
        if config.consistency:
            seen.append(flip_and_shift(seen[0], _given(reals.noise)))
            labels.append(reals.labels)
        if config.consistency_fake:
            seen.append(flip_and_shift(seen[1], _given(fakes.noise)))
            labels.append(fakes.labels)
        # Attention's fused kernels can be differentiated once only.
        with self._autocast("D"), _plain_attention() if penalize_slope else nullcontext():
            logits = self.D_update(torch.cat(seen), torch.cat(labels))
        real, fake, *moved = _full_precision(logits).split(len(generated))
        objective = self.loss.d(real, fake)
        loss = objective
        if penalize_slope:
            loss = loss + config.r1 * config.r1_every * r1_penalty(images, real)
        if config.lecam:  # Nothing before there are averages.
            loss = loss + config.lecam * anchors[2] * lecam_penalty(real, fake, anchors)
        if config.consistency:
            loss = loss + config.consistency * consistency_penalty(real, moved[0])
        if config.consistency_fake:
            loss = loss + config.consistency_fake * consistency_penalty(fake, moved[-1])
        accuracy_real, accuracy_fake = self.loss.accuracies(real.detach(), fake.detach())
        return loss, {
            "loss_D": objective,
            "D_real": real.mean(),
            "D_fake": fake.mean(),
            "accuracy_real": accuracy_real,
            "accuracy_fake": accuracy_fake,
            "sign_real": (real - self.loss.middle(real, fake)).detach().sign().mean(),
        }

    def _update_G(self, items: list[Fakes], lent: list[tuple[Fakes, Tensor]]) -> Tensor:
        state = self.state
        state.optim_G.zero_grad()
        total = torch.zeros((), device=items[0].z.device)
        given = dict(enumerate(lent))
        with _frozen(state.D), shared_power_iteration(state.D):
            for k, (accumulate, fakes) in enumerate(_micro_batches(items, self.G_update)):
                with accumulate:
                    if k in given:
                        fakes, generated = given[k]
                    else:
                        generated = self._generate(fakes, learn=True)
                    seen = self._augment(generated, fakes.noise)
                    with self._autocast("D"):
                        logits = state.D(seen, fakes.labels)
                    loss = self._loss_G(logits) / len(items)
                    state.scaler_G.scale(loss).backward()
                total += loss.detach()
        self._step(state.G, state.optim_G, state.scaler_G, self.config.loss.ortho_g)
        return total

    def _loss_G(self, logits: Tensor) -> Tensor:
        config = self.config.loss
        logits = _full_precision(logits)
        if config.topk == 1:
            return self.loss.g(logits)
        everyone = self.workers.gather(logits.detach())
        fraction = topk_fraction(self.state.kimg, config.topk, config.topk_kimg)
        chosen = topk_mask(logits, fraction, everyone)
        # The mean over those chosen on all workers, of which this one may have more or fewer.
        share = topk_mask(everyone, fraction).float().mean()
        return (self.loss.g_fake(logits) * chosen).mean() / share

    def _generate(self, fakes: Fakes, *, learn: bool) -> Tensor:
        network = self.G_update if learn else self.state.G
        with self._autocast("G"), torch.set_grad_enabled(learn):
            images: Tensor = network(fakes.z, fakes.labels)
        return images.to(fakes.z.dtype)

    def _augment(self, images: Tensor, noise: Tensor | None) -> Tensor:
        augment = self.config.augment
        if augment.name == "diffaugment":
            images = diff_augment(images, _given(noise), augment.policy)
        elif augment.name == "ada":
            images = adaptive_augment(images, _given(noise), self.state.running["p"])
        if self.config.speed.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images

    def _autocast(self, network: str) -> torch.autocast:
        speed = self.config.speed
        name = speed.precision_g if network == "G" else speed.precision_d
        half = name in ("bfloat16", "float16")
        dtype = getattr(torch, name) if half else None
        return torch.autocast(self.device.type, dtype=dtype, enabled=half)

    def _step(
        self,
        network: Generator | Discriminator,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ortho: float,
    ) -> None:
        scaler.unscale_(optimizer)
        if ortho:
            variant = self.config.loss.ortho_variant
            add_orthogonal_gradient(regularized_weights(network), ortho, variant)
        scaler.step(optimizer)
        scaler.update()

    def _remember(self, totals: dict[str, Tensor]) -> None:
        """Move what regularizers average, by the batch of all workers."""
        config, running = self.config, self.state.running
        if not (config.loss.lecam or config.augment.name == "ada"):
            return
        names = ("D_real", "D_fake", "sign_real")
        real, fake, sign = self.workers.mean(torch.stack([totals[name] for name in names]))
        move_anchors(running["anchors"], real, fake, config.loss.lecam_decay)
        if config.augment.name == "ada":
            augment, n = config.augment, config.optim.batch_size
            p = adapt_probability(running["p"], sign, n, augment.ada_target, augment.ada_kimg)
            running["p"].copy_(p)

    @torch.no_grad()
    def _average(self) -> None:
        """G_ema <- decay * G_ema + (1 - decay) * G over parameters and buffers; a copy at first."""
        ema, state = self.config.ema, self.state
        decay = ema.decay if state.kimg > ema.start_kimg else 0.0
        averaged = [*state.G_ema.parameters(), *state.G_ema.buffers()]
        current = [*state.G.parameters(), *state.G.buffers()]
        torch._foreach_lerp_(averaged, current, 1 - decay)


def _full_precision(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _given(noise: Tensor | None) -> Tensor:
    assert noise is not None, "augmentation needs noise beside the images"
    return noise


def _plain_attention() -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


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
