"""Augmentations against arithmetic by hand, torch's own operations and finite differences."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from biggan.augmentation import (
    NOISE,
    POLICIES,
    Draw,
    adapt_probability,
    adaptive_augment,
    diff_augment,
    flip_and_shift,
)

AUGMENTATIONS = {
    "diff_augment": lambda images, noise: diff_augment(images, noise, tuple(POLICIES)),
    "flip_and_shift": flip_and_shift,
    "adaptive_augment": lambda images, noise: adaptive_augment(images, noise, 0.8),
}
COLUMNS = {
    "diff_augment": range(Draw.BRIGHTNESS, Draw.MIRROR),
    "flip_and_shift": range(Draw.MIRROR, Draw.ADA_FLIP_IF),
    "adaptive_augment": range(Draw.ADA_FLIP_IF, NOISE),
}
each_augmentation = pytest.mark.parametrize(
    "augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys()
)
GATES = [column for column in Draw if column.name.endswith("_IF")]
ONE_SIGMA = torch.special.ndtr(torch.tensor(1.0)).item()


def pictures(n, channels=3, side=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = 2 * torch.rand(n, channels, side, side, generator=generator, dtype=torch.double) - 1
    return images.to(dtype)


def uniform(n, seed=0):
    return torch.rand(n, NOISE, generator=torch.Generator().manual_seed(seed))


def drawn(n=1, **draws):
    """Noise whose every draw is 0.5, and with which ADA at p = 0.5 does only what is named."""
    noise = torch.full((n, NOISE), 0.5)
    for name, value in draws.items():
        noise[:, Draw[name.upper()]] = torch.as_tensor(value)
    return noise


def ada(images, **draws):
    """ADA with the transformations switched on whose parameters are named."""
    names = [column.name for column in Draw]
    gates = {}
    for name in draws:
        column = names.index(f"ADA_{name.upper()}")
        while not names[column].endswith("_IF"):
            column -= 1
        gates[names[column]] = 0.0
    parameters = {f"ada_{name}": value for name, value in draws.items()}
    return adaptive_augment(images, drawn(len(images), **parameters, **gates), 0.5)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_read_no_columns_but_their_own(name):
    images, noise = pictures(16), uniform(16)
    expected = AUGMENTATIONS[name](images, noise)
    foreign = uniform(16, seed=1)
    foreign[:, COLUMNS[name]] = noise[:, COLUMNS[name]]
    assert torch.equal(AUGMENTATIONS[name](images, foreign), expected)


@each_augmentation
def test_an_image_does_not_depend_on_its_neighbours(augment):
    images, noise = pictures(21), uniform(21)
    together = augment(images, noise)
    alone = torch.cat([augment(images[[i]], noise[[i]]) for i in range(21)])
    assert torch.equal(together, alone)


@each_augmentation
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_channels_and_bfloat16_work(augment, channels, dtype):
    images, noise = pictures(8, channels), uniform(8)
    augmented = augment(images.to(dtype), noise)
    assert augmented.shape == images.shape
    assert augmented.dtype == dtype
    rounded = images.to(dtype).float()
    assert torch.allclose(augmented.float(), augment(rounded, noise), rtol=0.01, atol=0.01)
    assert not torch.allclose(augmented.float(), rounded, atol=0.1)


@pytest.mark.parametrize("channels", [1, 5])
def test_channels_that_are_not_rgb_are_not_mixed(channels):
    images, noise = pictures(8, channels), uniform(8)
    for augment in (AUGMENTATIONS["adaptive_augment"], lambda x, n: adaptive_augment(x, n, 1.0)):
        separately = [augment(images[:, [c]], noise) for c in range(channels)]
        assert torch.equal(augment(images, noise), torch.cat(separately, dim=1))
    other = noise.clone()
    other[:, Draw.SATURATION] = uniform(8, seed=1)[:, 0]
    assert torch.equal(
        diff_augment(images, noise, ("color",)), diff_augment(images, other, ("color",))
    )


@each_augmentation
def test_gradients_are_those_of_finite_differences(augment):
    images, noise = pictures(2, side=5, dtype=torch.double).requires_grad_(), uniform(2, seed=3)
    assert torch.autograd.gradcheck(lambda x: augment(x, noise), images)


@each_augmentation
def test_second_derivatives_pass_through_for_gradient_penalties(augment):
    images = pictures(1, side=3, dtype=torch.double).requires_grad_()
    noise = uniform(1, seed=3)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, noise).pow(3).sum(), images)


@each_augmentation
def test_draws_at_either_end_are_harmless(augment):
    images = pictures(2)
    lowest, highest, rounded_up = (torch.full((2, NOISE), end) for end in (0.0, 1 - 2**-24, 1.0))
    for noise in (lowest, highest, rounded_up):
        noise[:, GATES] = 0
    assert augment(images, lowest).isfinite().all()
    assert augment(images, highest).isfinite().all()
    # Contrast and saturation, at their highest, magnify rounding 250-fold.
    assert torch.allclose(augment(images, highest), augment(images, rounded_up), atol=0.02)


# DiffAugment


def test_no_policy_changes_nothing():
    images = pictures(2)
    assert torch.equal(diff_augment(images, uniform(2), ()), images)


def test_color_by_hand():
    images = torch.tensor([[0.3, -0.6, 0.6], [0.0, 0.2, -0.5]]).T.reshape(1, 3, 1, 2)
    noise = drawn(brightness=0.7, saturation=0.25, contrast=0.8)
    # + 0.2: pixels (0.5, -0.4, 0.8) and (0.2, 0.4, -0.3), greys 0.3 and 0.1; saturation 0.5:
    saturated = torch.tensor([[0.4, -0.05, 0.55], [0.15, 0.25, -0.1]]).T.reshape(1, 3, 1, 2)
    expected = 0.2 + (saturated - 0.2) * 1.3  # The mean is 0.2, the contrast 1.3.
    assert torch.allclose(diff_augment(images, noise, ("color",)), expected, atol=1e-6)


@pytest.mark.parametrize("side,most", [(16, 2), (15, 1)])
def test_translation_goes_up_to_an_eighth_and_zeros_come_in(side, most):
    images = pictures(1, side=side)
    moved = diff_augment(images, drawn(translation_x=0.999, translation_y=0.0), ("translation",))
    expected = torch.zeros_like(images)
    expected[:, :, : side - most, most:] = images[:, :, most:, : side - most]
    assert torch.equal(moved, expected)


def test_every_translation_is_equally_likely():
    images = torch.zeros(1, 1, 16, 16)
    images[:, :, 8, 8] = 1
    draws = (torch.arange(1000) + 0.5) / 1000
    noise = drawn(1000, translation_x=draws)
    moved = diff_augment(images.expand(1000, -1, -1, -1), noise, ("translation",)).mean((0, 1))
    expected = torch.zeros(16, 16)
    expected[8, 6:11] = 0.2
    assert torch.allclose(moved, expected, atol=1e-6)


@pytest.mark.parametrize("side", [8, 7, 10])
def test_cutout_removes_a_square_of_half_the_side(side):
    half = side // 2
    cut = diff_augment(torch.ones(1, 2, side, side), drawn(), ("cutout",))
    assert (cut == 0).sum() == 2 * half**2
    # The square's centre can be at the corner, where a quarter of it is in the image.
    cut = diff_augment(
        torch.ones(1, 1, side, side), drawn(cutout_x=0.0, cutout_y=0.999), ("cutout",)
    )
    kept = math.ceil(half / 2)
    assert (cut[:, :, -kept:, :kept] == 0).all()
    assert (cut == 0).sum() == kept**2


def test_the_mean_of_diff_augment_is_as_computed():
    image = pictures(1, side=8, seed=5)
    n = 40_000
    images, noise = image.expand(n, -1, -1, -1), uniform(n)
    # Factors of mean 1 and a summand of mean 0.
    assert torch.allclose(diff_augment(images, noise, ("color",)).mean(0), image[0], atol=0.02)
    # A pixel in the middle lies in 4 of 9 spans of either axis.
    cut = diff_augment(images, noise, ("cutout",)).mean(0)
    middle = slice(3, 5)
    expected = image[0, :, middle, middle] * (1 - (4 / 9) ** 2)
    assert torch.allclose(cut[:, middle, middle], expected, atol=0.02)
    # A shift of -1, 0 or 1 each way averages over 3 x 3 pixels, zeros outside.
    moved = diff_augment(images, noise, ("translation",)).mean(0)
    assert torch.allclose(moved, F.avg_pool2d(image, 3, 1, padding=1)[0], atol=0.02)


# Consistency regularization


def test_flip_and_shift_by_hand():
    images = pictures(1, side=16)
    stayed = flip_and_shift(images, drawn())
    assert torch.equal(stayed, images)
    flipped = flip_and_shift(images, drawn(mirror=0.2))
    assert torch.equal(flipped, images.flip(3))
    moved = flip_and_shift(images, drawn(mirror=0.2, shift_x=0.0, shift_y=0.999))
    padded = F.pad(images.flip(3), (2, 2, 2, 2), mode="reflect")
    assert torch.equal(moved, padded[:, :, :16, 4:])


def test_shifts_are_up_to_4_pixels_at_32():
    image = torch.arange(32.0).expand(1, 1, 32, 32)
    draws = (torch.arange(900) + 0.5) / 900
    moved = flip_and_shift(image.expand(900, -1, -1, -1), drawn(900, shift_x=draws))
    shifts, counts = (16 - moved[:, 0, 16, 16]).unique(return_counts=True)
    assert shifts.tolist() == list(range(-4, 5))
    assert (counts == 100).all()


# ADA


def test_ada_with_probability_0_changes_nothing():
    images = pictures(16)
    assert torch.allclose(adaptive_augment(images, uniform(16), 0.0), images, atol=1e-6, rtol=0)
    grey = pictures(16, channels=1, side=9)
    assert torch.equal(adaptive_augment(grey, uniform(16), torch.tensor(0.0)), grey)


def test_ada_with_probability_1_changes_every_image():
    images = pictures(16)
    changes = (adaptive_augment(images, uniform(16), 1.0) - images).abs().amax((1, 2, 3))
    assert (changes > 0.1).all()


def test_images_whose_augmentations_are_all_off_are_unchanged_beside_others():
    images, noise = pictures(8), uniform(8)
    noise[::2, GATES] = 0.3
    augmented = adaptive_augment(images, noise, 0.3)
    assert torch.allclose(augmented[::2], images[::2], atol=1e-6, rtol=0)
    assert not torch.allclose(augmented[1::2], images[1::2], atol=0.01)


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("quarters", range(4))
def test_a_quarter_turn_is_rot90(quarters, side):
    images = pictures(2, channels=2, side=side)
    turned = ada(images, turn=quarters / 4 + 0.1)
    assert torch.equal(turned, torch.rot90(images, quarters, (2, 3)))


def test_a_flip_is_flip_for_half_of_the_draws():
    images = pictures(2, channels=2)
    assert torch.equal(ada(images, flip=0.9), images.flip(3))
    assert torch.equal(ada(images, flip=0.1), images)


def test_a_shift_by_whole_pixels_is_a_reflected_shift():
    images = pictures(2, channels=2, side=16)
    # (0.9 - 0.5) / 4 of 16 pixels is 1.6, rounded to 2; (0 - 0.5) / 4 of them is -2.
    shifted = ada(images, shift_x=0.9, shift_y=0.0)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    assert torch.equal(shifted, padded[:, :, 4:, :16])


def test_blits_compose_in_the_order_of_the_paper():
    images = pictures(2, channels=2, side=16)
    blitted = ada(images, flip=0.9, turn=0.3, shift_x=0.9, shift_y=0.5)
    turned = torch.rot90(images.flip(3), 1, (2, 3))
    assert torch.equal(blitted, F.pad(turned, (2, 0, 0, 0), mode="reflect")[:, :, :, :16])


def test_the_geometry_is_one_affine_map_as_grid_sample_has_it():
    side, centre = 16, 7.5
    images = pictures(1, channels=2, side=side)
    draws = {
        "flip": 0.9,
        "turn": 0.3,
        "scale": ONE_SIGMA,
        "rotation": 0.6,
        "stretch": ONE_SIGMA,
        "second_rotation": 0.45,
        "drift_x": ONE_SIGMA,
        "drift_y": 1 - ONE_SIGMA,
    }

    def rotation(angle):  # Counter-clockwise as seen, in coordinates whose y points down.
        cos, sin = math.cos(angle), math.sin(angle)
        return np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])

    s = 2**0.2
    shift = 0.125 * side
    forward = (
        np.array([[1, 0, shift], [0, 1, -shift], [0, 0, 1]])
        @ rotation(-0.1 * math.pi)
        @ np.diag([s, 1 / s, 1])
        @ rotation(0.2 * math.pi)
        @ np.diag([s, s, 1])
        @ rotation(math.pi / 2)
        @ np.diag([-1, 1, 1])
    )
    # grid_sample's coordinates are -1 and 1 at the centres of the outermost pixels.
    normalized = np.diag([1 / centre, 1 / centre, 1])
    theta = normalized @ np.linalg.inv(forward) @ np.linalg.inv(normalized)
    grid = F.affine_grid(
        torch.from_numpy(theta[None, :2]).float(), list(images.shape), align_corners=True
    )
    expected = F.grid_sample(images, grid, padding_mode="reflection", align_corners=True)
    assert torch.allclose(ada(images, **draws), expected, atol=1e-4)


def test_brightness_and_contrast_by_hand():
    images = pictures(1, channels=1)
    augmented = ada(images, brightness=ONE_SIGMA, contrast=1 - ONE_SIGMA)
    assert torch.allclose(augmented, (images + 0.2) * 2**-0.5, atol=1e-6)


def test_colour_is_the_product_of_the_papers_matrices():
    images = pictures(2)
    augmented = ada(images, luma_flip=0.9, hue=0.8, saturation=ONE_SIGMA)
    v = torch.full((3, 1), 1 / math.sqrt(3))
    along = v @ v.T
    flip = torch.eye(3) - 2 * along
    generator = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = torch.linalg.matrix_exp(0.6 * math.pi * generator)
    saturation = along + 2 * (torch.eye(3) - along)
    expected = torch.einsum("ij,njhw->nihw", saturation @ hue @ flip, images)
    assert torch.allclose(augmented, expected, atol=1e-5)


def test_a_third_of_a_hue_turn_permutes_the_channels():
    images = pictures(2)
    assert torch.allclose(ada(images, hue=5 / 6), images.roll(1, dims=1), atol=1e-6)


def test_flipping_the_luma_negates_grey():
    grey = pictures(2, channels=1).expand(-1, 3, -1, -1)
    assert torch.allclose(ada(grey, luma_flip=0.9), -grey, atol=1e-6)
    assert torch.allclose(ada(grey, luma_flip=0.1), grey, atol=1e-6)


TRANSFORMATIONS = {
    "flip": "flip",
    "turn": "turn",
    "shift": "shift_x",
    "scale": "scale",
    "rotation": "rotation",
    "stretch": "stretch",
    "second_rotation": "second_rotation",
    "drift": "drift_y",
    "brightness": "brightness",
    "contrast": "contrast",
    "luma_flip": "luma_flip",
    "hue": "hue",
    "saturation": "saturation",
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_each_transformation_has_its_probability(name):
    p, n = 0.64, 100
    draws = {f"ada_{other}_if": 0.999 for other in TRANSFORMATIONS}
    draws[f"ada_{name}_if"] = torch.arange(n) / n
    draws[f"ada_{TRANSFORMATIONS[name]}"] = 0.9
    images = pictures(1).expand(n, -1, -1, -1)
    augmented = adaptive_augment(images, drawn(n, **draws), torch.tensor(p))
    changed = ((augmented - images).abs().amax((1, 2, 3)) > 0.01).sum().item()
    # Of the two rotations at least one happens with probability p: 1 - 0.6 * 0.6 is 0.64.
    assert changed == (40 if "rotation" in name else 64)


def test_p_moves_by_the_images_shown_and_stays_a_probability():
    p = torch.tensor(0.5)
    overfitting, healthy = torch.tensor(0.9), torch.tensor(0.1)
    assert adapt_probability(p, overfitting, 5000).item() == pytest.approx(0.51)
    assert adapt_probability(p, healthy, 5000).item() == pytest.approx(0.49)
    assert adapt_probability(p, healthy, 5000, target=0.05).item() == pytest.approx(0.51)
    assert adapt_probability(p, healthy, 5000, kimg_to_one=50).item() == pytest.approx(0.4)
    assert adapt_probability(p, torch.tensor(0.6), 5000).item() == 0.5
    assert adapt_probability(torch.tensor(1.0), overfitting, 64).item() == 1
    assert adapt_probability(torch.tensor(0.0), healthy, 64).item() == 0
    moved = adapt_probability(p, overfitting.double(), 64)
    assert moved.shape == ()
    assert moved.dtype == p.dtype
