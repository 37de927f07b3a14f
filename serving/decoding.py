"""Decodes and compares uploaded images, each in a process of its own that may die without harm.

`serving.uploads` starts this module as a program and speaks with it over standard streams. It
imports little more than Pillow and NumPy, so that it starts fast and stays small, and has one
thread, so that it may fork: every image is decoded in a fork with limits of memory and time, which
leaves its answer in shared memory and ends. A file that exhausts, crashes or corrupts its decoder
costs itself alone. That bounds harm from accidents and bombs; it is no prison for an attacker who
has taken a decoder over, beyond that the process is given none of the endpoint's environment.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import resource
import signal
import struct
import sys
from io import BytesIO
from typing import NoReturn

import numpy as np
from PIL import Image

from biggan.data.images import ImageError, opaque_8_bit, standardize
from biggan.provenance import FORMATS, MAX_PIXELS, compare, compare_size
from biggan.recipe import Origin

MAX_ADDRESS_BYTES = 2**30
MAX_CPU_SECONDS = 5
UNDECODABLE = "could not be decoded; save it anew, as PNG or JPEG"

READY = b"\n"
"""Written once, after the imports."""
REQUEST = struct.Struct("!III")
"""Bytes that follow, channels, and side (0: as it is). They are a file to decode; with 0 channels
what `comparison` gives."""
ANSWER = struct.Struct("!III")
"""Bytes of what follows, height and width: pixels; of no height: text, which says what is wrong, or
is the verdict of a comparison."""


def decode(data: bytes, channels: int, side: int) -> np.ndarray:
    """A file's first frame as uint8 `[height, width, channels]`; 1 channel is grey, 3 are RGB.

    With a `side`, it is brought to `[side, side]` as preparation brings a dataset's images: turned
    as EXIF says, cropped about the centre, resized. With side 0 its pixels are left where they are,
    and EXIF is ignored: for those who compare pixels with what they once stored. Either way white
    shows through what is transparent. Raises `ImageError`, or whatever Pillow raises for a damaged
    file.
    """
    # Of Pillow's decoders those alone that people need: every other is one more thing to attack.
    image = Image.open(BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"has {width}x{height} pixels, which is none; upload another image")
    if side:
        return standardize(image, side, channels)
    image.load()
    opaque = opaque_8_bit(image, (255, 255, 255))
    pixels = np.asarray(opaque.convert("L" if channels == 1 else "RGB"))
    return pixels[:, :, None] if channels == 1 else pixels


def comparison(origin: Origin, data: bytes, remade: np.ndarray) -> bytes:
    """What is sent to have a file compared with the images of its origin, `[N, H, W, C]`.

    With N = 0 only its size is looked at.
    """
    head = {"origin": origin.model_dump(mode="json"), "shape": remade.shape}
    return json.dumps(head).encode() + b"\n" + remade.tobytes() + data


def _compare(content: bytes) -> str:
    """The verdict as JSON; nothing if only the size was looked at, and fits."""
    head, _, rest = content.partition(b"\n")
    about = json.loads(head)
    origin, shape = Origin.model_validate(about["origin"]), about["shape"]
    length = math.prod(shape)
    remade, data = np.frombuffer(rest[:length], np.uint8).reshape(shape), rest[length:]
    verdict = compare(origin, data, remade) if length else compare_size(origin, data, shape[1])
    return verdict.model_dump_json() if verdict else ""


def serve() -> None:
    """Answer the requests on standard input, one after another, until it ends."""
    Image.init()  # Whatever a fork would import, it would import again and again.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this, and refuses above twice it.
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(READY)
    answers.flush()
    while header := requests.read(REQUEST.size):
        length, channels, side = REQUEST.unpack(header)
        answers.write(_decode_in_fork(requests.read(length), channels, side))
        answers.flush()


def _decode_in_fork(data: bytes, channels: int, side: int) -> bytes:
    """The answer to a request, from a fork or about its death."""
    with mmap.mmap(-1, ANSWER.size + 3 * MAX_PIXELS) as shared:
        pid = os.fork()
        if pid == 0:
            _answer_and_leave(shared, data, channels, side)
        _, status = os.waitpid(pid, 0)
        if status == 0:
            length, _, _ = ANSWER.unpack_from(shared)
            return shared.read(ANSWER.size + length)
    if os.waitstatus_to_exitcode(status) == -signal.SIGXCPU:
        return _text(
            f"takes longer than {MAX_CPU_SECONDS} seconds to decode; scale it down, or save it as"
            " PNG"
        )
    return _text(UNDECODABLE)


def _answer_and_leave(shared: mmap.mmap, data: bytes, channels: int, side: int) -> NoReturn:
    status = 1
    try:
        _limit()
        shared.write(_answer(data, channels, side))
        status = 0
    finally:
        os._exit(status)


def _limit() -> None:
    """Bound what this process may take; above it, allocations fail and the kernel ends it."""
    for kind, most in (
        (resource.RLIMIT_AS, MAX_ADDRESS_BYTES),
        (resource.RLIMIT_CPU, MAX_CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        # The hard limit of CPU time is a second later, for the kernel to send SIGXCPU first.
        resource.setrlimit(kind, (most, most + (kind == resource.RLIMIT_CPU)))


def _answer(data: bytes, channels: int, side: int) -> bytes:
    """Pixels, or what is wrong with the file in words of ours: Pillow's may tell of its inside."""
    try:
        if not channels:
            return _text(_compare(data))
        pixels = decode(data, channels, side)
    except ImageError as error:
        return _text(str(error))
    except Image.DecompressionBombError:
        return _text(f"has more than {MAX_PIXELS:,} pixels; scale it down")
    except MemoryError:
        return _text(
            f"needs more than {MAX_ADDRESS_BYTES // 2**20:,} MiB of memory to decode; scale it down"
        )
    except Exception:  # Pillow raises anything at all.
        return _text("is truncated or damaged; upload the whole file, or save it anew")
    height, width, _ = pixels.shape
    return ANSWER.pack(pixels.size, height, width) + pixels.tobytes()


def _text(reason: str) -> bytes:
    text = reason.encode()
    return ANSWER.pack(len(text), 0, 0) + text


if __name__ == "__main__":
    serve()
