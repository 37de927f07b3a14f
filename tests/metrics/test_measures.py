"""Measures against plain numpy, and against arithmetic done by hand."""

import math

import numpy as np
import pytest
import torch

from biggan.errors import UserError
from biggan.latents import Stream, rng
from biggan.metrics import measures
from biggan.metrics.frechet import Moments, frechet_distance
from biggan.metrics.measures import (
    class_accuracy,
    density_coverage,
    inception_score,
    intra_class_fid,
    kernel_distance,
    manifold,
    precision_recall,
)


def draw(n, d=6, seed=0, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (n, d))).float()


# KID.


def mmd_done_again(x, y):
    """The unbiased estimate with its double sums written out."""
    k = [[(a @ b / len(a) + 1) ** 3 for b in (*x, *y)] for a in (*x, *y)]
    n, m = len(x), len(y)
    within_x = sum(k[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k[n + i][n + j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k[i][n + j] for i in range(n) for j in range(m)) / (n * m)


def test_kernel_distance_of_whole_sets():
    x, y = draw(12), draw(12, seed=1, shift=0.3)
    mean, deviation = kernel_distance(x, y)
    expected = mmd_done_again(x.double().numpy(), y.double().numpy())
    assert mean == pytest.approx(expected, rel=1e-12)
    assert deviation == 0


def test_kernel_distance_over_subsets():
    x, y = draw(40), draw(30, seed=1, shift=0.3)
    draws = rng(7, Stream.MEASURES)
    values = []
    for _ in range(5):
        rows = [draws.choice(n, 10, replace=False) for n in (40, 30)]
        values.append(mmd_done_again(x.double().numpy()[rows[0]], y.double().numpy()[rows[1]]))
    measured = kernel_distance(x, y, subsets=5, subset_size=10, seed=7)
    assert measured == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)
    assert kernel_distance(x, y, subsets=5, subset_size=10, seed=8) != measured


def test_kernel_distance_by_hand():
    # One feature. k(a, b) = (ab + 1)^3: of 0 and 1 it is 1, of 1 and 1 it is 8.
    zeros, ones = torch.zeros(2, 1), torch.ones(2, 1)
    assert kernel_distance(zeros, ones)[0] == 1 + 8 - 2 * 1


def test_kernel_distance_is_unbiased():
    """Over pairs of sets of one distribution it is 0 in the mean."""
    values = [kernel_distance(draw(50, seed=i), draw(50, seed=1000 + i))[0] for i in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(200)


# The Inception Score.


def test_inception_score_by_hand():
    sure = torch.eye(4).repeat(5, 1) * 1e4  # Sure of each image, all classes alike: as many.
    assert inception_score(sure, splits=1) == (pytest.approx(4), 0)
    assert inception_score(torch.zeros(20, 4)) == (pytest.approx(1), pytest.approx(0))
    # Two images, p = (3/4, 1/4) and (1/4, 3/4), mean (1/2, 1/2).
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    assert inception_score(logits, splits=1)[0] == pytest.approx(math.exp(kl), rel=1e-6)


def test_inception_score_done_again():
    logits = draw(53, 9) * 3
    p = logits.double().softmax(1).numpy()
    parts = [p[i * 53 // 5 : (i + 1) * 53 // 5] for i in range(5)]
    scores = [np.exp((x * np.log(x / x.mean(0))).sum(1).mean()) for x in parts]
    expected = np.mean(scores), np.std(scores)
    assert inception_score(logits, 5, seed=None) == pytest.approx(expected, rel=1e-10)
    assert inception_score(logits, 5) == inception_score(logits, 5)


def test_inception_score_of_samples_ordered_by_class():
    sure = (torch.eye(10) * 100).repeat_interleave(100, 0)
    assert inception_score(sure)[0] > 9  # Parts taken in order would each have one class: 1.


# Precision, recall, density, coverage.


def balls_done_again(real, fake, k):
    real, fake = real.double().numpy(), fake.double().numpy()

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    radius_real = np.sort(distances(real, real), 1)[:, k]  # [:, 0] is the image itself.
    radius_fake = np.sort(distances(fake, fake), 1)[:, k]
    across = distances(real, fake)
    return (
        (across <= radius_real[:, None]).any(0).mean(),
        (across <= radius_fake).any(1).mean(),
        (across < radius_real[:, None]).sum(0).mean() / k,
        (across < radius_real[:, None]).any(1).mean(),
    )


@pytest.mark.parametrize("block", [2**24, 1000])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifold_done_again(monkeypatch, block, k):
    monkeypatch.setattr(measures, "BLOCK", block)
    monkeypatch.setattr(measures, "TILE", 64)
    real, fake = draw(150), draw(170, seed=1, shift=0.5) * 1.1
    expected = balls_done_again(real, fake, k)
    assert min(expected) > 0
    measured = *precision_recall(real, fake, k), *density_coverage(real, fake, k)
    assert measured == pytest.approx(expected, rel=1e-12)
    both = manifold(real, fake, k, 5)
    assert (both.precision, both.recall) == measured[:2]
    assert (both.density, both.coverage) == density_coverage(real, fake, 5)


def test_balls_by_hand():
    # Balls around 0, 1 and 3 that reach to the nearest other: radii 1, 1 and 2.
    real = torch.tensor([[0.0], [1.0], [3.0]])
    fake = torch.tensor([[-1.0], [0.5], [100.0], [101.0]])
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == 2 / 4  # -1 lies on the surface of a ball, 0.5 in two.
    # Fakes' radii: 1.5, 1.5, 1, 1. 0 and 1 lie within 1.5 of 0.5; 3 in no ball.
    assert recall == pytest.approx(2 / 3)
    density, coverage = density_coverage(real, fake, k=1)
    assert density == 2 / 4  # 0.5 lies in the balls of 0 and 1; -1 only on a surface.
    assert coverage == pytest.approx(2 / 3)


def test_a_set_against_itself():
    real = draw(300, 32)
    assert manifold(real, real) == measures.Manifold(1, 1, 1, 1)


def test_collapse_and_noise():
    real = draw(200, 16)
    collapsed = manifold(real, real[:1] + 1e-3 * draw(200, 16, seed=2))
    assert collapsed.precision == 1
    assert collapsed.recall < 0.05
    assert collapsed.coverage < 0.2
    far = manifold(real, real + 100)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


# Within classes.


def test_intra_class_fid_done_again():
    real, fake = draw(60, 4), draw(45, 4, seed=1, shift=0.4)
    real_labels = torch.arange(60) % 3
    fake_labels = torch.cat([torch.arange(44) % 2, torch.tensor([2])])
    measured = intra_class_fid(real, real_labels, fake, fake_labels, n_classes=4)
    for class_id in (0, 1):
        sides = []
        for features, labels in ((real, real_labels), (fake, fake_labels)):
            moments = Moments(4)
            moments.update(features[labels == class_id])
            sides += [moments.mean, moments.covariance]
        assert measured.per_class[class_id] == pytest.approx(frechet_distance(*sides), rel=1e-9)
    assert measured.per_class[2:] == (None, None)  # One fake; nothing.
    assert measured.mean == pytest.approx(sum(measured.per_class[:2]) / 2)


def test_intra_class_fid_of_few_images_is_that_of_their_moments():
    real, fake = draw(9, 20), draw(7, 20, seed=1, shift=0.4)
    measured = intra_class_fid(real, torch.zeros(9), fake, torch.zeros(7), n_classes=1)
    sides = []
    for features in (real, fake):
        moments = Moments(20)
        moments.update(features)
        sides += [moments.mean, moments.covariance]
    assert measured.mean == pytest.approx(frechet_distance(*sides), rel=1e-9)


def test_intra_class_fid_without_any_class():
    measured = intra_class_fid(draw(1), torch.zeros(1), draw(1), torch.zeros(1), n_classes=2)
    assert measured.mean is None


def test_class_accuracy_by_hand():
    logits = torch.tensor([[3.0, 1, 0], [0, 2, 1], [0, 1, 2], [5, 0, 0]])
    assert class_accuracy(logits, torch.tensor([0, 1, 0, 0])) == 0.75


@pytest.mark.parametrize(
    "measure,message",
    [
        (lambda: kernel_distance(draw(1), draw(5)), "of 5 images against 1, in 100 subsets"),
        (lambda: inception_score(draw(0)), "of 0 images in 0 parts"),
        (lambda: manifold(draw(5), draw(9)), "5 nearest neighbours among 5 images.*at least 6"),
        (lambda: precision_recall(draw(9), draw(9), k=0), "0 nearest neighbours"),
        (lambda: class_accuracy(draw(3), torch.zeros(2)), "3 logits for 2 labels"),
    ],
)
def test_too_little_to_measure(measure, message):
    with pytest.raises(UserError, match=message):
        measure()
