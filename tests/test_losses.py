"""Objectives and regularization against arithmetic by hand and autograd."""

import math

import pytest
import torch

from biggan.config import ModelConfig, RunConfig
from biggan.losses import (
    LOSSES,
    add_orthogonal_gradient,
    orthogonal_penalty,
    regularized_weights,
)
from biggan.networks import Generator


def test_hinge_by_hand():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 1.0])
    # relu(1 - 0.5), relu(1 - 2) and relu(1 - 3), relu(1 + 1)
    assert LOSSES["hinge"].d(real, fake).item() == pytest.approx((0.5 + 0) / 2 + (0 + 2) / 2)
    assert LOSSES["hinge"].g(fake).item() == pytest.approx(-(-3 + 1) / 2)


def test_bce_by_hand():
    def log_sigmoid(x):
        return -math.log(1 + math.exp(-x))

    real, fake = [0.5, 2.0], [-3.0, 1.0]
    d = -sum(log_sigmoid(x) for x in real) / 2 - sum(log_sigmoid(-x) for x in fake) / 2
    g = -sum(log_sigmoid(x) for x in fake) / 2
    real, fake = torch.tensor(real), torch.tensor(fake)
    assert LOSSES["bce"].d(real, fake).item() == pytest.approx(d, rel=1e-6)
    assert LOSSES["bce"].g(fake).item() == pytest.approx(g, rel=1e-6)


def test_least_squares_and_wasserstein_by_hand():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 1.0])
    # (0.5 - 1)^2, (2 - 1)^2 and (-3)^2, 1^2; for G (-3 - 1)^2, (1 - 1)^2
    squares = LOSSES["least_squares"]
    assert squares.d(real, fake).item() == (0.25 + 1) / 2 / 2 + (9 + 1) / 2 / 2
    assert squares.g(fake).item() == (16 + 0) / 2 / 2
    assert LOSSES["wasserstein"].d(real, fake).item() == -1 - 1.25
    assert LOSSES["wasserstein"].g(fake).item() == 1


def test_the_configuration_knows_every_objective():
    for name in LOSSES:
        assert RunConfig().override({"loss.name": name}).loss.name == name


def test_orthogonal_penalties_by_hand():
    W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # W W^T = [[5, 11], [11, 25]]
    assert orthogonal_penalty(W, "modified").item() == 2 * 11**2
    assert orthogonal_penalty(W, "full").item() == 4**2 + 2 * 11**2 + 24**2


@pytest.mark.parametrize("variant", ["modified", "full"])
@pytest.mark.parametrize("shape", [(5, 7), (8, 3, 3, 3)], ids=["linear", "conv"])
def test_orthogonal_gradient_is_autograds(variant, shape):
    weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.double))
    (0.3 * orthogonal_penalty(weight, variant)).backward()
    expected = weight.grad.clone()
    weight.grad.zero_()
    add_orthogonal_gradient([weight], 0.3, variant)
    assert torch.allclose(weight.grad, expected, rtol=1e-10)


def test_regularization_spares_the_shared_embedding_and_vectors():
    G = Generator(ModelConfig(ch_g=2), resolution=16, channels=1, n_classes=3)
    chosen = {id(p) for p in regularized_weights(G)}
    assert id(G.shared.weight) not in chosen
    assert id(G.blocks[0].bn1.gain.weight) in chosen
    assert id(G.conv_out.bias) not in chosen
