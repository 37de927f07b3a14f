"""Layers against reference formulas and torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from biggan.layers import (
    ChannelAttention,
    ConditionalBatchNorm2d,
    CrossReplicaBatchNorm2d,
    SelfAttention,
    SNConv2d,
    SNDownConv2d,
    SNEmbedding,
    SNLinear,
    SNUpConv2d,
    shared_power_iteration,
    standing_statistics,
)


def converge(layer, x, steps=300):
    for _ in range(steps):
        layer(x)


@pytest.mark.parametrize(
    "layer,x",
    [
        (SNLinear(12, 7, 1e-12), torch.randn(2, 12)),
        (SNConv2d(3, 8, 3, 1e-12), torch.randn(2, 3, 5, 5)),
        (SNEmbedding(9, 4, 1e-12), torch.tensor([1, 3])),
    ],
    ids=["linear", "conv", "embedding"],
)
def test_spectral_norm_divides_by_the_largest_singular_value(layer, x):
    converge(layer, x)
    largest = torch.linalg.svdvals(layer.normalized_weight().flatten(1).double())[0]
    assert largest.item() == pytest.approx(1, abs=1e-6)


def test_spectral_norm_agrees_with_torchs_parametrization():
    ours = SNLinear(12, 7, 1e-12)
    theirs = nn.Linear(12, 7)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)
    theirs = spectral_norm(theirs)
    x = torch.randn(5, 12)
    converge(ours, x)
    converge(theirs, x)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    gradient = theirs.parametrizations.weight.original.grad
    assert torch.allclose(ours.weight.grad, gradient, atol=1e-5)


def test_spectral_norm_stores_its_vector_in_training_only():
    layer = SNLinear(12, 7, 1e-12)
    before = layer.u.clone()
    layer.eval()(torch.randn(1, 12))
    assert torch.equal(layer.u, before)
    layer.train()(torch.randn(1, 12))
    assert not torch.equal(layer.u, before)


def test_upsampling_convolution_is_upsample_then_convolve():
    layer = SNUpConv2d(5, 6, 3, 1e-6).double().eval()
    x = torch.randn(2, 5, 7, 7, dtype=torch.double)
    upsampled = F.interpolate(x, scale_factor=2)
    expected = F.conv2d(upsampled, layer.normalized_weight(), layer.bias, padding=1)
    assert torch.allclose(layer(x), expected, atol=1e-12)


def test_downsampling_convolution_is_convolve_then_pool():
    layer = SNDownConv2d(5, 6, 3, 1e-6).double().eval()
    x = torch.randn(2, 5, 8, 8, dtype=torch.double)
    convolved = F.conv2d(x, layer.normalized_weight(), layer.bias, padding=1)
    assert torch.allclose(layer(x), F.avg_pool2d(convolved, 2), atol=1e-12)


def test_attention_by_its_definition():
    layer = SelfAttention(16, 1e-6).double().eval()
    layer.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 4, 4, dtype=torch.double)
    for n in range(2):
        query = layer.theta(x)[n].reshape(2, 16)
        key = F.max_pool2d(layer.phi(x), 2)[n].reshape(2, 4)
        value = F.max_pool2d(layer.g(x), 2)[n].reshape(8, 4)
        weights = torch.softmax(query.T @ key, dim=1)  # Logits are not scaled.
        attended = layer.o((value @ weights.T).reshape(1, 8, 4, 4))[0]
        assert torch.allclose(layer(x)[n], 0.7 * attended + x[n], atol=1e-12)


def test_attention_begins_as_the_identity():
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(SelfAttention(8, 1e-6)(x), x)


def test_conditional_batch_norm_by_hand():
    layer = ConditionalBatchNorm2d(3, 4, bn_eps=1e-5, sn_eps=1e-12)
    x, condition = torch.randn(6, 3, 5, 5), torch.randn(6, 4)
    for _ in range(300):  # Until the power iterations have converged.
        out = layer(x, condition)
    centred = x - x.mean((0, 2, 3), keepdim=True)
    normalized = centred / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    gain, bias = (w / torch.linalg.svdvals(w)[0] for w in (layer.gain.weight, layer.bias.weight))
    gain, bias = 1 + condition @ gain.T, condition @ bias.T
    expected = normalized * gain[:, :, None, None] + bias[:, :, None, None]
    assert torch.allclose(out, expected, atol=1e-5)


def test_batch_norm_moments_are_torchs():
    ours, theirs = CrossReplicaBatchNorm2d(3, 1e-5), nn.BatchNorm2d(3, affine=False)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        assert torch.allclose(ours(x), theirs(x))
    assert torch.allclose(ours.running_mean, theirs.running_mean)
    assert torch.allclose(ours.running_var, theirs.running_var)


def test_standing_statistics_are_the_mean_over_batches():
    norm = CrossReplicaBatchNorm2d(3, 1e-5)
    norm(torch.randn(8, 3, 4, 4))  # Something to be forgotten.
    batches = [torch.randn(8, 3, 4, 4) * k + k for k in (1, 2, 3)]
    with standing_statistics(norm):
        for batch in batches:
            norm(batch)
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    var = torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-6)
    assert torch.allclose(norm.running_var, var, atol=1e-5)
    assert norm.momentum == 0.1
    assert not norm.training


def test_standing_statistics_leave_spectral_norms_alone():
    layer = ConditionalBatchNorm2d(3, 4, bn_eps=1e-5, sn_eps=1e-6)
    before = layer.gain.u.clone()
    with standing_statistics(layer):
        layer(torch.randn(2, 3, 4, 4), torch.randn(2, 4))
    assert torch.equal(layer.gain.u, before)


def test_batch_norm_in_half_precision_keeps_its_moments_in_full():
    norm = CrossReplicaBatchNorm2d(4, 1e-5)
    x = (10 + torch.randn(16, 4, 8, 8)).bfloat16().requires_grad_()
    full = x.detach().float().requires_grad_()
    gain, bias = torch.rand(16, 4) + 1, torch.randn(16, 4)
    grad = torch.randn(16, 4, 8, 8)
    out = norm(x, gain, bias, relu=True)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(norm.running_mean, 0.1 * full.mean((0, 2, 3)), atol=1e-4)
    normalized = F.batch_norm(full, None, None, training=True)
    expected = F.relu(normalized * gain[..., None, None] + bias[..., None, None])
    assert (out.float() - expected).abs().max() < 0.03  # Half a step of bfloat16 at 4 to 8.
    out.backward(grad.bfloat16())
    expected.backward(grad)
    assert (x.grad.float() - full.grad).abs().max() < 0.06


def test_batch_norm_with_gain_bias_and_relu_is_the_separate_steps():
    norm = CrossReplicaBatchNorm2d(4, 1e-5).double()
    inputs = [
        torch.randn(6, 4, 5, 5, dtype=torch.double),
        torch.randn(6, 4, dtype=torch.double),
        torch.randn(6, 4, dtype=torch.double),
    ]
    for t in inputs:
        t.requires_grad_()
    ours = norm(*inputs, relu=True)
    x, gain, bias = inputs
    normalized = F.batch_norm(x, None, None, training=True, eps=1e-5)
    theirs = F.relu(normalized * gain[..., None, None] + bias[..., None, None])
    assert torch.allclose(ours, theirs, atol=1e-12)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(theirs, inputs, grad),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-10)


def test_channel_attention_by_its_definition():
    layer = ChannelAttention(8, 1e-6).double().eval()
    x = torch.randn(3, 8, 4, 4, dtype=torch.double)
    assert torch.equal(layer(x), x)  # It begins as the identity.
    layer.gamma.data.fill_(1)
    hidden = F.relu(layer.squeeze(x.mean((2, 3))))
    gate = torch.sigmoid(layer.excite(hidden))  # Hu et al. 2018, eq. 3 and 4.
    assert torch.allclose(layer(x), x * gate[:, :, None, None])


def test_a_shared_power_iteration_serves_all_forwards_within():
    layer = SNLinear(12, 7, 1e-12)
    before = layer.u.clone()
    with shared_power_iteration(layer):
        once = layer.u.clone()
        first, second = layer.normalized_weight(), layer.normalized_weight()
    assert not torch.equal(before, once)
    assert torch.equal(layer.u, once)
    assert torch.equal(first, second)
    layer.u.copy_(before)
    assert torch.allclose(layer.normalized_weight(), first, atol=1e-6)  # As one forward alone.


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_frozen_weight_gives_the_same_output(memory_format):
    layer, x = SNUpConv2d(3, 4, 3, 1e-6).eval(), torch.randn(2, 3, 6, 6)
    before = layer(x)
    layer.freeze_weight()
    layer.to(memory_format=memory_format)
    assert torch.allclose(layer(x.to(memory_format=memory_format)), before, atol=1e-6)
    assert layer.state_dict().keys() == {"weight", "bias"}


def test_a_folded_norm_gives_the_same_output():
    layer, x = SNConv2d(3, 4, 3, 1e-6).eval(), torch.randn(2, 3, 6, 6)
    before = layer(x)
    layer.fold()
    assert torch.allclose(layer(x), before, atol=1e-6)
    assert "u" not in layer.state_dict()
