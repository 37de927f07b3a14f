"""One image of any kind, brought to the dataset's size, channels and depth."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageOps

MAX_PIXELS = 89_478_485
"""Largest image decoded (Pillow's own warning limit, a quarter GiB of RGB). A small file that
claims more is most likely a decompression bomb."""

Fit = Literal["crop", "pad"]


class ImageError(ValueError):
    """An image that cannot be used, and why."""


def standardize(
    image: Image.Image,
    resolution: int,
    channels: int,
    fit: Fit = "crop",
    background: tuple[int, int, int] = (255, 255, 255),
) -> np.ndarray:
    """The image as uint8 `[resolution, resolution, channels]`; channels is 1 (grey) or 3 (RGB).

    EXIF orientation is applied, transparency composited over `background`, every mode and depth
    converted, the longer side cropped about the centre (or the shorter padded with `background`),
    and the square resized with antialiasing. Raises `ImageError`, or whatever Pillow raises for a
    damaged file.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}: decompression bomb?")
    if fit == "pad" and 2 * resolution * min(width, height) < max(width, height):
        raise ImageError(f"{width}x{height} pixels: too narrow to be seen once padded to a square")
    image = _upright(image)
    mode = "L" if channels == 1 else "RGB"
    image = _opaque_8_bit(image, background).convert(mode)
    side = resolution, resolution
    if fit == "crop":
        image = ImageOps.fit(image, side, Image.Resampling.LANCZOS)
    else:
        grey = ImageColor.getcolor("rgb({},{},{})".format(*background), mode)
        image = ImageOps.pad(image, side, Image.Resampling.LANCZOS, color=grey)
    pixels = np.asarray(image)
    return pixels[:, :, None] if channels == 1 else pixels


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is, if its EXIF data are damaged."""
    image.load()  # Damaged pixels are an error.
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's reader of EXIF data raises anything at all.
        return image


def _opaque_8_bit(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        grey = _from_deep(values)
        # One grey value may stand for transparency.
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            mask = Image.fromarray((values == clear).astype(np.uint8) * 255)
            grey.paste(ImageColor.getcolor("rgb({},{},{})".format(*background), "L"), mask=mask)
        return grey
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba)
    return image


def _from_deep(values: np.ndarray) -> Image.Image:
    """Grey of more than 8 bits, scaled so that the depth's full range becomes 0 to 255.

    Pillow's own conversion would clip everything above 255. Integers of 16 bits divide by 257.
    32-bit integers and floats say nothing of their range: integers that fit 8 or 16 bits are taken
    to have that depth, and for others the range is the image's own.
    """
    if not np.isfinite(values).all():
        raise ImageError("pixels that are infinite or not a number")
    whole, low, high = values.dtype.kind in "iu", float(values.min()), float(values.max())
    if whole and values.dtype.itemsize > 2 and low >= 0 and high <= 255:
        scaled = values.astype(np.float64)  # 8 bits that came in 32.
    elif whole and low >= 0 and high <= 65535:
        scaled = values / 257
    else:
        scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny) * 255.0
    return Image.fromarray(scaled.round().astype(np.uint8))
