"""Sampled images as files: PNG, WebP, JPEG, NumPy, or JSON with base64."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from starlette.responses import Response

from biggan.pixels import sheet, to_pil
from serving.sampler import SampleRequest, Samples
from serving.schemas import GeneratedItem, GenerateResponse, ImageFormat

MEDIA_TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "numpy": "application/x-npy",
    "json": "application/json",
}
# Lossless where the format can be; the quickest compression of PNG.
SAVE_OPTIONS: dict[str, dict[str, int | bool]] = {
    "png": {"compress_level": 1},
    "webp": {"lossless": True},
    "jpeg": {"quality": 95},
}


def encode(samples: Samples, request: SampleRequest, image_format: ImageFormat) -> Response:
    """The response that carries `samples` in a format; headers tell what would make them again."""
    if image_format == "json":
        content = _json(samples, request)
    elif image_format == "numpy":
        file = io.BytesIO()
        np.save(file, samples.images, allow_pickle=False)
        content = file.getvalue()
    else:
        content = _picture(samples.images, image_format)
    headers = {
        "X-Model": samples.model,
        "X-Class-Id": str(samples.class_id),
        "X-Seed": str(request.seed),
        "X-Truncation": str(request.truncation),
    }
    return Response(content, headers=headers, media_type=MEDIA_TYPES[image_format])


def _picture(images: np.ndarray, image_format: str) -> bytes:
    """One image as it is, several as a grid."""
    n = len(images)
    picture = to_pil(images[0]) if n == 1 else sheet(images, math.ceil(math.sqrt(n)), min_side=1)
    file = io.BytesIO()
    picture.save(file, image_format, **SAVE_OPTIONS[image_format])
    return file.getvalue()


def _json(samples: Samples, request: SampleRequest) -> bytes:
    items = [
        GeneratedItem(
            seed=request.seed + i,
            png=base64.b64encode(_picture(image[None], "png")).decode("ascii"),
        )
        for i, image in enumerate(samples.images)
    ]
    answer = GenerateResponse(
        model=samples.model,
        class_=samples.class_name,
        class_id=samples.class_id,
        truncation=request.truncation,
        images=items,
    )
    return answer.model_dump_json(by_alias=True).encode()
