"""Networks: parameter counts of the paper, every resolution, what is conditioned on what."""

import numpy as np
import pytest
import torch

from biggan.config import RESOLUTIONS, ConfigError, ModelConfig
from biggan.networks import Discriminator, Generator, d_sides, g_sides

Z_DIM = {256: 140, 512: 128}


def pair(resolution, channels=3, n_classes=5, **changes):
    config = ModelConfig(ch_g=2, ch_d=2, z_dim=Z_DIM.get(resolution, 120), **changes)
    shape = {"resolution": resolution, "channels": channels, "n_classes": n_classes}
    return Generator(config, **shape), Discriminator(config, **shape)


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_of_the_paper():
    config = ModelConfig(ch_g=96, ch_d=96, z_dim=120, shared_dim=128, attention=(64,))
    with torch.device("meta"):
        G = Generator(config, resolution=128, channels=3, n_classes=1000)
        D = Discriminator(config, resolution=128, channels=3, n_classes=1000)
    assert (count(G), count(D)) == (70_433_988, 87_982_370)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_resolution_and_number_of_channels(resolution, channels):
    G, D = pair(resolution, channels)
    z, labels = torch.randn(2, G.z_dim), torch.tensor([0, 4])
    images = G(z, labels)
    assert images.shape == (2, channels, resolution, resolution)
    assert images.abs().max() <= 1
    assert D(images, labels).shape == (2,)


def test_sides():
    assert g_sides(64) == [8, 16, 32, 64]
    assert d_sides(128) == [64, 32, 16, 8, 4, 4]
    assert d_sides(32) == [16, 8, 8, 8]
    assert d_sides(16) == [8, 8, 8]
    assert d_sides(8) == [8, 8]


def test_hierarchical_z_reaches_each_block_in_turn():
    G, _ = pair(16)
    G.eval()
    z, label = torch.randn(1, 120), torch.tensor([1])
    features = {}
    for k, block in enumerate(G.blocks):
        block.register_forward_hook(lambda _m, _a, out, k=k: features.__setitem__(k, out))
    G(z, label)
    before = dict(features)
    changed = z.clone()
    changed[:, 80:] += 1  # The last of three chunks conditions the second block alone.
    G(changed, label)
    assert torch.equal(before[0], features[0])
    assert not torch.allclose(before[1], features[1])


def test_without_hierarchy_z_feeds_the_first_layer_whole():
    G, _ = pair(16, hierarchical=False)
    assert G.linear.in_features == 120
    assert G.blocks[0].bn1.gain.in_features == 128
    assert G(torch.randn(2, 120), torch.tensor([0, 1])).shape == (2, 3, 16, 16)


def test_attention_follows_the_named_resolution_in_both():
    G, D = pair(64, attention=(32,))
    assert list(G.attention) == ["2"]  # 8, 16, 32
    assert list(D.attention) == ["0"]  # 32


def test_a_mixture_of_classes_mixes_their_embeddings():
    G, _ = pair(16)
    G.eval()
    z = torch.randn(3, 120)
    ids = torch.tensor([0, 2, 4])
    assert torch.allclose(G(z, torch.nn.functional.one_hot(ids, 5).float()), G(z, ids), atol=1e-6)
    half = torch.tensor([[0.5, 0.5, 0, 0, 0]])
    assert torch.allclose(G.embed(half)[0], G.shared.weight[:2].mean(0), atol=1e-6)


def test_projection_by_hand():
    _, D = pair(8)
    D.eval()
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([1, 3])
    h = images
    for block in D.blocks:
        h = block(h)
    pooled = torch.relu(h).sum((2, 3))
    embedding = D.embed.normalized_weight()[labels]
    expected = D.linear(pooled)[:, 0] + (embedding * pooled).sum(1)
    assert torch.allclose(D(images, labels), expected, atol=1e-5)


def test_initial_weights_are_orthogonal():
    torch.manual_seed(0)
    G, _ = pair(16)
    W = G.blocks[0].conv1.weight.flatten(1)
    assert torch.allclose(W @ W.T, torch.eye(len(W)), atol=1e-5)
    G, _ = pair(16, init="normal")
    assert G.blocks[0].conv1.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "resolution,changes,said",
    [
        (48, {}, "48: must be one of"),
        (256, {"z_dim": 120}, "must be a multiple of 7: try 119"),
        (32, {"attention": (64,)}, r"no block of a 32-pixel network ends at 64.*\[8, 16, 32\]"),
    ],
)
def test_what_does_not_fit(resolution, changes, said):
    with pytest.raises(ConfigError, match=said):
        Generator(ModelConfig(**changes), resolution=resolution, channels=3, n_classes=5)


def test_samples_do_not_depend_on_their_batch(monkeypatch):
    G, _ = pair(16, channels=1)
    G.eval()
    together = G.sample([0, 1, 2, 1], seed=[7, 8, 9, 10], truncation=0.5)
    assert together.shape == (4, 16, 16, 1)
    assert together.dtype == np.uint8
    alone = G.sample(1, seed=10, truncation=0.5)
    assert np.abs(together[3].astype(int) - alone[0].astype(int)).max() <= 1
    assert G.sample_batch == 256
    monkeypatch.setattr(Generator, "sample_batch", 3)
    in_parts = G.sample([0, 1, 2, 1], seed=[7, 8, 9, 10], truncation=0.5)
    assert np.abs(together.astype(int) - in_parts.astype(int)).max() <= 1
    consecutive = G.sample([2, 2], seed=4)
    assert np.abs(consecutive[1].astype(int) - G.sample(2, seed=5)[0].astype(int)).max() <= 1


@pytest.mark.parametrize(
    "arguments,said",
    [
        (([5],), r"class 5 is not in 0..4"),
        (([-1],), r"class -1 is not in 0..4"),
        (([0, 1], [3]), "1 seeds for 2 images"),
        (([0], 0, -0.5), "truncation is -0.5"),
    ],
)
def test_sampling_what_cannot_be(arguments, said):
    with pytest.raises(ValueError, match=said):
        pair(8)[0].sample(*arguments)


def test_idle_biases_are_idle():
    G, _ = pair(16, attention=(8,))
    frozen = {name for name, p in G.named_parameters() if not p.requires_grad}
    assert frozen == {
        "blocks.0.conv1.bias",
        "blocks.1.conv1.bias",
        "blocks.1.conv2.bias",
        "blocks.1.conv_sc.bias",
    }
    z, labels = torch.randn(4, 120), torch.tensor([0, 1, 2, 3])
    before = G(z, labels)
    with torch.no_grad():
        for name, p in G.named_parameters():
            if name in frozen:
                p += 1
    assert torch.allclose(G(z, labels), before, atol=1e-4)
