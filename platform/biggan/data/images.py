"""One image of any kind, brought to the dataset's size, channels and depth."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps

MAX_PIXELS = 89_478_485
"""Largest image decoded (Pillow's own warning limit, a quarter GiB of RGB). A small file that
claims more is most likely a decompression bomb."""

Fit = Literal["crop", "pad"]


class ImageError(ValueError):
    """An image that cannot be used, and why."""


def to_image(array: np.ndarray) -> Image.Image:
    """An array `[H, W]` or `[H, W, C]` with 1, 3 or 4 channels (the fourth is opacity) as an image.

    Bytes are as they are, false and true are black and white, integers of 16 bits divide by 257,
    and floats from 0 to 1 span black to white; others as `_from_deep` says. Raises `ImageError` for
    another shape or kind of number.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(
            f"channel mismatch: an array of shape {array.shape} is no image; expected [H, W], or"
            " [H, W, C] with 1, 3 or 4 channels"
        )
    if not array.size:
        raise ImageError(f"an array of shape {array.shape} holds no pixel")
    if array.dtype == np.bool_:
        return Image.fromarray(array.astype(np.uint8) * 255)
    if array.dtype.kind not in "iuf":
        raise ImageError(f"an array of {array.dtype}: expected numbers")
    if array.dtype != np.uint8:
        return _from_deep(array)
    return Image.fromarray(np.ascontiguousarray(array))


def standardize(
    image: Image.Image | np.ndarray,
    resolution: int,
    channels: int,
    fit: Fit = "crop",
    background: tuple[int, int, int] = (255, 255, 255),
) -> np.ndarray:
    """The image as uint8 `[resolution, resolution, channels]`; channels is 1 (grey) or 3 (RGB).

    EXIF orientation is applied, transparency composited over `background`, every mode and depth
    converted, the longer side cropped about the centre (or the shorter padded with `background`),
    and the square resized with antialiasing. Arrays are taken as `to_image` says. Raises
    `ImageError`, or whatever Pillow raises for a damaged file.
    """
    if isinstance(image, np.ndarray):
        image = to_image(image)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}: decompression bomb?")
    if fit == "pad" and 2 * resolution * min(width, height) < max(width, height):
        raise ImageError(f"{width}x{height} pixels: too narrow to be seen once padded to a square")
    image = _upright(image)
    mode = "L" if channels == 1 else "RGB"
    image = opaque_8_bit(image, background)
    if image.mode != mode:
        image = image.convert(mode)
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
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image  # `exif_transpose` would copy it.
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's reader of EXIF data raises anything at all.
        return image


def opaque_8_bit(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image with at most 8 bits a channel, and `background` where it is transparent."""
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
    """Values of other than 8 bits, scaled so that the depth's full range becomes 0 to 255.

    Pillow's own conversion would clip everything above 255. Integers of 16 bits divide by 257.
    32-bit integers and floats say nothing of their range: integers that fit 8 or 16 bits are taken
    to have that depth (as floats, 8), floats from 0 to 1 to be parts of white, and for others the
    range is the image's own.
    """
    if not np.isfinite(values).all():
        raise ImageError("pixels that are infinite or not a number")
    whole, low, high = values.dtype.kind in "iu", float(values.min()), float(values.max())
    if not whole and low >= 0 and high <= 1:
        return Image.fromarray((values * 255.0).round().astype(np.uint8))
    if not whole and low >= 0 and high <= 255 and (values == np.floor(values)).all():
        return Image.fromarray(values.astype(np.uint8))
    if whole and values.dtype.itemsize != 2 and low >= 0 and high <= 255:
        scaled = values.astype(np.float64)  # 8 bits that came in 32.
    elif whole and low >= 0 and high <= 65535:
        scaled = values / 257
    else:
        scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny) * 255.0
    return Image.fromarray(scaled.round().astype(np.uint8))
