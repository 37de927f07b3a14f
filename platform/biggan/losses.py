"""Adversarial objectives, and orthogonal regularization of weights.

Logits are float tensors `[N]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class AdversarialLoss:
    """One objective: what D and G minimize the mean of, over real and fake logits."""

    d_real: Callable[[Tensor], Tensor]
    d_fake: Callable[[Tensor], Tensor]
    g_fake: Callable[[Tensor], Tensor]
    boundary: float | None = 0.0
    """The logit at which D is undecided; None if there is none, and only differences count."""

    def d(self, real: Tensor, fake: Tensor) -> Tensor:
        """D's loss, a scalar."""
        return self.d_real(real).mean() + self.d_fake(fake).mean()

    def g(self, fake: Tensor) -> Tensor:
        """G's loss, a scalar."""
        return self.g_fake(fake).mean()

    def middle(self, real: Tensor, fake: Tensor) -> Tensor | float:
        """The logit at which D is undecided: `boundary`, or half-way between the means."""
        return (real.mean() + fake.mean()) / 2 if self.boundary is None else self.boundary

    def accuracies(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Which part of the real and of the fake images D takes for what they are: scalars."""
        middle = self.middle(real, fake)
        return (real > middle).float().mean(), (fake < middle).float().mean()


LOSSES = {
    # Lim and Ye 2017; Tran et al. 2017. The paper's.
    "hinge": AdversarialLoss(
        d_real=lambda real: F.relu(1 - real),
        d_fake=lambda fake: F.relu(1 + fake),
        g_fake=lambda fake: -fake,
    ),
    # Goodfellow et al. 2014, section 3, with the non-saturating G. softplus(-x) = -log sigmoid(x).
    "bce": AdversarialLoss(
        d_real=lambda real: F.softplus(-real),
        d_fake=F.softplus,
        g_fake=lambda fake: F.softplus(-fake),
    ),
    # Mao et al. 2017 (arXiv 1611.04076), eq. 9: targets 1 for real, 0 for fake, 1 for G.
    "least_squares": AdversarialLoss(
        d_real=lambda real: 0.5 * (real - 1).square(),
        d_fake=lambda fake: 0.5 * fake.square(),
        g_fake=lambda fake: 0.5 * (fake - 1).square(),
        boundary=0.5,
    ),
    # Arjovsky et al. 2017 (arXiv 1701.07875), eq. 2. Spectral norm bounds D's slope, no clipping.
    "wasserstein": AdversarialLoss(
        d_real=lambda real: -real,
        d_fake=lambda fake: fake,
        g_fake=lambda fake: -fake,
        boundary=None,
    ),
}


def orthogonal_penalty(weight: Tensor, variant: str) -> Tensor:
    """The penalty that orthogonal regularization puts on one weight, before its strength.

    With W the weight as `[out, -1]`: "modified" is ||W W^T * (1 - I)||_F^2 (eq. 3 of
    arXiv 1809.11096), "full" is ||W W^T - I||_F^2 (Brock et al. 2016, arXiv 1609.07093).
    """
    return _off_orthogonal(weight.flatten(1), variant).square().sum()


@torch.no_grad()
def add_orthogonal_gradient(weights: Iterable[nn.Parameter], strength: float, variant: str) -> None:
    """Add the exact gradient of strength * `orthogonal_penalty` to each weight's `.grad`.

    In closed form: 4 * strength * E W, where E is the matrix that the penalty squares.
    BigGAN-PyTorch has the factor 2 there: its strength means half of this one.
    """
    for weight in weights:
        W = weight.flatten(1)
        gradient = (_off_orthogonal(W, variant) @ W).view_as(weight)
        assert weight.grad is not None, "regularization is added after the backward pass"
        weight.grad.add_(gradient, alpha=4 * strength)


def _off_orthogonal(W: Tensor, variant: str) -> Tensor:
    gram = W @ W.T
    if variant == "modified":
        return gram - torch.diag(gram.diagonal())
    return gram - torch.eye(len(gram), dtype=W.dtype, device=W.device)


def regularized_weights(network: nn.Module) -> list[nn.Parameter]:
    """Weights that orthogonal regularization acts on: all matrices but G's class embedding."""
    excluded = {id(p) for name, p in network.named_parameters() if name == "shared.weight"}
    return [p for p in network.parameters() if p.ndim >= 2 and id(p) not in excluded]
