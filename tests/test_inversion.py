"""The way back from images: arithmetic by hand, images whose latents are known, unseen digits."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from biggan import presets
from biggan.config import ModelConfig
from biggan.data.images import standardize
from biggan.data.sources.digits import DigitsSource
from biggan.directions import find_directions
from biggan.errors import UserError
from biggan.inversion import Inversion, downsample, invert, psnr, ssim, upscale
from biggan.networks import Generator
from biggan.parallel import CPU
from biggan.pixels import from_uint8
from biggan.synthesis import synthesize
from biggan.training import Fakes, Reals, StepInputs, TrainStep, build
from biggan.truncation import TruncationTables


def generator(**changes):
    """Of random weights, with a table of moments that differ from the untruncated ones."""
    torch.manual_seed(0)
    model = ModelConfig(ch_g=4, ch_d=4, z_dim=24, shared_dim=8, **changes)
    G = Generator(model, resolution=8, channels=3, n_classes=4)
    G.add_tables(TruncationTables(truncations=(0.5,)))
    for norm in G.batch_norms():
        norm.table_var.mul_(0.5)
    return G.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def G():
    return generator()


@pytest.fixture(scope="module")
def image(G):
    """One of G's own, from a latent that no search starts from."""
    return G.sample(2, seed=5)[0]


def same(a: Inversion, b: Inversion) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Inversion))


def remade(G, found):
    """The recipes' images, as the endpoint makes them."""
    return synthesize(G, found.recipes, find_directions(G)).astype(int)


def test_downsampling_by_hand():
    image = np.array([[0, 2, 255, 255], [4, 6, 255, 254]], dtype=np.uint8)[..., None]
    assert downsample(image, 2).tolist() == [[[3], [255]]]
    batch = np.stack([image, 255 - image]).repeat(3, axis=3)
    assert downsample(batch, 2)[..., 1].tolist() == [[[3, 255]], [[252, 0]]]
    assert np.array_equal(downsample(image, 1), image)
    for factor in (0, 3, 4):
        with pytest.raises(UserError, match=f"factor {factor}: must divide .* 4 and 2"):
            downsample(image, factor)


def test_psnr_by_hand():
    image = np.full((4, 4, 3), 100, dtype=np.uint8)
    assert psnr(image + np.uint8(10), image) == pytest.approx(20 * math.log10(25.5))
    assert psnr(image, image + np.uint8(10)) == pytest.approx(20 * math.log10(25.5))
    assert psnr(image, image) == pytest.approx(10 * math.log10(12 * 255**2))


def test_ssim_is_wangs_formula():
    """One window for the whole image: moments under Gaussian weights, done again by hand."""
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 7, 7))
    weights = np.exp(-((np.arange(7) - 3) ** 2) / 4.5)
    weights = np.outer(weights, weights) / weights.sum() ** 2

    def mean(x):
        return (weights * x).sum()

    covariance = mean(a * b) - mean(a) * mean(b)
    variances = mean(a**2) - mean(a) ** 2 + mean(b**2) - mean(b) ** 2
    luminance = (2 * mean(a) * mean(b) + 0.0004) / (mean(a) ** 2 + mean(b) ** 2 + 0.0004)
    expected = luminance * (2 * covariance + 0.0036) / (variances + 0.0036)
    pair = [torch.from_numpy(x)[None, None].repeat(1, 3, 1, 1) for x in (a, b)]
    assert ssim(*pair).tolist() == pytest.approx([expected])
    assert ssim(pair[0], pair[0]).tolist() == pytest.approx([1])


@pytest.mark.parametrize(
    "changes", [{}, {"shared": False, "hierarchical": False}, {"architecture": "biggan-deep"}]
)
def test_a_generated_image_is_found_again(changes):
    G = generator(**changes)
    image = G.sample(2, seed=5)[0]
    begun, found = (invert(G, image, steps=steps, candidates=2) for steps in (1, 80))
    assert found.psnr[0] > max(30, begun.psnr[0] + 8)
    assert found.psnr[0] == psnr(found.images[0], image)
    assert list(found.losses) == sorted(found.losses)
    assert found.images.shape == (2, 8, 8, 3)
    assert np.abs(remade(G, found) - found.images).max() <= 1


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_enlarged_images_come_down_to_the_small_one(G, image, factor):
    small = downsample(image, factor)
    found = upscale(G, small, factor=factor, class_ids=[2], candidates=3, steps=80)
    assert found.images.shape == (3, 8, 8, 3)
    boxes = found.images.reshape(3, 8 // factor, factor, 8 // factor, factor, 3)
    errors = np.sqrt(np.square(boxes.mean((2, 4)) - small).mean((1, 2, 3)))
    assert errors[0] < 255 / 10 ** (34 / 20)  # 34 dB.
    assert errors.max() < 255 / 10 ** (26 / 20)
    assert found.psnr == pytest.approx([psnr(downsample(i, factor), small) for i in found.images])
    assert found.psnr[0] > 34
    assert np.abs(found.images[0].astype(int) - found.images[1]).max() > 5
    assert np.abs(remade(G, found) - found.images).max() <= 1
    assert [recipe.classes for recipe in found.recipes] == [{2: 1.0}] * 3


def test_a_truncation_chooses_moments_and_sphere(G):
    image = G.sample(1, seed=5, truncation=0.5)[0]
    found = invert(G, image, truncation=0.5, steps=60, candidates=2)
    assert [recipe.truncation for recipe in found.recipes] == [0.5, 0.5]
    assert found.psnr[0] > 34
    assert np.abs(remade(G, found) - found.images).max() <= 1
    # Standard deviation of a normal within [-t, t]: sqrt(1 - 2 t pdf(t) / (2 cdf(t) - 1)).
    for truncation, deviation in ((0.5, 0.2838), (None, 1.0)):
        found = invert(G, image, truncation=truncation, steps=20)
        norms = [np.linalg.norm(recipe.z) for recipe in found.recipes]
        assert norms == pytest.approx([deviation * math.sqrt(24)] * 4, rel=0.35)


def test_the_class_is_found():
    G = generator()
    G.shared.weight.mul_(4)  # Classes then matter more than latents do.
    for class_id in range(4):
        image = G.sample(class_id, seed=5)[0]
        found = invert(G, image, steps=15)
        assert list(found.recipes[0].classes) == [class_id]
        elsewhere = invert(G, image, steps=15, class_ids=[(class_id + 1) % 4])
        assert list(elsewhere.recipes[0].classes) == [(class_id + 1) % 4]
        assert elsewhere.losses[0] > found.losses[0]


def test_a_seed_gives_the_same_again(G, image):
    found, again, other = (invert(G, image, steps=5, seed=seed) for seed in (1, 1, 2))
    assert same(found, again)
    assert found.recipes != other.recipes


def test_candidates_do_not_mind_each_other(G, image):
    alone = invert(G, image, steps=20, candidates=1)
    together = invert(G, image, steps=20, candidates=5)
    apart = np.abs(together.images.astype(int) - alone.images).max((1, 2, 3))
    assert apart.min() <= 1
    assert len(together.recipes) == 5


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_can_be_called_where_no_gradients_are_kept(G, image, mode):
    with mode():
        found = invert(G, image, steps=5)
    assert same(found, invert(G, image, steps=5))


def test_progress_is_told(G, image):
    told = []
    found = upscale(G, downsample(image, 2), factor=2, steps=34, on_step=told.append)
    assert [(progress.step, progress.steps) for progress in told] == [
        (10, 34), (20, 34), (30, 34), (34, 34)
    ]  # fmt: skip
    assert told[-1].loss < told[0].loss
    assert told[-1].loss == pytest.approx(found.losses[0], rel=0.05)
    for progress in told:
        assert progress.psnr == psnr(downsample(progress.image, 2), downsample(image, 2))
        [made] = synthesize(G, [progress.recipe], None)
        assert np.abs(progress.image.astype(int) - made).max() <= 1
    assert np.abs(told[-1].image.astype(int) - found.images[0]).max() <= 2


def test_a_search_can_be_ended_with_what_it_has(G, image):
    expected, told, asked = [], [], iter(range(1000))
    whole = invert(G, image, steps=40, on_step=expected.append)
    # It is asked after each 16 of the 64 that are drawn, and before each step: here the 23rd.
    found = invert(G, image, steps=40, on_step=told.append, stop=lambda: next(asked) == 4 + 22)
    assert [progress.step for progress in told] == [10, 20, 23]
    assert [progress.loss for progress in told[:2]] == [progress.loss for progress in expected[:2]]
    assert whole.losses[0] < found.losses[0] < expected[1].loss


def test_a_search_that_is_late_already_takes_one_step_from_the_first_that_it_drew(G, image):
    told = []
    found = invert(G, image, candidates=3, on_step=told.append, stop=lambda: True)
    assert [progress.step for progress in told] == [1]
    assert len(found.images) == 3


def test_raising_ends_the_search_and_leaves_nothing(G, image):
    before = {name: tensor.clone() for name, tensor in G.state_dict().items()}
    told = []

    def give_up(progress):
        told.append(progress.step)
        raise TimeoutError("30 seconds are over")

    with pytest.raises(TimeoutError, match="30 seconds"):
        invert(G, image, on_step=give_up)
    assert told == [10]
    assert all(torch.equal(tensor, before[name]) for name, tensor in G.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in G.parameters())


SMALL = np.zeros((4, 4, 3), dtype=np.uint8)
WHOLE = np.zeros((8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "pixels,options,said",
    [
        (SMALL, {}, r"the image is uint8 \[4, 4, 3\], must be uint8 \[8, 8, 3\] for this model"),
        (WHOLE[:, :, :1], {}, r"the image is uint8 \[8, 8, 1\]"),
        (WHOLE.astype(np.float32), {}, r"the image is float32 \[8, 8, 3\], must be uint8"),
        (WHOLE, {"factor": 2}, r"enlarged 2 times is uint8 \[8, 8, 3\], must be uint8 \[4, 4, 3\]"),
        (SMALL, {"factor": 3}, "factor 3: must be 2, 4 or 8"),
        (SMALL, {"factor": 16}, "factor 16: must be 2, 4 or 8"),
        (WHOLE, {"class_ids": []}, "no classes given"),
        (WHOLE, {"class_ids": [4]}, r"class 4 is not in 0..3"),
        (WHOLE, {"candidates": 0}, "candidates is 0, must be 1 or more"),
        (WHOLE, {"steps": 0}, "steps is 0, must be 1 or more"),
        (WHOLE, {"seed": -1}, "seed -1: must be from 0"),
        (WHOLE, {"truncation": 0.0}, r"truncation is 0.0"),
    ],
)
def test_what_cannot_be(G, pixels, options, said):
    with pytest.raises(UserError, match=said):
        (upscale if "factor" in options else invert)(G, pixels, **options)


@pytest.fixture(scope="module")
def scans():
    """The digits as they are prepared: images `[N, 16, 16, 1]`, shuffled, and their classes."""
    source = DigitsSource()
    shuffled = np.random.default_rng(0).permutation(len(source))
    images = [standardize(sample.image(), 16, 1) for sample in source.read(shuffled)]
    return np.stack(images), source.labels[shuffled].astype(int)


def trained_a_little(images, labels, steps):
    """The digits preset's generator after so many steps, on one process."""
    config = presets.digits().override({"ema.decay": 0.95})
    state = build(config, resolution=16, channels=1, n_classes=10, device=CPU)
    step = TrainStep(config, state)
    draws = torch.Generator().manual_seed(0)
    reals, classes = from_uint8(torch.from_numpy(images)).permute(0, 3, 1, 2), labels

    def fakes():
        z = torch.randn(32, 120, generator=draws)
        return Fakes(z, torch.randint(10, (32,), generator=draws))

    for _ in range(steps):
        batch = torch.randint(len(images), (32,), generator=draws)
        real = Reals(reals[batch], torch.from_numpy(classes)[batch])
        step(StepInputs([[(real, fakes())]], [fakes()]))
    return state.G_ema


def test_unseen_digits_are_enlarged_as_what_they_are(scans):
    """A generator of a few seconds, whose samples nobody could read; the benchmark has a whole one.

    At least 80% keep their class, and they come down to what was given, to 30 dB and more.
    """
    images, labels = scans
    unseen, seen = slice(0, 5), slice(100, None)
    G = trained_a_little(images[seen], labels[seen], steps=80)
    svm = SVC(C=10).fit(images[seen].reshape(-1, 256) / 255.0, labels[seen])
    kept, matched = [], []
    for image, label in zip(images[unseen], labels[unseen].tolist(), strict=True):
        small = downsample(image, 2)
        found = upscale(G, small, factor=2, class_ids=[label], candidates=2, steps=100)
        kept.append(svm.predict(found.images[0].reshape(1, -1) / 255.0)[0] == label)
        matched.append(psnr(downsample(found.images[0], 2), small))
    assert np.mean(kept) >= 0.8
    assert min(matched) >= 30
