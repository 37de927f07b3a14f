"""Penalties on D, and the choice of fakes that G learns from.

Each is a function of tensors that the training step has at hand; strengths, intervals and what is
averaged over workers are the caller's. Logits are float tensors `[N]`, images `[N, C, H, W]`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def r1_penalty(images: Tensor, logits: Tensor) -> Tensor:
    """Half the mean over images of ||d logit / d image||^2: a scalar, to be multiplied by gamma.

    Mescheder, Geiger and Nowozin 2018 (arXiv 1801.04406), eq. 9, on real images. `logits` must
    have been computed from `images`, which require grad, each logit from its own image alone.
    The penalty can itself be differentiated by D's weights.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return 0.5 * gradient.flatten(1).square().sum(1).mean()


def lecam_penalty(real: Tensor, fake: Tensor, anchors: Tensor) -> Tensor:
    """R_LC, mean (D(x) - alpha_F)^2 + mean (D(G(z)) - alpha_R)^2: a scalar, before its weight.

    Tseng, Jiang, Liu, Yang and Yang 2021 (arXiv 2104.03310). `anchors`, `[3]`, begins with
    alpha_R and alpha_F; `move_anchors` keeps it, and must have been called once before. The
    authors' released code first clips D(x) - alpha_F and alpha_R - D(G(z)) at zero, so that it
    penalizes only logits on the expected side; this is the paper's equation, which does not.
    """
    alpha_real, alpha_fake = anchors[0].detach(), anchors[1].detach()
    to_fake = (real - alpha_fake).square().mean()
    to_real = (fake - alpha_real).square().mean()
    return to_fake + to_real


@torch.no_grad()
def move_anchors(anchors: Tensor, real_mean: Tensor, fake_mean: Tensor, decay: float) -> None:
    """Move LeCam's anchors, in place: alpha <- decay * alpha + (1 - decay) * D's mean logit.

    `anchors` is float32 `[3]`, zeros before training. Its third element becomes 1 at the first
    move, which copies the means; so the tensor is all there is to store. Workers keep equal
    anchors if the means are those over all workers.
    """
    started = anchors[2]
    target = torch.stack([real_mean, fake_mean, torch.ones_like(started)]).to(anchors)
    anchors.copy_(torch.where(started > 0, anchors.lerp(target, 1 - decay), target))


def consistency_penalty(logits: Tensor, augmented: Tensor) -> Tensor:
    """Mean squared difference of D's logits for images and for the same images augmented.

    On real images it is the consistency regularization of Zhang, Zhang, Odena and Lee 2019 (arXiv
    1910.12027); on real and on fake ones, each with its weight, the balanced one of Zhao et al.
    2020 (arXiv 2002.04724). The gradient goes through both.
    """
    return (logits - augmented).square().mean()


def topk_fraction(kimg: float, final: float, over_kimg: float) -> float:
    """The part of a batch of fakes that G learns from after `kimg` thousand images.

    Sinha, Zhao, Goyal, Raffel and Odena 2020 (arXiv 2002.06224): it decays
    geometrically from 1 to `final`, in (0, 1], which it reaches after `over_kimg`; 0 means at once.
    """
    if kimg >= over_kimg:
        return final
    return float(final ** (kimg / over_kimg))


def topk_mask(logits: Tensor, fraction: float, all_logits: Tensor | None = None) -> Tensor:
    """Which of `logits` are among the ceil(fraction * M) highest of `all_logits`: bool `[N]`.

    Top-k training of G (Sinha et al. 2020, arXiv 2002.06224). `all_logits`, `[M]`, are
    those of all workers, this one's among them; by default `logits`. Logits equal to the lowest
    chosen one are chosen too: with ties more may be kept than asked for, never fewer.
    """
    pool = logits if all_logits is None else all_logits
    # 0.07 * 100 is 7.000000000000001, and 7 are meant.
    kept = max(1, math.ceil(fraction * len(pool) - 1e-9))
    return logits.detach() >= pool.detach().topk(kept).values[-1]
