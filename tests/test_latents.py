"""Random draws are functions of what they are for, and have the distributions they should."""

import numpy as np
import pytest
import torch
from scipy import stats

from biggan.latents import ClassSampler, Stream, rng, sample_z


def test_a_seed_gives_its_latent_whatever_the_batch():
    together = sample_z([5, 6, 7], 40, truncation=0.7)
    assert torch.equal(together[1], sample_z([6], 40, truncation=0.7)[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("truncation", [None, 2.0, 0.5])
def test_latents_are_a_truncated_normal(truncation):
    z = sample_z(range(200), 500, truncation).numpy().ravel()
    bound = truncation or 40.0
    assert np.abs(z).max() <= bound
    assert stats.kstest(z, stats.truncnorm(-bound, bound).cdf).pvalue > 1e-3


def test_truncation_moves_latents_smoothly():
    wide, narrow = sample_z([3], 100, 0.51), sample_z([3], 100, 0.5)
    assert (wide - narrow).abs().max() < 0.02


@pytest.mark.parametrize("truncation", [0, -1, float("nan"), float("inf")])
def test_unusable_truncation(truncation):
    with pytest.raises(ValueError, match=f"truncation is {truncation}"):
        sample_z([0], 4, truncation)


def test_draws_depend_on_seed_stream_and_counter_alone():
    def draw(*key):
        return rng(*key).random()

    draws = [draw(s, t, c) for s in (0, 1) for t in (Stream.FLIPS, Stream.SPLIT) for c in (0, 1)]
    assert len(set(draws)) == 8
    assert draw(1, Stream.FLIPS, 1) == draw(1, Stream.FLIPS, 1)


def test_classes_are_drawn_in_the_datasets_proportions():
    sampler = ClassSampler([10, 0, 30])
    drawn = sampler.draw(np.random.default_rng(0), 40_000)
    assert torch.bincount(drawn, minlength=3)[1] == 0
    assert abs((drawn == 0).float().mean() - 0.25) < 0.01
    assert torch.bincount(sampler.spread(8)).tolist() == [2, 0, 6]
