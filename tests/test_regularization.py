"""Penalties and top-k selection against arithmetic by hand and finite differences."""

import pytest
import torch
from torch import nn

from biggan.config import ModelConfig
from biggan.networks import Discriminator
from biggan.regularization import (
    consistency_penalty,
    lecam_penalty,
    move_anchors,
    r1_penalty,
    topk_fraction,
    topk_mask,
)


def doubles(*shape, seed=0):
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def test_r1_of_a_linear_discriminator_is_half_its_squared_weight():
    w = doubles(3 * 4 * 4).requires_grad_()
    images = doubles(5, 3, 4, 4, seed=1).requires_grad_()
    penalty = r1_penalty(images, images.flatten(1) @ w)
    assert penalty.item() == pytest.approx(0.5 * w.square().sum().item())
    (gradient,) = torch.autograd.grad(penalty, w)
    assert torch.allclose(gradient, w)


def test_r1_of_a_quadratic_discriminator_by_hand():
    # D(x) = a |x|^2 + x_0 has gradient 2 a x + e_0.
    a = torch.tensor(0.7, dtype=torch.double, requires_grad=True)
    images = doubles(4, 1, 2, 3).requires_grad_()
    flat = images.flatten(1)
    penalty = r1_penalty(images, a * flat.square().sum(1) + flat[:, 0])
    x = images.detach().flatten(1)
    first = torch.eye(6, dtype=torch.double)[0]
    assert penalty.item() == pytest.approx(0.5 * (1.4 * x + first).square().sum(1).mean().item())
    (gradient,) = torch.autograd.grad(penalty, a)
    by_hand = ((1.4 * x + first) * 2 * x).sum(1).mean()
    assert gradient.item() == pytest.approx(by_hand.item())


def test_gradient_of_r1_by_the_weights_is_that_of_finite_differences():
    images = doubles(3, 1, 2, 2)

    def penalty(hidden, out):
        x = images.clone().requires_grad_()
        return r1_penalty(x, torch.tanh(x.flatten(1) @ hidden) @ out)

    weights = (doubles(4, 5, seed=1).requires_grad_(), doubles(5, seed=2).requires_grad_())
    assert torch.autograd.gradcheck(penalty, weights)


def test_r1_reaches_every_weight_of_the_discriminator_that_shapes_its_slope():
    torch.manual_seed(0)
    D = Discriminator(ModelConfig(ch_d=4, attention=(8,)), resolution=16, channels=3, n_classes=2)
    nn.init.ones_(next(p for name, p in D.named_parameters() if name.endswith("gamma")))
    images = torch.randn(2, 3, 16, 16).requires_grad_()
    r1_penalty(images, D(images, torch.tensor([0, 1]))).backward()
    for name, weight in D.named_parameters():
        if weight.ndim >= 2:
            assert weight.grad.isfinite().all(), name
            assert weight.grad.abs().sum() > 0, name


def test_lecam_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])
    anchors = torch.tensor([0.5, -0.25, 1.0])
    # (2 + 0.25)^2, 0.25^2 and (-1 - 0.5)^2, (1 - 0.5)^2: no difference is clipped.
    by_hand = (2.25**2 + 0.25**2) / 2 + (1.5**2 + 0.5**2) / 2
    assert lecam_penalty(real, fake, anchors).item() == pytest.approx(by_hand)


def test_gradient_of_lecam_pulls_logits_to_the_anchor_of_the_other_side():
    real, fake = doubles(4).requires_grad_(), doubles(4, seed=1).requires_grad_()
    anchors = torch.tensor([0.5, -0.25, 1.0], dtype=torch.double, requires_grad=True)
    lecam_penalty(real, fake, anchors).backward()
    assert torch.allclose(real.grad, 2 * (real.detach() + 0.25) / 4)
    assert torch.allclose(fake.grad, 2 * (fake.detach() - 0.5) / 4)
    assert anchors.grad is None


def test_anchors_begin_with_a_copy_and_then_average():
    anchors = torch.zeros(3)
    move_anchors(anchors, torch.tensor(0.8), torch.tensor(-0.3), 0.9)
    assert torch.equal(anchors, torch.tensor([0.8, -0.3, 1.0]))
    move_anchors(anchors, torch.tensor(1.8), torch.tensor(0.7), 0.9)
    assert torch.allclose(anchors, torch.tensor([0.9, -0.2, 1.0]))


def test_anchors_at_zero_are_not_taken_for_unset():
    anchors = torch.zeros(3)
    move_anchors(anchors, torch.tensor(0.0), torch.tensor(0.0), 0.5)
    move_anchors(anchors, torch.tensor(4.0), torch.tensor(-2.0), 0.5)
    assert anchors.tolist() == [2, -1, 1]


def test_anchors_are_moved_without_a_graph():
    anchors = torch.zeros(3)
    for _ in range(2):
        move_anchors(anchors, torch.ones(2, requires_grad=True).mean(), torch.tensor(0.0), 0.9)
    assert not anchors.requires_grad


def test_consistency_by_hand_with_a_gradient_to_both():
    logits = torch.tensor([1.0, -2.0], requires_grad=True)
    augmented = torch.tensor([0.5, 1.0], requires_grad=True)
    penalty = consistency_penalty(logits, augmented)
    assert penalty.item() == (0.5**2 + 3**2) / 2
    penalty.backward()
    assert logits.grad.tolist() == [0.5, -3]
    assert augmented.grad.tolist() == [-0.5, 3]


def test_the_fraction_of_topk_decays_geometrically_to_the_final_one():
    assert topk_fraction(0, 0.25, 100) == 1
    assert topk_fraction(50, 0.25, 100) == pytest.approx(0.5)
    assert topk_fraction(75, 0.25, 100) / topk_fraction(50, 0.25, 100) == pytest.approx(0.5**0.5)
    assert topk_fraction(100, 0.25, 100) == topk_fraction(1000, 0.25, 100) == 0.25
    assert topk_fraction(0, 0.25, 0) == 0.25


@pytest.mark.parametrize(
    "n,fraction,kept", [(10, 0.5, 5), (10, 0.51, 6), (100, 0.07, 7), (7, 0.01, 1), (7, 1.0, 7)]
)
def test_topk_keeps_the_highest(n, fraction, kept):
    logits = torch.randn(n)
    mask = topk_mask(logits, fraction)
    assert mask.dtype == torch.bool
    assert mask.sum() == kept
    assert set(mask.nonzero().flatten().tolist()) == set(logits.argsort()[-kept:].tolist())


def test_topk_over_workers_is_topk_of_all_their_logits():
    everyone = torch.randn(12, requires_grad=True)
    parts = [topk_mask(part, 0.4, everyone) for part in everyone.split(3)]
    assert torch.equal(torch.cat(parts), topk_mask(everyone, 0.4))
    assert torch.cat(parts).sum() == 5


def test_topk_keeps_all_that_tie_with_the_lowest_chosen():
    assert topk_mask(torch.tensor([1.0, 3.0, 1.0, 0.0]), 0.5).tolist() == [True, True, True, False]
