"""Images as answers: PNG, WebP, JPEG, NumPy, ZIP, animations, or JSON with base64.

Every file says where it came from (`biggan.provenance`).
"""

from __future__ import annotations

import base64
import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from biggan.animation import animate
from biggan.pixels import sheet, to_pil
from biggan.provenance import packet, save
from biggan.recipe import Origin, Recipe
from serving.catalogue import Model
from serving.recipes import refuse, told
from serving.schemas import ImageItem, ImagesAnswer, Layout, MotionFormat

MEDIA_TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "mp4": "video/mp4",
    "numpy": "application/x-npy",
    "zip": "application/zip",
    "json": "application/json",
}
# The quickest compression; WebP is lossless, JPEG of quality 95 (`biggan.provenance.DEFAULTS`).
SAVE_OPTIONS: dict[str, dict[str, int]] = {
    "png": {"compress_level": 1},
    "webp": {"method": 0},
    "jpeg": {},
}
GAP = 2
"""Pixels between the images of a sheet."""
MAX_SIDES = {"webp": 16_383, "jpeg": 65_535}
"""Pixels that a picture of a format may be wide and high."""
MAX_MOTION_PIXELS = 2**26
"""Of all frames of an animation. As 64 of noise, 1,024 pixels wide, enlarged from 128, they took a
core of an AMD EPYC 1.0 s as GIF, 1.7 s as WebP and 5.3 s as MP4."""


@dataclass(frozen=True)
class Answer:
    """What is sent to the client."""

    content: bytes
    media_type: str
    filename: str


@dataclass(frozen=True)
class Made:
    """Images and what they were made from."""

    model: Model
    recipes: Sequence[Recipe]
    images: np.ndarray
    """uint8 `[N, H, W, C]`."""

    def origin(self, chosen: slice = slice(None), **layout: Any) -> Origin:
        """Where a picture of some of the images came from; `layout` as of an `Origin`."""
        names = self.model.config.class_names
        return Origin.of(
            self.model.reference, self.model.weights, names, self.recipes[chosen], **layout
        )


def columns_of(n: int, columns: int | None, row: int, side: int, image_format: str) -> int:
    """Images a row, of a sheet of n: `columns`, or else `row`, or fewer where they are too wide.

    Raises `ProblemError` for `columns` of which the format cannot be.
    """
    most = (MAX_SIDES[image_format] - GAP) // (side + GAP)
    least = math.ceil(n / most)
    if columns is None:
        return min(row, max(most, least))
    if n > 1 and not least <= min(columns, n) <= most:
        limit = f"{n} images of {side} pixels as {image_format} go into {least} to {most} columns"
        refuse("columns", columns, limit)
    return columns


def encode(made: Made, image_format: str, layout: Layout, columns: int | None = None) -> Answer:
    """Images as one file of a format: a grid, a ZIP, an array, or a JSON list."""
    if image_format == "numpy":
        return _answer(_npy(made.images), "numpy", "images.npy")
    if image_format == "json" or layout == "list":
        kind = "png" if image_format == "json" else image_format
        return _answer(_json(made, kind), "json", "images.json")
    if layout == "zip":
        return _answer(_zip(made, image_format), "zip", "images.zip")
    n = len(made.images)
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    return _answer(grid(made, image_format, columns), image_format, f"images.{image_format}")


def encode_motion(
    made: Made, image_format: MotionFormat, *, columns: int, fps: int, scale: int
) -> Answer:
    """Frames as an animation, or as a file that holds them all."""
    if image_format in ("webp", "gif", "mp4"):
        xmp = packet(made.origin(scale=scale))
        content = animate(made.images, image_format, fps=fps, scale=scale, xmp=xmp)
        return _answer(content, image_format, f"interpolation.{image_format}")
    if image_format == "zip":
        return _answer(_zip(made, "png"), "zip", "frames.zip")
    layout: Layout = "list" if image_format == "json" else "grid"
    return encode(made, image_format, layout, columns)


def grid(made: Made, image_format: str, columns: int) -> bytes:
    """One picture of all images in rows of `columns`; of one image, the image itself."""
    if len(made.images) == 1:
        return picture_file(to_pil(made.images[0]), image_format, made.origin())
    page = sheet(made.images, columns, gap=GAP, min_side=1)
    return picture_file(page, image_format, made.origin(columns=columns, gap=GAP))


def picture_file(picture: Image.Image, image_format: str, origin: Origin) -> bytes:
    """A picture as a file that tells its origin."""
    return save(picture, image_format, origin, **SAVE_OPTIONS[image_format])


def single_files(made: Made, image_format: str) -> list[bytes]:
    """A file an image."""
    return [
        picture_file(to_pil(image), image_format, made.origin(slice(i, i + 1)))
        for i, image in enumerate(made.images)
    ]


def base64_text(content: bytes) -> str:
    """Bytes as JSON carries them."""
    return base64.b64encode(content).decode("ascii")


def _answer(content: bytes, kind: str, filename: str) -> Answer:
    return Answer(content, MEDIA_TYPES[kind], filename)


def _npy(images: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, images, allow_pickle=False)
    return file.getvalue()


def _zip(made: Made, image_format: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for i, content in enumerate(single_files(made, image_format)):
            archive.writestr(f"{i:03d}.{image_format}", content)
    return file.getvalue()


def _json(made: Made, image_format: str) -> bytes:
    files = zip(made.recipes, single_files(made, image_format), strict=True)
    answer = ImagesAnswer(
        model=made.model.reference,
        truncation=made.recipes[0].truncation,
        media_type=MEDIA_TYPES[image_format],
        images=[
            ImageItem(seed=recipe.seed, image=base64_text(content), latent=told(recipe, made.model))
            for recipe, content in files
        ],
    )
    return answer.model_dump_json(by_alias=True).encode()
