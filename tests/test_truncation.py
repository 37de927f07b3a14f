"""Tables of batch-norm moments: what they hold, and which of them serve at a truncation."""

import copy

import numpy as np
import pytest
import torch

from biggan import candidates
from biggan.candidates import TRUNCATIONS, collect_standing_statistics
from biggan.config import ModelConfig
from biggan.errors import UserError
from biggan.latents import ClassSampler, Stream, rng, sample_z
from biggan.models import ModelCard, ModelStore, describe, load_generator
from biggan.networks import Generator
from biggan.truncation import TruncationTables

COUNTS = (1, 2, 3)
MODELS = {
    "shared": {},
    "unshared": {"shared": False, "hierarchical": False},
    "deep": {"architecture": "biggan-deep", "ch_g": 4, "ch_d": 4},
    "attention": {"attention": (8,), "channel_attention": (8,)},
}


def build(**changes):
    torch.manual_seed(0)
    config = ModelConfig(**{"ch_g": 2, "ch_d": 2, "z_dim": 12, "shared_dim": 8} | changes)
    return Generator(config, resolution=8, channels=1, n_classes=3).eval()


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def G(request):
    """A generator with standing statistics over few images."""
    G = build(**request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "STANDING_IMAGES", 768)
        patch.setattr(candidates, "TABLE_IMAGES", 512)
        collect_standing_statistics(G, COUNTS)
    return G.requires_grad_(False)


def with_moments(G, weights):
    """A copy of `G` without tables, whose running moments are a mixture of the tables of `G`."""
    plain = copy.deepcopy(G)
    plain.tables = None
    for norm in plain.batch_norms():
        mean = sum(weight * norm.table_mean[TRUNCATIONS.index(t)] for t, weight in weights.items())
        var = sum(weight * norm.table_var[TRUNCATIONS.index(t)] for t, weight in weights.items())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return plain


@pytest.mark.parametrize(
    "truncation,weights",
    [
        (None, [0, 0, 1]),
        (0.5, [1, 0, 0]),
        (0.1, [1, 0, 0]),
        (0.75, [0.5, 0.5, 0]),
        (1, [0, 1, 0]),
        (1.25, [0, 0.75, 0.25]),  # From 2, twice the last, on nothing is cut off.
        (7.0, [0, 0, 1]),
    ],
)
def test_the_nearest_tables_are_mixed(truncation, weights):
    tables = TruncationTables(truncations=(0.5, 1.0))
    assert tables.mix([truncation, None]).tolist() == [weights, [0, 0, 1]]
    assert tables.used(truncation) == (weights[-1] < 1)


def test_scaled_latents():
    tables = TruncationTables(truncations=(0.0, 0.5, 1.0), convention="scale")
    z = sample_z([3, 4], 12, 2.0)
    assert torch.equal(tables.latents([3, 4], 12, 0.3), 0.3 * z)
    assert torch.equal(tables.latents([3, 4], 12, None), z)
    with pytest.raises(UserError, match=r"truncation is 1.5: this model scales .* at most by 1"):
        tables.latents([3], 12, 1.5)


def test_scaled_latents_always_use_a_table():
    tables = TruncationTables(truncations=(0.0, 0.5, 1.0), convention="scale")
    assert tables.mix([None, 0.5]).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert tables.used(None)


@pytest.mark.parametrize("truncation,images", [(0.1, 512), (0.5, 512), (2.0, 512), (None, 768)])
def test_moments_are_collected_at_the_truncation(G, truncation, images):
    by_hand = copy.deepcopy(G)
    norms = by_hand.batch_norms()
    for norm in norms:
        norm.train().momentum = 1.0  # What is stored is the newest batch.
    draws, classes, collected = rng(0, Stream.STANDING_STATISTICS), ClassSampler(COUNTS), []
    for _ in range(images // 256):
        z = sample_z(draws.integers(2**62, size=256).tolist(), 12, truncation)
        by_hand(z, classes.draw(draws, 256))
        collected.append([torch.stack([n.running_mean, n.running_var]) for n in norms])
    for norm, batches in zip(G.batch_norms(), zip(*collected, strict=True), strict=True):
        moments = torch.stack([norm.running_mean, norm.running_var])
        if truncation is not None:
            i = TRUNCATIONS.index(truncation)
            moments = torch.stack([norm.table_mean[i], norm.table_var[i]])
        assert torch.allclose(moments, torch.stack(batches).mean(0), rtol=1e-4, atol=1e-5)


def test_collecting_again_changes_nothing(monkeypatch):
    monkeypatch.setattr(candidates, "STANDING_IMAGES", 256)
    monkeypatch.setattr(candidates, "TABLE_IMAGES", 256)
    G = build()
    collect_standing_statistics(G, COUNTS)
    first = {name: value.clone() for name, value in G.state_dict().items()}
    collect_standing_statistics(G, COUNTS)
    assert all(torch.equal(first[name], value) for name, value in G.state_dict().items())
    assert all(norm.momentum == 0.1 and not norm.training for norm in G.batch_norms())


@pytest.mark.parametrize(
    "truncation,weights",
    [
        (0.5, {0.5: 1.0}),
        (0.6, {0.5: 0.6, 0.75: 0.4}),
        (0.05, {0.1: 1.0}),
    ],
)
def test_sampling_uses_the_moments_of_its_truncation(G, truncation, weights):
    expected = with_moments(G, weights)
    z, ids = G.latents([7, 8, 9], truncation), torch.tensor([0, 1, 2])
    assert torch.equal(z, sample_z([7, 8, 9], 12, truncation))
    assert torch.allclose(G(z, ids, truncation), expected(z, ids), atol=1e-5)
    assert not torch.allclose(G(z, ids), expected(z, ids), atol=1e-3)
    drawn = G.sample([0, 1, 2], seed=7, truncation=truncation).astype(int)
    assert np.abs(drawn - expected.sample([0, 1, 2], 7, truncation)).max() <= 1


def test_untruncated_sampling_uses_the_running_moments(G):
    plain = copy.deepcopy(G)
    plain.tables = None
    z, ids = G.latents([7, 8, 9]), torch.tensor([0, 1, 2])
    assert torch.allclose(G(z, ids), plain(z, ids), atol=1e-6)


def test_a_truncation_an_image_is_as_separate_calls(G):
    truncations = [0.5, None, 0.6, 2.0, 0.1]
    z = torch.cat([G.latents([i], t) for i, t in enumerate(truncations)])
    ids = torch.tensor([0, 1, 2, 0, 1])
    together = G.render(z, ids, truncations).astype(int)
    for i, truncation in enumerate(truncations):
        alone = G.sample(int(ids[i]), seed=i, truncation=truncation)[0]
        assert np.abs(together[i] - alone).max() <= 1


def test_the_model_store_keeps_tables(G, tmp_path):
    store = ModelStore("m", str(tmp_path))
    card = ModelCard(name="m", version="v1", created="", code={}, licence="")
    folder = store.add(G, card, G.sample([0, 1, 2]), 3)
    loaded = load_generator(folder.uri)
    assert describe(G).tables == TruncationTables(truncations=TRUNCATIONS, images=512)
    assert describe(loaded) == describe(G)
    for name, value in G.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    ids, difference = [0, 1, 2], 0
    for truncation in (None, 0.3, 0.5):
        expected = G.sample(ids, truncation=truncation).astype(int)
        difference = max(
            difference, np.abs(loaded.sample(ids, truncation=truncation) - expected).max()
        )
    assert difference <= 1
