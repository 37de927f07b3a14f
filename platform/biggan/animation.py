"""Frames as a file that moves: animated WebP, GIF or MP4.

WebP keeps every pixel. GIF keeps greys, and frames of at most 256 colours; others get a palette
each and are dithered. That moves pixels of photographs by 4 to 5 grey levels (root mean square) but
means over 4 by 4 of them, as the eye takes, only by 0.9. One palette for all frames made that up to
1.8, no dithering about 2; a better palette (maximum coverage) gained up to two fifths on strong
colours and took ten times as long. MP4 is H.264 as every browser plays it: 12 to 60 times smaller
than WebP there, and off by 3 to 6, most of which is the halved resolution of its colour.
"""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image

from biggan.errors import UserError
from biggan.pixels import to_pil
from biggan.provenance import gif_with

AnimationFormat = Literal["webp", "gif", "mp4"]
MAX_FPS = 50
"""Browsers show GIFs of shorter frames at a fifth of this."""
MAX_SIDE = 4096
"""Pixels that decoders of H.264 can be relied on to take."""
XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
"""The `uuid` box in which an MP4 file carries XMP (ISO 16684-3)."""


def animate(
    frames: np.ndarray,
    file_format: AnimationFormat,
    *,
    fps: float = 25,
    scale: int = 1,
    xmp: bytes | None = None,
) -> bytes:
    """The content of a file that shows `frames`, uint8 `[N, H, W, C]` with C 1 (grey) or 3 (RGB).

    WebP and GIF repeat for ever; MP4 cannot say so, its player decides. A frame is shown for
    1 / `fps` seconds, rounded to thousandths in WebP and to hundredths in GIF so that all together
    last as long as they should; there, equal neighbours may become one that is shown for longer.
    A pixel becomes `scale` by `scale` pixels. MP4 repeats the last row or column of an odd side.
    `xmp` is a packet of metadata for the file to carry. Raises `UserError` for no frames, for `fps`
    out of 1 to 50, for a `scale` below 1, and for a side above 4096 once enlarged.
    """
    if not len(frames):
        raise UserError("an animation of no frames: give 1 or more")
    if not 1 <= fps <= MAX_FPS:
        raise UserError(f"fps {fps}: must be from 1 to {MAX_FPS}")
    side = max(frames.shape[1:3])
    if scale < 1 or side * scale > MAX_SIDE:
        raise UserError(
            f"scale {scale} makes sides of {side * scale} pixels: a scale must be 1 or more, and a"
            f" side at most {MAX_SIDE}"
        )
    return {"webp": _webp, "gif": _gif, "mp4": _mp4}[file_format](frames, fps, scale, xmp)


def _webp(frames: np.ndarray, fps: float, scale: int, xmp: bytes | None) -> bytes:
    pictures = (_enlarged(to_pil(frame), scale) for frame in frames)
    durations = _durations(len(frames), fps, 1)
    return _save(pictures, "WEBP", durations, lossless=True, xmp=xmp or b"")


def _gif(frames: np.ndarray, fps: float, scale: int, xmp: bytes | None) -> bytes:
    pictures = (_enlarged(_indexed(to_pil(frame)), scale) for frame in frames)
    content = _save(pictures, "GIF", _durations(len(frames), fps, 10))
    return content if xmp is None else gif_with(xmp, content)


def _mp4(frames: np.ndarray, fps: float, scale: int, xmp: bytes | None) -> bytes:
    # A file, for the index to be moved before the images: playing begins with the first bytes.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "animation.mp4")
        with av.open(file, "w", options={"movflags": "+faststart"}) as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream("libx264", rate, options={"crf": "16"})
            height, width = (side * scale + side * scale % 2 for side in frames.shape[1:3])
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # Unsaid, players would guess these from the size.
            stream.codec_context.colorspace = Colorspace.ITU709
            stream.codec_context.color_range = ColorRange.MPEG
            stream.codec_context.color_primaries = ColorPrimaries.BT709
            stream.codec_context.color_trc = ColorTrc.IEC61966_2_1
            for frame in frames:
                container.mux(stream.encode(_subsampled(_enlarged(to_pil(frame), scale))))
            container.mux(stream.encode())
        content = file.read_bytes()
    if xmp is None:
        return content
    return content + struct.pack(">I4s16s", 24 + len(xmp), b"uuid", XMP_BOX) + xmp


def _save(
    pictures: Iterator[Image.Image], file_format: str, durations: list[int], **options: object
) -> bytes:
    file = io.BytesIO()
    next(pictures).save(
        file,
        file_format,
        save_all=True,
        append_images=pictures,
        duration=durations,
        loop=0,
        **options,
    )
    return file.getvalue()


def _durations(n: int, fps: float, unit: int) -> list[int]:
    """Milliseconds of each frame, in whole units, that together are n / fps seconds."""
    times = np.round(np.arange(n + 1) * (1000 / fps / unit)) * unit
    return np.diff(times).astype(int).tolist()  # type: ignore[no-any-return]


def _enlarged(picture: Image.Image, scale: int) -> Image.Image:
    size = picture.width * scale, picture.height * scale
    return picture.resize(size, Image.Resampling.NEAREST)


def _indexed(picture: Image.Image) -> Image.Image:
    """A picture in at most 256 colours of its own."""
    if picture.mode == "L":
        return picture
    if picture.getcolors(256):  # As they are.
        return picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette = picture.quantize(256, Image.Quantize.FASTOCTREE)
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _subsampled(picture: Image.Image) -> av.VideoFrame:
    """A picture in BT.709's luma and halved chroma, with even sides."""
    odd = (0, picture.height % 2), (0, picture.width % 2), (0, 0)
    pixels = np.pad(np.asarray(picture.convert("RGB")), odd, mode="edge")
    return av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
        format="yuv420p",
        interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
    )
