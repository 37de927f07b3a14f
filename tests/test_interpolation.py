"""The way between two images: by hand, and against the generator's own answers at its ends."""

import math

import numpy as np
import pytest
import torch

from biggan.config import ModelConfig
from biggan.errors import UserError
from biggan.interpolation import interpolate, slerp
from biggan.networks import Generator
from biggan.pixels import to_uint8
from biggan.truncation import TruncationTables


@pytest.fixture(params=[True, False], ids=["shared", "unshared"])
def G(request):
    """A generator with a table of moments that differ from the untruncated ones."""
    torch.manual_seed(0)
    config = ModelConfig(
        ch_g=2, ch_d=2, z_dim=12, shared_dim=8, shared=request.param, hierarchical=request.param
    )
    G = Generator(config, resolution=8, channels=3, n_classes=4)
    G.add_tables(TruncationTables(truncations=(0.5,)))
    for norm in G.batch_norms():
        norm.table_var.mul_(0.1)
    return G.eval().requires_grad_(False)


def along(a, b, *t):
    return slerp(torch.tensor(a), torch.tensor(b), torch.tensor(t))


def test_slerp_by_hand():
    half, third = math.sqrt(0.5), math.sqrt(0.75)
    way = along([1.0, 0.0], [0.0, 1.0], 0.0, 1 / 3, 0.5, 1.0)
    expected = torch.tensor([[1, 0], [third, 0.5], [half, half], [0, 1]])
    assert torch.allclose(way, expected, atol=1e-7)
    assert way.dtype == torch.float32


def test_slerp_interpolates_the_length():
    way = along([2.0, 0.0], [0.0, 4.0], 0.0, 0.5, 1.0)
    half = 3 * math.sqrt(0.5)
    assert torch.allclose(way, torch.tensor([[2, 0], [half, half], [0, 4]]), atol=1e-6)


def test_slerp_is_shoemakes_formula():
    draws = torch.Generator().manual_seed(0)
    a, b = torch.nn.functional.normalize(torch.randn(2, 20, generator=draws).double(), dim=1)
    t = torch.linspace(0, 1, 7).double()[:, None]
    angle = torch.arccos(a @ b)
    expected = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    assert torch.allclose(slerp(a, b, t[:, 0]), expected, atol=1e-12)


@pytest.mark.parametrize("nudge", [0.0, 1e-9, 1e-4])
def test_slerp_between_parallel_vectors_is_a_straight_line(nudge):
    way = along([1.0, 1.0, 0.0], [3.0, 3.0, nudge], 0.0, 0.5, 1.0)
    assert torch.allclose(way, torch.tensor([[1.0, 1, 0], [2, 2, 0], [3, 3, 0]]), atol=2e-4)


@pytest.mark.parametrize("nudge", [0.0, 1e-9, 1e-4])
def test_slerp_between_opposites_goes_round(nudge):
    a, b = [1.0, 2.0, 2.0], [-2.0, -4.0, -4.0 + nudge]
    way = along(a, b, 0.0, 1 / 3, 0.5, 1.0)
    assert torch.allclose(way[[0, 3]], torch.tensor([a, b]), atol=1e-5)
    assert torch.allclose(way.norm(dim=1), torch.tensor([3, 4, 4.5, 6]), atol=1e-5)
    cosines = way @ torch.tensor(a) / (3 * way.norm(dim=1))
    assert torch.allclose(cosines, torch.tensor([1, 0.5, 0, -1]), atol=1e-4)


@pytest.mark.parametrize("truncation", [None, 0.5, 1.3])
def test_the_ends_are_the_samples(G, truncation):
    frames = interpolate(G, (5, 0), (9, 3), steps=4, truncation=truncation)
    assert frames.shape == (4, 8, 8, 3)
    assert frames.dtype == np.uint8
    ends = G.sample([0, 3], seed=[5, 9], truncation=truncation)
    assert np.abs(frames[[0, -1]].astype(int) - ends).max() <= 1
    assert np.abs(frames[1].astype(int) - frames[2]).max() > 1


def test_half_way_classes_are_mixed_half_and_half(G):
    frames = interpolate(G, (5, 0), (9, 3), steps=3, truncation=0.5)
    z = slerp(*G.latents([5, 9], 0.5), torch.tensor([0.5]))
    y = G.embed(torch.tensor([0, 3])).mean(0, keepdim=True)
    assert torch.allclose(y, G.embed(torch.tensor([[0.5, 0, 0, 0.5]])), atol=1e-7)
    expected = to_uint8(G.synthesize(z, y, 0.5))[0].permute(1, 2, 0).numpy()
    assert np.abs(frames[1].astype(int) - expected).max() <= 1


def test_one_class_and_one_latent_stay_as_they_are(G):
    frames = interpolate(G, (5, 2), (5, 2), steps=3).astype(int)
    assert np.abs(frames - G.sample(2, seed=5)).max() <= 1


def test_many_frames_are_made_in_parts(G, monkeypatch):
    whole = interpolate(G, (5, 0), (9, 3), steps=7).astype(int)
    monkeypatch.setattr(Generator, "sample_batch", 3)
    assert np.abs(whole - interpolate(G, (5, 0), (9, 3), steps=7)).max() <= 1


@pytest.mark.parametrize(
    "start,end,options,said",
    [
        ((0, 4), (0, 0), {}, r"class 4 is not in 0..3"),
        ((0, 0), (-1, 0), {}, "seed -1"),
        ((0, 0), (0, 1), {"steps": 1}, "1 steps: must be 2 or more"),
        ((0, 0), (0, 1), {"truncation": 0.0}, "truncation is 0.0"),
    ],
)
def test_ways_that_cannot_be(G, start, end, options, said):
    with pytest.raises(UserError, match=said):
        interpolate(G, start, end, **options)
