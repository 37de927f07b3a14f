"""Pixels: between uint8 and [-1, 1], and images laid out as sheets people look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # Sheets are laid out in processes without torch, too.
    from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 of the same shape, rounded to the nearest grey level.

    Rounding, not truncation: truncating darkens every image by half a level, which FID sees.
    """
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1] of the same shape."""
    return images.float() / 127.5 - 1


def to_pil(image: np.ndarray) -> Image.Image:
    """A uint8 image `[H, W, C]` as a Pillow image.

    One channel is grey, three are RGB; of any other number the first three (or the first) show.
    """
    if image.shape[2] < 3:
        return Image.fromarray(image[:, :, 0])
    return Image.fromarray(np.ascontiguousarray(image[:, :, :3]))


def sheet(images: np.ndarray, columns: int, gap: int = 2, min_side: int = 32) -> Image.Image:
    """Images `[N, H, W, C]` (uint8) in rows of `columns`, as one picture on white.

    Images smaller than `min_side` pixels are enlarged by a whole factor, pixels left square.
    """
    n, height, width, _ = images.shape
    scale = max(1, -(-min_side // max(height, width)))
    height, width = height * scale, width * scale
    rows = -(-n // columns)
    mode = to_pil(images[0]).mode
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    page = Image.new(mode, size, "white")
    for i, image in enumerate(images):
        tile = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
        row, column = divmod(i, columns)
        page.paste(tile, (gap + column * (width + gap), gap + row * (height + gap)))
    return page
