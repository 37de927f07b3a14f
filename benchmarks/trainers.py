"""The work that trainers are asked to do, what a trainer is to a benchmark, and ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from machine import synchronize
from torch import Tensor, nn

from biggan.config import RunConfig
from biggan.training import Fakes, Reals, StepInputs, TrainStep, build

OURS = "ours"
WARM_UP = 2
"""Steps of a trainer before anything is measured: optimizers have state, kernels are chosen."""


@dataclass(frozen=True)
class Work:
    """What each trainer is asked to do."""

    config: RunConfig
    resolution: int
    n_classes: int
    device: torch.device
    peer_precision: str = "float32"

    @property
    def micro_batch(self) -> int:
        """Images that go through a network at a time."""
        return self.config.optim.batch_size // self.config.optim.accumulation

    @property
    def torch_precision(self) -> str:
        """What torch computes float32 convolutions in unless told otherwise."""
        return "tf32" if self.device.type == "cuda" else "float32"

    def inputs(self) -> StepInputs:
        """Noise for images, and latents: what one step consumes."""
        generator = torch.Generator().manual_seed(0)
        n, optim, shape = self.micro_batch, self.config.optim, (3, self.resolution, self.resolution)

        def labels() -> Tensor:
            return torch.randint(self.n_classes, (n,), generator=generator).to(self.device)

        def reals() -> Reals:
            images = torch.rand((n, *shape), generator=generator) * 2 - 1
            return Reals(images.to(self.device), labels())

        def fakes() -> Fakes:
            z = torch.randn((n, self.config.model.z_dim), generator=generator)
            return Fakes(z.to(self.device), labels())

        micro_batches = range(optim.accumulation)
        return StepInputs(
            d=[[(reals(), fakes()) for _ in micro_batches] for _ in range(optim.num_D_steps)],
            g=[fakes() for _ in micro_batches],
        )


@dataclass(frozen=True)
class Trainer:
    """One implementation, ready to train."""

    name: str
    G: nn.Module
    D: nn.Module
    G_ema: nn.Module
    step: Callable[[StepInputs], object]
    precision: str
    """Of its convolutions: float32, tf32, bfloat16 or float16."""
    cudnn_benchmark: bool
    """Whether it lets cuDNN try out kernels, as the peers do; ours has it deterministic instead."""

    def run(self, inputs: StepInputs, steps: int) -> float:
        """Seconds that `steps` steps take."""
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.backends.cudnn.deterministic = not self.cudnn_benchmark
        # Our `TrainStep` sets these for the process. The peers leave them as torch has them.
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32" and self.name == OURS
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step(inputs)
        synchronize()
        return time.perf_counter() - begin


def ours(work: Work) -> Trainer:
    """The trainer of this repository."""
    shape = {"resolution": work.resolution, "channels": 3, "n_classes": work.n_classes}
    state = build(work.config, **shape, device=work.device)
    train_step = TrainStep(work.config, state)

    def step(inputs: StepInputs) -> list[float]:
        # The training loop looks at every step's losses, as both peers do.
        losses: list[float] = torch.stack(list(train_step(inputs).values())).tolist()
        return losses

    precision = work.config.speed.precision_d  # D is most of the work.
    return Trainer(OURS, state.G, state.D, state.G_ema, step, precision, cudnn_benchmark=False)
