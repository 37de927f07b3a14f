"""Augmentations of what D sees: DiffAugment, ADA, and those of consistency regularization.

Images are `[N, C, H, W]` in [-1, 1], with any number of channels. Every augmentation is
differentiable in them, and a pure function of them and of `noise`: float32 `[N, NOISE]`,
independent uniform numbers in [0, 1), a row an image. Nothing is drawn here, so a resumed run
augments as the uninterrupted one would have, and any number of workers as one.

Arithmetic is in float32 at least; results have the dtype of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum, auto

import torch
import torch.nn.functional as F
from torch import Tensor


class Draw(IntEnum):
    """What each column of noise decides. No two augmentations share one.

    In ADA a column "..._IF" decides whether an image is transformed at all, those after it how.
    """

    # diff_augment
    BRIGHTNESS = 0
    SATURATION = auto()
    CONTRAST = auto()
    TRANSLATION_X = auto()
    TRANSLATION_Y = auto()
    CUTOUT_X = auto()
    CUTOUT_Y = auto()
    # flip_and_shift
    MIRROR = auto()
    SHIFT_X = auto()
    SHIFT_Y = auto()
    # adaptive_augment, in the order of the paper
    ADA_FLIP_IF = auto()
    ADA_FLIP = auto()
    ADA_TURN_IF = auto()
    ADA_TURN = auto()
    ADA_SHIFT_IF = auto()
    ADA_SHIFT_X = auto()
    ADA_SHIFT_Y = auto()
    ADA_SCALE_IF = auto()
    ADA_SCALE = auto()
    ADA_ROTATION_IF = auto()
    ADA_ROTATION = auto()
    ADA_STRETCH_IF = auto()
    ADA_STRETCH = auto()
    ADA_SECOND_ROTATION_IF = auto()
    ADA_SECOND_ROTATION = auto()
    ADA_DRIFT_IF = auto()
    ADA_DRIFT_X = auto()
    ADA_DRIFT_Y = auto()
    ADA_BRIGHTNESS_IF = auto()
    ADA_BRIGHTNESS = auto()
    ADA_CONTRAST_IF = auto()
    ADA_CONTRAST = auto()
    ADA_LUMA_FLIP_IF = auto()
    ADA_LUMA_FLIP = auto()
    ADA_HUE_IF = auto()
    ADA_HUE = auto()
    ADA_SATURATION_IF = auto()
    ADA_SATURATION = auto()


NOISE = len(Draw)
"""Uniform numbers that one image takes."""


def diff_augment(images: Tensor, noise: Tensor, policy: tuple[str, ...]) -> Tensor:
    """DiffAugment (Zhao, Liu, Lin, Zhu and Han 2020, arXiv 2006.10738, section 3).

    `policy` names steps of `POLICIES`, taken in its order. All images undergo each of them.
    """
    augmented = _widened(images)
    for name in policy:
        augmented = POLICIES[name](augmented, noise)
    return augmented.to(images.dtype)


def _color(images: Tensor, noise: Tensor) -> Tensor:
    """Brightness + U(-1/2, 1/2), saturation (of RGB) * U(0, 2), contrast * U(1/2, 3/2)."""
    images = images + (_per_image(noise, Draw.BRIGHTNESS) - 0.5)
    if images.shape[1] == 3:
        grey = images.mean(1, keepdim=True)
        images = grey + (images - grey) * (2 * _per_image(noise, Draw.SATURATION))
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (_per_image(noise, Draw.CONTRAST) + 0.5)


def _translation(images: Tensor, noise: Tensor) -> Tensor:
    """A whole number of pixels each way, up to an eighth of the side; zeros come in."""
    H, W = images.shape[2:]
    rows = _arange(H, noise) - _symmetric(noise[:, Draw.TRANSLATION_Y], H // 8)[:, None]
    columns = _arange(W, noise) - _symmetric(noise[:, Draw.TRANSLATION_X], W // 8)[:, None]
    inside = _outer((rows >= 0) & (rows < H), (columns >= 0) & (columns < W))
    return _pixels(images, rows[:, :, None], columns[:, None, :]) * inside


def _cutout(images: Tensor, noise: Tensor) -> Tensor:
    """A square of half the side becomes zero; its centre is anywhere in the image."""
    H, W = images.shape[2:]
    hole = _outer(_half_span(noise[:, Draw.CUTOUT_Y], H), _half_span(noise[:, Draw.CUTOUT_X], W))
    return images * ~hole


def _half_span(uniform: Tensor, side: int) -> Tensor:
    """Which of `side` pixels lie in a random span of half as many: bool `[N, side]`."""
    length = side // 2
    # An even span has its centre between pixels, where there is one more place for it.
    places = side + 1 - length % 2
    start = _integer(uniform, places)[:, None] - length // 2
    pixels = _arange(side, uniform)
    return (pixels >= start) & (pixels < start + length)


POLICIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}


def flip_and_shift(images: Tensor, noise: Tensor) -> Tensor:
    """The augmentation of consistency regularization (Zhang et al. 2019, arXiv 1910.12027).

    A horizontal flip with probability 1/2, then a shift by up to an eighth of the side each way
    (4 pixels at 32), reflected at the border.
    """
    H, W = images.shape[2:]
    rows = _arange(H, noise) - _symmetric(noise[:, Draw.SHIFT_Y], H // 8)[:, None]
    columns = _arange(W, noise) - _symmetric(noise[:, Draw.SHIFT_X], W // 8)[:, None]
    flipped = noise[:, Draw.MIRROR, None] < 0.5
    columns = torch.where(flipped, W - 1 - columns, columns)
    augmented = _pixels(_widened(images), rows[:, :, None], columns[:, None, :])
    return augmented.to(images.dtype)


def adaptive_augment(images: Tensor, noise: Tensor, p: Tensor | float) -> Tensor:
    """ADA's "bgc" pipeline (Karras et al. 2020, arXiv 2006.06676, appendix B).

    Each transformation is applied to an image with probability `p`, in [0, 1] and 0-dimensional:
    pixel blitting, general geometry and colour, with the paper's parameters. All geometry is
    one affine map, through which an image is resampled once, reflected at the border; blitting by
    itself moves pixels exactly. Images are meant to be square: a quarter turn of others does not
    change H and W.

    The resampling is bilinear. The authors' release upsamples before it and low-pass filters
    after it with wavelets (sym6), which aliases and blurs less; and it flips the luma of
    grey images too, while here only RGB has a luma, a hue and a saturation.
    """
    p = torch.as_tensor(p, dtype=torch.float32, device=images.device)
    H, W = images.shape[2:]
    to_source = _compose([*_blits(noise, p, H, W), *_geometry(noise, p, H, W)])
    augmented = _resample(_widened(images), to_source)
    augmented = _brightness_and_contrast(augmented, noise, p)
    if images.shape[1] == 3:
        augmented = _luma_and_chroma(augmented, noise, p)
    return augmented.to(images.dtype)


def adapt_probability(
    p: Tensor,
    sign_mean: Tensor,
    images: int,
    target: float = 0.6,
    kimg_to_one: float = 500.0,
) -> Tensor:
    """ADA's new p after `images` more images (Karras et al. 2020, section 3): 0-dimensional.

    `sign_mean` is r_t = E[sign D(x)] over real images, eq. 1, over all workers. p rises while it
    exceeds `target`, which is when D overfits, and falls while it is below; from 0 to 1 takes
    `kimg_to_one` thousand images.
    """
    step = torch.sign(sign_mean - target) * (images / (1000 * kimg_to_one))
    return (p + step.to(p)).clamp(0, 1)


def _blits(noise: Tensor, p: Tensor, H: int, W: int) -> list[Tensor]:
    """Flip, quarter turn, shift by whole pixels: maps `[N, 3, 3]` to where each pixel came from."""
    flip = _gated(noise, Draw.ADA_FLIP_IF, p, _integer(noise[:, Draw.ADA_FLIP], 2), 0)
    turns = _gated(noise, Draw.ADA_TURN_IF, p, _integer(noise[:, Draw.ADA_TURN], 4), 0)
    quarter = turns * (math.pi / 2)
    eighth = noise[:, [Draw.ADA_SHIFT_X, Draw.ADA_SHIFT_Y]] / 4 - 0.125
    right = _gated(noise, Draw.ADA_SHIFT_IF, p, (eighth[:, 0] * W).round(), 0)
    down = _gated(noise, Draw.ADA_SHIFT_IF, p, (eighth[:, 1] * H).round(), 0)
    return [
        _scaling(1.0 - 2 * flip, torch.ones_like(right)),
        # Rounded, for cos(pi / 2) is not quite 0 in floats and blits are to be exact.
        _rotation(quarter.cos().round(), quarter.sin().round()),
        _translating(-right, -down),
    ]


def _geometry(noise: Tensor, p: Tensor, H: int, W: int) -> list[Tensor]:
    """Scale, rotate, stretch, rotate, translate: maps `[N, 3, 3]` as in `_blits`.

    The chance of at least one of the two rotations is p.
    """
    p_rotation = 1 - (1 - p).sqrt()
    angle, second_angle = (
        _gated(noise, gate, p_rotation, (2 * noise[:, gate + 1] - 1) * math.pi, 0)
        for gate in (Draw.ADA_ROTATION_IF, Draw.ADA_SECOND_ROTATION_IF)
    )
    scale, stretch = (
        _gated(noise, gate, p, (0.2 * _normal(noise[:, gate + 1])).exp2(), 1)
        for gate in (Draw.ADA_SCALE_IF, Draw.ADA_STRETCH_IF)
    )
    right = 0.125 * W * _normal(noise[:, Draw.ADA_DRIFT_X])
    down = 0.125 * H * _normal(noise[:, Draw.ADA_DRIFT_Y])
    return [
        _scaling(1 / scale, 1 / scale),
        _rotation(angle.cos(), angle.sin()),
        _scaling(1 / stretch, stretch),
        _rotation(second_angle.cos(), second_angle.sin()),
        _translating(
            _gated(noise, Draw.ADA_DRIFT_IF, p, -right, 0),
            _gated(noise, Draw.ADA_DRIFT_IF, p, -down, 0),
        ),
    ]


def _brightness_and_contrast(images: Tensor, noise: Tensor, p: Tensor) -> Tensor:
    """(x + b) * c with b ~ N(0, 0.2^2) and log2 c ~ N(0, 0.5^2)."""
    b = 0.2 * _normal(noise[:, Draw.ADA_BRIGHTNESS])
    c = (0.5 * _normal(noise[:, Draw.ADA_CONTRAST])).exp2()
    b = _gated(noise, Draw.ADA_BRIGHTNESS_IF, p, b, 0)
    c = _gated(noise, Draw.ADA_CONTRAST_IF, p, c, 1)
    return (images + b[:, None, None, None]) * c[:, None, None, None]


def _luma_and_chroma(images: Tensor, noise: Tensor, p: Tensor) -> Tensor:
    """Luma flip, hue rotation and saturation (log2 s ~ N(0, 1)) of RGB images.

    The luma axis is v = (1, 1, 1) / sqrt 3. The flip negates what lies along it, the mean of the
    channels; the other two turn and scale what is orthogonal to it; so none disturbs another.
    """
    flip = _gated(noise, Draw.ADA_LUMA_FLIP_IF, p, _integer(noise[:, Draw.ADA_LUMA_FLIP], 2), 0)
    hue = _gated(noise, Draw.ADA_HUE_IF, p, (2 * noise[:, Draw.ADA_HUE] - 1) * math.pi, 0)
    s = _gated(noise, Draw.ADA_SATURATION_IF, p, _normal(noise[:, Draw.ADA_SATURATION]).exp2(), 1)
    luma = images.mean(1, keepdim=True)
    chroma = images - luma
    # Rodrigues' formula: v x chroma, in which v's equal components leave differences of channels.
    crossed = (chroma.roll(1, dims=1) - chroma.roll(-1, dims=1)) / math.sqrt(3)
    along, across = ((s * f)[:, None, None, None] for f in (hue.cos(), hue.sin()))
    return luma * (1 - 2 * flip)[:, None, None, None] + along * chroma + across * crossed


# What follows makes affine maps, [N, 3, 3], of pixel coordinates (x, y, 1) about the centre.


def _linear(xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    zero, one = torch.zeros_like(xx), torch.ones_like(xx)
    return torch.stack([xx, xy, zero, yx, yy, zero, zero, zero, one], 1).view(-1, 3, 3)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return _linear(x, torch.zeros_like(x), torch.zeros_like(x), y)


def _rotation(cos: Tensor, sin: Tensor) -> Tensor:
    return _linear(cos, -sin, sin, cos)


def _translating(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return torch.stack([one, zero, x, zero, one, y, zero, zero, one], 1).view(-1, 3, 3)


def _compose(maps: list[Tensor]) -> Tensor:
    """The product of the maps. Not by matmul, which autocast and TF32 would make inexact."""
    product = maps[0]
    for factor in maps[1:]:
        product = (product[:, :, :, None] * factor[:, None]).sum(2)
    return product


def _resample(images: Tensor, to_source: Tensor) -> Tensor:
    """Each pixel interpolated bilinearly where `to_source` sends it; exact at pixel centres."""
    H, W = images.shape[2:]
    x = _arange(W, images) - (W - 1) / 2
    y = _arange(H, images)[:, None] - (H - 1) / 2
    (xx, xy, x0), (yx, yy, y0), _ = to_source[..., None, None].permute(1, 2, 0, 3, 4)
    column = xx * x + xy * y + x0 + (W - 1) / 2
    row = yx * x + yy * y + y0 + (H - 1) / 2
    left, top = column.floor(), row.floor()
    # The four neighbours in one look-up: [4, N, H, W].
    rows = torch.stack([top, top, top + 1, top + 1]).long()
    columns = torch.stack([left, left + 1, left, left + 1]).long()
    right_part, lower_part = column - left, row - top
    upper_part = 1 - lower_part
    weights = torch.stack(
        [
            upper_part * (1 - right_part),
            upper_part * right_part,
            lower_part * (1 - right_part),
            lower_part * right_part,
        ]
    )
    return (_pixels(images, rows, columns) * weights[:, :, None]).sum(0)


def _pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of each image at whole coordinates, reflected at the border: `[..., N, C, h, w]`.

    `rows` and `columns` broadcast to `[..., N, h, w]`. An embedding looks them up, since its
    gradient adds in a fixed order; those of `gather` (on GPUs), of indexing (on CPUs) and of
    `grid_sample` do not, and the last cannot be differentiated twice, as R1 wants.
    """
    N, C, H, W = images.shape
    first = torch.arange(N, device=images.device)[:, None, None] * (H * W)
    index = first + _reflected(rows, H) * W + _reflected(columns, W)
    table = images.permute(0, 2, 3, 1).reshape(-1, C)
    return F.embedding(index, table).movedim(-1, -3)


def _reflected(index: Tensor, side: int) -> Tensor:
    """Indices brought into [0, side) by reflection at the centres of the outermost pixels."""
    period = max(2 * (side - 1), 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def _widened(images: Tensor) -> Tensor:
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _arange(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels whose row and column are chosen, bool `[N, H]` and `[N, W]`: `[N, 1, H, W]`."""
    return rows[:, None, :, None] & columns[:, None, None, :]


def _per_image(noise: Tensor, draw: Draw) -> Tensor:
    """One column of noise, to broadcast over images: `[N, 1, 1, 1]`."""
    return noise[:, draw, None, None, None]


def _gated(noise: Tensor, gate: int, p: Tensor, values: Tensor, off: float) -> Tensor:
    """`values` `[N]` where the column `gate` is below p, `off` elsewhere."""
    return torch.where(noise[:, gate] < p, values, off)


def _integer(uniform: Tensor, n: int) -> Tensor:
    """Uniform int64 from 0 to n - 1, also should rounding have made a draw 1."""
    return (uniform * n).long().clamp(max=n - 1)


def _symmetric(uniform: Tensor, most: int) -> Tensor:
    """Uniform int64 from -most to most."""
    return _integer(uniform, 2 * most + 1) - most


def _normal(uniform: Tensor) -> Tensor:
    """Standard normal quantiles; 0 and 1 have none, so draws stay within [2^-24, 1 - 2^-24]."""
    quantile: Tensor = torch.special.ndtri(uniform.clamp(2**-24, 1 - 2**-24))
    return quantile
