"""Ways between images: by hand, and against the generator's own answers at their stops."""

import math

import numpy as np
import pytest
import torch

from biggan.config import ModelConfig
from biggan.directions import find_directions
from biggan.errors import UserError
from biggan.interpolation import slerp, walk
from biggan.networks import Generator
from biggan.pixels import to_uint8
from biggan.recipe import Recipe
from biggan.synthesis import latents, synthesize
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


def test_slerp_from_and_to_zeros_is_a_straight_line():
    there = along([0.0, 0.0], [3.0, 4.0], 0.0, 0.5, 1.0)
    assert torch.allclose(there, torch.tensor([[0, 0], [1.5, 2], [3, 4]]), atol=1e-6)
    assert torch.allclose(along([3.0, 4.0], [0.0, 0.0], 1.0, 0.5, 0.0), there, atol=1e-6)


def recipe(class_id, seed, truncation=None, **others):
    return Recipe(classes={class_id: 1}, seed=seed, truncation=truncation, **others)


def images(G, recipes):
    return synthesize(G, recipes, find_directions(G)).astype(int)


def frame_latents(G, recipes):
    return latents(G, recipes, find_directions(G)).double()


@pytest.mark.parametrize("truncation", [None, 0.5, 1.3])
def test_stops_are_the_samples(G, truncation):
    stops = [recipe(0, 5, truncation), recipe(3, 9, truncation), recipe(1, 7, truncation)]
    way = walk(G, stops, 3, find_directions(G))
    assert way[::3] == stops
    frames = images(G, way)
    assert frames.shape == (7, 8, 8, 3)
    samples = G.sample([0, 3, 1], seed=[5, 9, 7], truncation=truncation)
    assert np.abs(frames[::3] - samples).max() <= 1
    assert np.abs(frames[1] - frames[2]).max() > 1


def test_frames_by_hand(G):
    start = Recipe(classes={0: 1}, z=(2.0, *[0] * 11), truncation=0.5)
    end = Recipe(classes={0: 0.5, 3: 0.5}, z=(0, 4.0, *[0] * 10), truncation=0.9)
    _, frame, *_ = walk(G, [start, end], 4, find_directions(G))
    assert frame.classes == {0: 0.875, 3: 0.125}
    assert frame.seed is None
    assert frame.y is None
    assert frame.edits == {}
    assert frame.truncation == pytest.approx(0.6)
    angle = math.pi / 8
    expected = [2.5 * math.cos(angle), 2.5 * math.sin(angle), *[0] * 10]
    assert frame.z == pytest.approx(expected, abs=1e-6)


def test_frames_are_what_hand_made_latents_and_embeddings_give(G):
    way = walk(G, [recipe(0, 5, 0.5), recipe(3, 9, 0.5)], 2, find_directions(G))
    z = slerp(*G.latents([5, 9], 0.5), torch.tensor([0.5]))
    y = G.embed(torch.tensor([0, 3])).mean(0, keepdim=True)
    expected = to_uint8(G.synthesize(z, y, 0.5))[0].permute(1, 2, 0).numpy()
    assert np.abs(images(G, way)[1] - expected).max() <= 1


def test_embeddings_of_their_own_are_mixed(G):
    own = G.embed(torch.tensor([2]))[0] + 0.5
    stops = [recipe(0, 5), recipe(0, 5, y=tuple(own.tolist()))]
    way = walk(G, stops, 4, find_directions(G))
    expected = torch.lerp(G.embed(torch.tensor([0]))[0], own, 0.75)
    assert way[3].y == pytest.approx(expected.tolist(), abs=1e-6)
    assert way[3].classes == {0: 1}
    assert way[4] == stops[1]


def test_edits_are_walked_along(G):
    directions = find_directions(G)
    way = walk(G, [recipe(0, 5), recipe(0, 5, edits={1: 2.0, 4: -1.0})], 5, directions)
    moved = G.latents([5])[0] + 2 * directions.vectors[1] - directions.vectors[4]
    expected = slerp(G.latents([5])[0], moved, torch.tensor([0.6]))
    assert torch.allclose(torch.tensor(way[3].z), expected[0], atol=1e-6)


@pytest.mark.parametrize(
    "start,end,half",
    [(0.5, 0.7, 0.6), (0.5, None, 0.75), (None, 0.25, 0.625), (None, None, None)],
)
def test_truncations_lead_evenly_to_the_untruncated(G, start, end, half):
    # The one table is at 0.5; from 1 on nothing counts as cut off.
    way = walk(G, [recipe(0, 5, start), recipe(0, 5, end)], 2, find_directions(G))
    assert way[1].truncation == half


def test_without_tables_truncation_only_was_what_latents_were_drawn_at(G):
    G.tables = None
    assert walk(G, [recipe(0, 5, 0.5), recipe(0, 6)], 2, find_directions(G))[1].truncation is None


@pytest.mark.parametrize("loop", [False, True])
def test_latents_turn_evenly(G, loop):
    stops = [recipe(0, 5), recipe(3, 9), recipe(1, 7)]
    way = walk(G, stops, 5, find_directions(G), loop=loop)
    z = frame_latents(G, way + way[:1] if loop else way)
    angles = torch.arccos(torch.cosine_similarity(z[1:], z[:-1])).view(-1, 5)
    whole = torch.arccos(torch.cosine_similarity(z[5::5], z[:-5:5]))
    assert torch.allclose(angles, whole[:, None].expand(-1, 5) / 5, atol=1e-6)
    steps = (z[1:].norm(dim=1) - z[:-1].norm(dim=1)).view(-1, 5)
    assert torch.allclose(steps, steps.mean(1, keepdim=True).expand(-1, 5), atol=1e-6)


def test_a_loop_comes_back_without_a_jump_or_a_doubled_frame(G):
    for norm in G.batch_norms():
        norm.table_var.fill_(0.7)  # As it is of latents so truncated, and not a tenth.
    stops = [
        recipe(0, 5, 0.5),
        recipe(3, 9, edits={0: 2.0}),
        Recipe(classes={1: 0.5, 2: 0.5}, z=tuple(G.latents([7])[0].tolist()), truncation=0.8),
    ]
    way = walk(G, stops, 12, find_directions(G), loop=True)
    assert len(way) == 36
    assert way[::12] == stops
    frames = images(G, way)
    steps = np.abs(np.diff(frames, axis=0, append=frames[:1])).mean((1, 2, 3))
    assert steps.min() > 0.2 * np.median(steps)
    assert steps.max() < 2.5 * np.median(steps)
    # What a way that breaks off at the last stop would do.
    assert np.abs(frames[24] - frames[0]).mean() > 3 * np.median(steps)


def test_one_frame_a_leg_is_the_stops(G):
    stops = [recipe(0, 5), recipe(3, 9)]
    assert walk(G, stops, 1, find_directions(G)) == stops
    assert walk(G, stops, 1, find_directions(G), loop=True) == stops


def test_one_class_and_one_latent_stay_as_they_are(G):
    frames = images(G, walk(G, [recipe(2, 5), recipe(2, 5)], 3, find_directions(G)))
    assert np.abs(frames - G.sample(2, seed=5)).max() <= 1


@pytest.mark.parametrize(
    "stops,frames,said",
    [
        ([recipe(0, 0)], 2, "a way of 1 stops: give 2 or more"),
        ([recipe(0, 0), recipe(0, 1)], 0, "0 frames from stop to stop: must be 1 or more"),
        ([recipe(0, 0), recipe(4, 1)], 2, r"class 4 is not in 0..3"),
        ([recipe(0, 0), recipe(0, 1, edits={12: 1.0})], 2, "direction 12"),
        ([recipe(0, 0), Recipe(classes={}, z=(1.0,))], 2, "z has 1 numbers"),
    ],
)
def test_ways_that_cannot_be(G, stops, frames, said):
    with pytest.raises(UserError, match=said):
        walk(G, stops, frames, find_directions(G))
