"""Moments against numpy; the Frechet distance against scipy, a factor form, and by hand."""

import time

import numpy as np
import pytest
import scipy.linalg
import torch

from biggan.metrics.frechet import Moments, frechet_distance


def test_moments_are_numpys():
    rng = np.random.default_rng(0)
    features = rng.normal(3, 2, (100, 7))
    whole, parts = Moments(7), [Moments(7), Moments(7)]
    whole.update(torch.from_numpy(features))
    for part, rows in zip(parts, (features[:33], features[33:]), strict=True):
        part.update(torch.from_numpy(rows))
    parts[0].sums += parts[1].sums
    for moments in (whole, parts[0]):
        assert moments.count == 100
        assert np.allclose(moments.mean, features.mean(0), rtol=1e-12)
        assert np.allclose(moments.covariance, np.cov(features.T), rtol=1e-10)


def test_moments_of_float32_features_are_those_in_float64():
    features = torch.rand(300, 5) + 1000  # In float32 their squares would have 2 digits left.
    moments = Moments(5)
    for part in features.split(7):
        moments.update(part)
    assert np.allclose(moments.covariance, np.cov(features.double().numpy().T), rtol=1e-8)


def test_a_covariance_needs_two_images():
    moments = Moments(3)
    moments.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = moments.covariance


def spread(n, d, seed, decay=0.0, dead=0):
    """Features `[n, d]` whose deviations fall by 10^-decay, the first `dead` of them constant."""
    mix = np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0]
    x = np.random.default_rng(seed).normal(1, 1, (n, d)) * 10 ** (-decay * np.arange(d) / d) @ mix
    x[:, :dead] = 0.25
    return x * (1 + 0.1 * seed) + 0.1 * seed


def moments_of(x):
    return torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x.T))


def distance(a, b):
    return frechet_distance(*moments_of(a), *moments_of(b))


def with_sqrtm(a, b):
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return gap + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * np.trace(root)


def with_factors(a, b):
    """From the centred features themselves: tr (C1 C2)^(1/2) is the nuclear norm of X Y^T."""
    x, y = (np.linalg.qr((z - z.mean(0)) / np.sqrt(len(z) - 1), "r") for z in (a, b))
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return gap + (x**2).sum() + (y**2).sum() - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum()


SHAPES = {
    "regular": (500, 500, {}),
    "singular": (20, 30, {}),
    "one singular": (20, 500, {}),
    "barely regular": (65, 65, {}),
    "uneven": (500, 500, {"decay": 6}),
    "singular and uneven": (40, 40, {"decay": 4}),
    "dead features": (500, 500, {"dead": 9}),
}


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize("n,m,kind", SHAPES.values(), ids=SHAPES)
def test_against_sqrtm_and_the_factors(n, m, kind):
    a, b = spread(n, 64, 1, **kind), spread(m, 64, 2, **kind)
    assert distance(a, b) == pytest.approx(with_factors(a, b), rel=1e-9)
    assert distance(a, b) == pytest.approx(with_sqrtm(a, b), rel=1e-6)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-12)


def test_500_images_of_2048_dimensions():
    a, b = (np.random.default_rng(i).normal(0, 1 + i / 10, (500, 2048)) for i in (1, 2))
    assert distance(a, b) == pytest.approx(with_factors(a, b), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize("n", [200, 2000], ids=["singular", "regular"])
def test_several_times_faster_than_sqrtm(n):
    a, b = spread(n, 768, 1, decay=1), spread(n, 768, 2, decay=1)
    moments = (*moments_of(a), *moments_of(b))
    frechet_distance(*moments)
    begin = time.perf_counter()
    ours = frechet_distance(*moments)
    took = time.perf_counter() - begin
    begin = time.perf_counter()
    theirs = with_sqrtm(a, b)
    # benchmarks/fid.py measures it in earnest; less is asked for where other work may run.
    assert took * 3 < time.perf_counter() - begin
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_features_alive_on_one_side_only():
    a, b = spread(300, 12, 1), spread(300, 12, 2)
    a[:, :6], b[:, 6:] = 0, 0  # C1 C2 = 0: nothing is shared.
    expected = np.square(a.mean(0) - b.mean(0)).sum() + a.var(0, ddof=1).sum()
    assert distance(a, b) == pytest.approx(expected + b.var(0, ddof=1).sum(), rel=1e-12)


def test_frechet_distance_of_gaussians_by_hand():
    # In one dimension: (m1 - m2)^2 + (s1 - s2)^2.
    m1, m2 = torch.tensor([1.0]).double(), torch.tensor([4.0]).double()
    c1, c2 = torch.tensor([[4.0]]).double(), torch.tensor([[25.0]]).double()
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(9 + 9)
    assert frechet_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(m1, c1, m1, 0 * c1) == pytest.approx(4)


def test_a_set_is_at_no_distance_from_itself():
    for n in (40, 500):
        a = spread(n, 64, 1, decay=3)
        assert distance(a, a) == pytest.approx(0, abs=1e-10)


def test_moments_that_are_not_finite():
    mean, cov = torch.zeros(2).double(), torch.eye(2).double()
    with pytest.raises(ValueError, match="look for NaN among the features"):
        frechet_distance(mean, cov, mean, cov * torch.nan)
