"""An image file's content, whatever its format, as an image."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from biggan.data.images import ImageError
from biggan.data.sources.dicom import MAGIC, Window, decode_dicom

# fmt: off
SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif", ".avifs", ".ico", ".tga",
    ".pcx", ".sgi", ".qoi", ".dcm", ".dicom", ".npy",
}
# fmt: on
"""How names of image files end."""


def is_image_name(path: str) -> bool:
    """Whether a file is an image by its name."""
    name = path.rsplit("/", 1)[-1].lower()
    return f".{name.rsplit('.', 1)[-1]}" in SUFFIXES and "." in name


def decode_image(content: bytes, window: Window = None) -> Image.Image | np.ndarray:
    """The image in a file: DICOM, a NumPy array, or anything that Pillow opens.

    Pillow's is not decoded yet. Raises whatever a damaged file makes the decoder raise.
    """
    if not content:
        raise ImageError("the file is empty")
    if content[128:132] == MAGIC:
        return decode_dicom(content, window)
    if content.startswith(b"\x93NUMPY"):
        array: np.ndarray = np.load(BytesIO(content), allow_pickle=False)
        return array
    return Image.open(BytesIO(content))
