"""Uploaded images come out as their pixels or are refused in plain words, whatever they do.

The files are made here; most are damaged, lie about themselves, or are no images at all. All go
through the processes that decode uploads.
"""

import asyncio
import base64
import io
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import aclosing, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import uvloop
from PIL import Image, ImageOps

from biggan.data.images import standardize
from biggan.provenance import lay_out, save
from biggan.recipe import Origin, Recipe
from serving.decoding import MAX_ADDRESS_BYTES, MAX_CPU_SECONDS
from serving.encoding import GAP, SAVE_OPTIONS
from serving.problems import ProblemError
from serving.schemas import MAX_IMAGES, MAX_UPLOAD_BYTES
from serving.uploads import Decoder, decode_base64

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
SMOOTH = np.zeros((40, 60, 3), np.uint8) + np.linspace(0, 200, 60, dtype=np.uint8)[:, None]
SMOOTH[:, :, 1] = np.arange(40)[:, None] * 4


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def decoder(runner):
    others = decoding()  # Of an endpoint in this process, for other tests.
    decoder = Decoder(max_pending=1000)
    yield decoder
    runner.run(decoder.aclose())
    assert set(decoding()) <= set(others)


@pytest.fixture(scope="module")
def decode(runner, decoder):
    """Decode one file; what is wrong must be told in plain words."""

    def decode(data, mode="RGB", side=None):
        return runner.run(outcome(decoder, data, mode, side))

    return decode


async def outcome(decoder, data, mode="RGB", side=None):
    """The pixels, or the status and the detail of a refusal."""
    try:
        pixels = await decoder.decode(data, mode=mode, side=side, field="picture")
    except ProblemError as error:
        refusal = error
    else:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        return pixels
    [wrong] = refusal.errors
    assert (wrong.field, wrong.value) == ("picture", f"{len(data):,} bytes")
    assert refusal.detail == f"picture = {wrong.value}: {wrong.limit}"
    assert re.fullmatch(r"[\w ,;:=.]+", refusal.detail), refusal.detail  # No path, no repr.
    return refusal.status, refusal.detail


def refused(result, status, words=""):
    assert isinstance(result, tuple), f"decoded to {result.shape}"
    assert result[0] == status
    assert words in result[1]
    return True


def children(pid):
    """Ids of a process's children, whichever thread started them."""
    # Not /proc/PID/task/*/children, which leaves some out while others end.
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def decoding(pid=None):
    """Ids of the processes that decode for a process, by default this one."""
    found = []
    for child in children(pid or os.getpid()):
        with suppress(psutil.Error):
            if "serving.decoding" in psutil.Process(child).cmdline():
                found.append(child)
    return found


@pytest.fixture
def own():
    """The decoding processes that a test has started."""
    others = decoding()
    return lambda: [process for process in decoding() if process not in others]


async def in_flight(own):
    """Ids of a decoding process and of its fork, once one is at work."""
    async with asyncio.timeout(60):
        while True:
            for process in own():
                for fork in children(process):
                    return process, fork
            await asyncio.sleep(0.005)


def resident(pid):
    """MiB of memory that a process has, and has had at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return [int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) >> 10 for name in ("VmRSS", "VmHWM")]


def saved(image, file_format="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def chunk(kind, content):
    """A chunk of a PNG."""
    checksum = zlib.crc32(kind + content)
    return struct.pack("!I", len(content)) + kind + content + struct.pack("!I", checksum)


def png(width, height, *chunks, depth=8, colour=0, interlace=0, rows=None):
    """A PNG written by hand; all of its pixels are 0 unless there are `rows` of other bytes."""
    header = struct.pack("!IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    rows = bytes((width + 1) * height) if rows is None else rows
    body = chunk(b"IDAT", rows if rows[:1] == b"x" else zlib.compress(rows))
    return PNG_MAGIC + chunk(b"IHDR", header) + b"".join(chunks) + body + chunk(b"IEND", b"")


def zeros(length):
    """A zlib stream that inflates to so many zeros (whole MiB), made from one MiB of them."""
    compressor = zlib.compressobj(9)
    first = compressor.compress(bytes(2**20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    again = compressor.compress(bytes(2**20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    # Of zeros, Adler's sums are 1 and the count.
    adler = struct.pack("!HH", length % 65521, 1)
    return first + again * (length // 2**20 - 1) + b"\x03\x00" + adler


def test_zeros_are_a_zlib_stream():
    assert zlib.decompress(zeros(5 * 2**20)) == bytes(5 * 2**20)


def slow(scans=1000, side=4000):
    """A progressive JPEG that has its last scan again and again: 10 ms each for 31 bytes."""
    data = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


FILES = {
    "png": saved(NOISE),
    "jpeg": saved(SMOOTH, "JPEG", quality=90),
    "progressive": saved(SMOOTH, "JPEG", progressive=True),
    "webp": saved(SMOOTH, "WEBP"),
    "lossless": saved(NOISE, "WEBP", lossless=True),
    "gif": saved(SMOOTH, "GIF"),
}

# What is decoded.


@pytest.mark.parametrize("name", ["png", "lossless"])
def test_lossless_files_come_out_exactly(decode, name):
    np.testing.assert_array_equal(decode(FILES[name]), NOISE)


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_with_a_side_they_are_what_preparation_makes_of_them(decode, name, mode):
    image = Image.open(io.BytesIO(FILES[name]))
    reference = standardize(image, 16, len(mode))
    np.testing.assert_array_equal(decode(FILES[name], mode, 16), reference)
    assert decode(FILES[name], mode).shape == (40, 60, len(mode))


def test_grey_comes_out_as_it_is(decode):
    np.testing.assert_array_equal(decode(saved(NOISE[:, :, 0]), "L"), NOISE[:, :, :1])
    np.testing.assert_array_equal(
        decode(saved(NOISE[:, :, 0]), "RGB"), NOISE[:, :, [0, 0, 0]], strict=True
    )


def test_the_pixels_may_be_written_to(decode):
    decode(FILES["png"])[0] = 0


def test_exif_turns_what_is_resized_and_leaves_what_is_compared(decode):
    exif = Image.Exif()
    exif[0x0112] = 6  # A quarter turn.
    data = saved(NOISE, exif=exif)
    np.testing.assert_array_equal(decode(data), NOISE)
    turned = Image.fromarray(NOISE).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(
        decode(data, side=20), np.asarray(ImageOps.fit(turned, (20, 20), Image.Resampling.LANCZOS))
    )


@pytest.mark.parametrize("side", [None, 8])
def test_sixteen_bits_divide_by_257(decode, side):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 257 * 4
    expected = np.arange(64).reshape(8, 8, 1) * 4
    np.testing.assert_array_equal(decode(saved(grey), "L", side), expected)


@pytest.mark.parametrize("side", [None, 8])
def test_white_shows_through(decode, side):
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (0, 0, 4, 8))
    for file_format in ("PNG", "GIF"):
        pixels = decode(saved(palette, file_format, transparency=0), side=side)
        assert (pixels[:, :4] == [0, 0, 255]).all()
        assert (pixels[:, 4:] == 255).all()
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4, 3] = 255
    for data in (saved(clear), saved(clear, "WEBP", lossless=True)):
        pixels = decode(data, side=side)
        assert (pixels[:, :4] == 0).all()
        assert (pixels[:, 4:] == 255).all()


def test_cmyk(decode):
    data = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(decode(data).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
@pytest.mark.parametrize("side", [None, 8])
def test_of_an_animation_the_first_frame(decode, file_format, side):
    frames = [Image.new("RGB", (8, 8), (0, 0, 255 - 50 * i)) for i in range(4)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert (decode(data, side=side) == [0, 0, 255]).all()


@pytest.mark.parametrize("width,height", [(1, 1), (1, 20000), (20000, 1)])
def test_narrow_images(decode, width, height):
    data = saved(Image.new("L", (width, height), 77))
    assert decode(data, "L").shape == (height, width, 1)
    pixels = decode(data, "L", 16)
    assert pixels.shape == (16, 16, 1)
    assert (pixels == 77).all()


# What is no image, and what is more than one thing.

OTHERS = {
    "nothing": b"",
    "one byte": b"\x89",
    "text": b"an image, honestly" * 10,
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "html": b"<!doctype html><script>alert(1)</script>",
    "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>",
    "zip": b"PK\x03\x04" + bytes(200),
    "exe": b"MZ" + bytes(200),
    "elf": b"\x7fELF" + bytes(200),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "wave": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(100),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00" + bytes(50),
    "numpy": b"\x93NUMPY\x01\x00" + bytes(100),
    **{name: saved(NOISE, name.upper()) for name in ("tiff", "bmp", "ico", "avif", "ppm", "tga")},
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_files_are_refused(decode, name):
    refused(decode(OTHERS[name]), 415, "must be a PNG, JPEG, WebP or GIF file")


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("payload", [b"PK\x03\x04" * 99, b"<script>alert(1)</script>"])
def test_what_follows_an_image_is_left_behind(decode, name, payload):
    np.testing.assert_array_equal(decode(FILES[name] + payload), decode(FILES[name]))


def test_what_hides_in_an_image_is_left_behind(decode):
    code = b"<?php system($_GET['c']); ?>"
    comment = b"\xff\xfe" + struct.pack("!H", len(code) + 2) + code
    jpeg = FILES["jpeg"]
    np.testing.assert_array_equal(decode(jpeg[:2] + comment + jpeg[2:]), decode(jpeg))
    hidden = decode(png(8, 8, chunk(b"tEXt", b"Comment\0" + code), chunk(b"juNk", code)), "L")
    np.testing.assert_array_equal(hidden, np.zeros((8, 8, 1)))
    refused(decode(b"GIF89a/*" + b"\x10" * 99 + b"*/=1;alert(1)//"), 422)


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_under_another_magic(decode, name):
    for magic in (PNG_MAGIC, b"\xff\xd8\xff", b"GIF89a", b"RIFF\x10\0\0\0WEBP"):
        if not FILES[name].startswith(magic[:4]):
            refused(decode(magic + FILES[name]), 422)


# What is damaged.


@pytest.mark.parametrize("name", list(FILES))
def test_truncated_files(runner, decoder, name):
    """Cut anywhere, a file is refused, or only its end marks were lost."""
    data = FILES[name]
    steps = [*range(1, 64), *np.linspace(64, len(data) - 1, 60, dtype=int)]
    cuts = sorted({*steps, *range(len(data) - 16, len(data))})

    async def run():
        return await asyncio.gather(*(outcome(decoder, data[:cut]) for cut in [*cuts, None]))

    *results, whole = runner.run(run())
    for cut, result in zip(cuts, results, strict=True):
        if isinstance(result, tuple):
            assert result[0] == (422 if cut >= 12 else result[0])
            assert result[0] in (415, 422)
        else:
            assert cut >= len(data) - 16, cut
            np.testing.assert_array_equal(result, whole)


def jpeg_of_size(width, height):
    data = bytearray(FILES["jpeg"])
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack("!HH", height, width)
    return bytes(data)


def webp_of_size(width, height):
    """A lossless WebP's frame on a canvas of another size."""
    frame = FILES["lossless"][12:]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


LIARS = {
    "png of no width": png(0, 8),
    "png of no height": png(8, 0),
    "png of 2^31 - 1": png(2**31 - 1, 2**31 - 1, rows=b"\0"),
    "png of 2^32 - 1": png(2**32 - 1, 2**32 - 1, rows=b"\0"),
    "png of 2^32 - 1 by 1": png(2**32 - 1, 1, rows=b"\0"),
    "png of 3 bits": png(8, 8, depth=3),
    "png of colour 7": png(8, 8, colour=7),
    "png of interlace 9": png(64, 64, interlace=9),
    "png of no data": PNG_MAGIC + chunk(b"IHDR", struct.pack("!IIBBBBB", 8, 8, 8, 0, 0, 0, 0)),
    "png of a short header": PNG_MAGIC + chunk(b"IHDR", b"\0\0"),
    "png of a wrong checksum": png(8, 8).replace(b"IHDR", b"IHDR\x01"),
    "png of a chunk of 2^32 - 1": PNG_MAGIC + b"\xff\xff\xff\xffIHDR" + bytes(50),
    "jpeg of nothing": jpeg_of_size(0, 0),
    "jpeg of no height": jpeg_of_size(60, 0),
    "jpeg of 65535": jpeg_of_size(65535, 65535),
    "gif of nothing": b"GIF89a" + bytes(7) + b";",
    "gif of 65535": b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," + bytes(4) + b"\xff" * 4 + b"\0\x08",
    "webp of 2^24": webp_of_size(2**24, 2**24),
    "webp of 2^24 by 1": webp_of_size(2**24, 1),
    "webp of 16383": webp_of_size(16383, 16383),
    "webp of a byte": b"RIFF\x05\x00\x00\x00WEBPV",
}


@pytest.mark.parametrize("name", list(LIARS))
@pytest.mark.parametrize("side", [None, 8])
def test_headers_that_lie(decode, name, side):
    refused(decode(LIARS[name], side=side), 422)


FORGIVEN = {
    "png of few rows": png(64, 64, rows=bytes(65 * 10)),
    "png without its palette": png(8, 8, colour=3),
    "jpeg of few rows": jpeg_of_size(60, 4000),
}


@pytest.mark.parametrize("name", list(FORGIVEN))
def test_what_pillow_forgives_is_as_in_preparation(decode, name):
    reference = standardize(Image.open(io.BytesIO(FORGIVEN[name])), 32, 3)
    np.testing.assert_array_equal(decode(FORGIVEN[name], side=32), reference)


def test_metadata_that_is_huge_or_damaged(decode):
    """It is not looked at, or not believed; the pixels are not to blame."""
    noise = np.random.default_rng(1).bytes(4 * 2**20)
    entries = b"MM\0*\0\0\0\x08\xff\xff" + noise[: 65535 - 16]
    circle = b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x08\0\0\0\x08"
    reference = decode(png(8, 8), "L", 8)
    for content in (noise, entries, circle, b"", b"MM"):
        np.testing.assert_array_equal(decode(png(8, 8, chunk(b"eXIf", content)), "L", 8), reference)
        np.testing.assert_array_equal(
            decode(saved(SMOOTH, "JPEG", exif=content[:65000]), "RGB", 16),
            standardize(Image.open(io.BytesIO(saved(SMOOTH, "JPEG"))), 16, 3),
        )
    for profile in (b"no profile", noise[:60000]):
        for file_format in ("PNG", "WEBP"):
            options = {"lossless": True} if file_format == "WEBP" else {}
            data = saved(NOISE, file_format, icc_profile=profile, **options)
            np.testing.assert_array_equal(decode(data), NOISE)
        assert decode(saved(SMOOTH, "JPEG", icc_profile=profile)).shape == SMOOTH.shape
    data = png(8, 8, chunk(b"iCCP", b"name\0\0" + zlib.compress(b"x")[:-3]))
    np.testing.assert_array_equal(decode(data, "L", 8), reference)


# Bombs.


def test_the_limit_of_bytes(decode):
    whole = png(8, 8)
    filler = MAX_UPLOAD_BYTES - len(whole) - 12
    assert decode(png(8, 8, chunk(b"juNk", bytes(filler))), "L").shape == (8, 8, 1)
    over = png(8, 8, chunk(b"juNk", bytes(filler + 1)))
    assert refused(decode(over, "L"), 413, "at most 8,388,608 bytes")


def test_the_limit_of_pixels(decode):
    assert decode(png(5000, 4000), "L").shape == (4000, 5000, 1)
    assert decode(png(5000, 4000), "RGB", 64).shape == (64, 64, 3)
    refused(decode(png(5000, 4001), "L", 64), 422, "more than 20,000,000 pixels")
    for large in (saved(Image.new("L", (4001, 5000)), f) for f in ("JPEG", "WEBP", "GIF")):
        refused(decode(large, "L", 64), 422, "more than 20,000,000 pixels")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_the_largest_sheet_that_an_endpoint_gives_is_verified(runner, decoder, image_format):
    images = np.empty((MAX_IMAGES, 512, 512, 3), np.uint8)
    images[:] = np.arange(MAX_IMAGES)[:, None, None, None]
    recipes = [Recipe(classes={0: 1.0}, seed=seed) for seed in range(MAX_IMAGES)]
    origin = Origin.of("m@v1", "0" * 64, ["cat"], recipes, columns=8, gap=GAP)
    data = save(lay_out(images, origin), image_format, origin, **SAVE_OPTIONS[image_format.lower()])
    assert runner.run(decoder.decode(data, mode="RGB")).shape == (4114, 4114, 3)
    assert runner.run(decoder.compare(origin, data, images[:0])) is None
    assert runner.run(decoder.compare(origin, data, images)).status == "verified"


def test_decompression_bombs(decode, decoder):
    """Small files that would be large; the processes that they pass through stay small."""
    decode(FILES["png"])
    before = {pid: resident(pid)[0] for pid in decoding()}
    zipped = zeros(900 * 2**20)
    text = chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros(900 * 2**20))
    profile = chunk(b"iCCP", b"name\0\0" + zeros(900 * 2**20))
    assert len(zipped) < 2**20
    refused(decode(png(30000, 30000, rows=zipped)), 422, "more than 20,000,000 pixels")
    many = chunk(b"zTXt", b"k\0\0" + zeros(2**20)) * 100
    for bomb in (text, profile, many):
        refused(decode(png(8, 8, bomb)), 422)
    np.testing.assert_array_equal(decode(png(8, 8, rows=zipped), "L"), np.zeros((8, 8, 1)))
    for pid, megabytes in before.items():
        assert resident(pid)[0] < megabytes + 8
        assert resident(pid)[1] < 200


def test_ten_thousand_frames(decode):
    """Only the first is read."""
    data = saved(Image.new("L", (256, 256), 7), "GIF")
    frame = data[data.rindex(b",\0\0\0\0") : -1]
    assert len(data[:-1] + frame * 9999) < MAX_UPLOAD_BYTES
    begun = time.monotonic()
    pixels = decode(data[:-1] + frame * 9999 + b";", "L")
    assert time.monotonic() - begun < 5
    assert (pixels == 7).all()
    assert pixels.shape == (256, 256, 1)


def test_a_frame_larger_than_its_gif(decode):
    data = bytearray(saved(Image.new("L", (8, 8), 7), "GIF"))
    place = data.rindex(b",\0\0\0\0")
    data[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    refused(decode(bytes(data)), 422)


# Chance.


def mutated(rng, data):
    """A file with bytes changed, cut out, or put in."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 8)):
        place = int(rng.integers(len(data)))
        match rng.integers(5):
            case 0:
                data[place] = rng.integers(256)
            case 1:
                data[place] ^= 1 << int(rng.integers(8))
            case 2:
                del data[place : place + int(rng.integers(1, 32))]
            case 3:
                data[place:place] = rng.bytes(int(rng.integers(1, 32)))
            case 4:
                data[place : place + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f"])
        if len(data) < 16:
            break
    return bytes(data)


def random_files(rng, count):
    seeds = list(FILES.values())
    seeds.append(saved(Image.fromarray(NOISE).quantize(16), transparency=3))
    seeds.append(saved(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    seeds += [saved(SMOOTH, f, exif=exif) for f in ("JPEG", "PNG", "WEBP")]
    frames = [Image.fromarray(np.roll(SMOOTH, i, 0)) for i in range(3)]
    seeds += [
        saved(frames[0], f, save_all=True, append_images=frames[1:]) for f in ("GIF", "WEBP", "PNG")
    ]
    magics = (PNG_MAGIC, b"\xff\xd8\xff", b"GIF89a", b"RIFF\xff\0\0\0WEBPVP8 ")
    for i in range(count):
        if i % 10 == 0:
            yield magics[i // 10 % 4] + rng.bytes(int(rng.integers(1, 2000)))
        else:
            yield mutated(rng, seeds[i % len(seeds)])


def test_files_damaged_at_random(own):
    rng = np.random.default_rng(2)
    files = list(random_files(rng, 2000))

    async def run():
        async with aclosing(Decoder(max_pending=len(files))) as decoder:
            work = (outcome(decoder, d, *(("RGB", None), ("L", 16))[i % 2]) for i, d in files)
            first = await asyncio.gather(*(outcome(decoder, FILES["png"]) for _ in range(4)))
            before = {pid: resident(pid)[0] for pid in own()}
            results = await asyncio.gather(*work)
            after = {pid: resident(pid) for pid in own()}
            last = await outcome(decoder, FILES["png"])
        np.testing.assert_array_equal(first[0], last)
        return before, results, after

    files = list(enumerate(files))
    before, results, after = asyncio.run(run())
    refusals = [result[0] for result in results if isinstance(result, tuple)]
    assert set(refusals) <= {415, 422}
    assert 0.2 < len(refusals) / len(results) < 0.9  # Not all stop at the door.
    assert after.keys() == before.keys()  # None of them has died.
    for pid, (now, most) in after.items():
        assert now < before[pid] + 8
        assert most < 200


# Processes that die, hang, or are left alone.


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_decoder_that_crashes_costs_its_own_image(number, own):
    async def run():
        async with aclosing(Decoder(processes=1)) as decoder:
            doomed = asyncio.create_task(outcome(decoder, slow()))
            process, fork = await in_flight(own)
            others = [asyncio.create_task(outcome(decoder, FILES["png"])) for _ in range(4)]
            await asyncio.sleep(0)
            os.kill(fork, number)
            assert refused(await doomed, 422, "could not be decoded")
            for other in others:
                np.testing.assert_array_equal(await other, NOISE)
            assert own() == [process]

    asyncio.run(run())


def test_a_process_that_is_killed_is_replaced(own):
    async def run():
        async with aclosing(Decoder(processes=1)) as decoder:
            await outcome(decoder, FILES["png"])
            [first] = own()
            os.kill(first, signal.SIGKILL)  # Idle.
            np.testing.assert_array_equal(await outcome(decoder, FILES["png"]), NOISE)
            [second] = own()
            work = [outcome(decoder, data) for data in (slow(400, side=1000), *[FILES["png"]] * 4)]
            tasks = [asyncio.create_task(each) for each in work]
            process, fork = await in_flight(own)
            assert process == second
            os.kill(second, signal.SIGKILL)  # Its fork too, as when memory runs out.
            os.kill(fork, signal.SIGKILL)
            late, *others = [await task for task in tasks]
            assert not late.any()  # Tried again.
            for other in others:
                np.testing.assert_array_equal(other, NOISE)
            assert len({first, second, *own()}) == 3

    asyncio.run(run())


@pytest.mark.parametrize("whole", [False, True], ids=["fork", "both"])
def test_a_process_that_hangs_is_killed(whole, own):
    async def run():
        async with aclosing(Decoder(processes=1, timeout_seconds=2)) as decoder:
            await outcome(decoder, FILES["png"])
            hung = asyncio.create_task(outcome(decoder, slow()))
            process, fork = await in_flight(own)
            for pid in (fork, process)[: 1 + whole]:
                os.kill(pid, signal.SIGSTOP)
            other = asyncio.create_task(outcome(decoder, FILES["png"]))
            assert refused(await hung, 422, "could not be decoded in 2 seconds")
            np.testing.assert_array_equal(await other, NOISE)
            assert process not in own()
            assert not alive(fork)

    asyncio.run(run())


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_limits_of_a_decoder_and_what_it_knows(monkeypatch, own):
    """An image that takes too long is ended by the kernel, and holds up no other meanwhile."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    async def run():
        async with aclosing(Decoder(processes=2, timeout_seconds=60)) as decoder:
            long = asyncio.create_task(outcome(decoder, slow(5000)))
            process, fork = await in_flight(own)
            while resource.prlimit(fork, resource.RLIMIT_FSIZE)[0] != 0:  # The last to be set.
                await asyncio.sleep(0.005)
            for kind, most in (
                (resource.RLIMIT_CPU, MAX_CPU_SECONDS),
                (resource.RLIMIT_AS, MAX_ADDRESS_BYTES),
                (resource.RLIMIT_CORE, 0),
            ):
                assert resource.prlimit(fork, kind)[0] == most
            assert b"secret" not in Path(f"/proc/{process}/environ").read_bytes()
            for _ in range(20):
                np.testing.assert_array_equal(await outcome(decoder, FILES["png"]), NOISE)
            assert not long.done()
            # Rather than to wait for five seconds of a busy machine's time.
            resource.prlimit(fork, resource.RLIMIT_CPU, (1, MAX_CPU_SECONDS + 1))
            assert refused(await long, 422, "takes longer than 5 seconds")
            assert process in own()

    asyncio.run(run())


def test_a_client_that_leaves(own):
    """Its image is no longer worked at, and nobody gets it."""

    async def run():
        async with aclosing(Decoder(processes=1)) as decoder:
            for seconds in (0, 0.001, 0.01, 0.05, 0.3):
                task = asyncio.create_task(outcome(decoder, slow()))
                await asyncio.sleep(seconds)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                np.testing.assert_array_equal(await outcome(decoder, FILES["png"]), NOISE)
            gone = asyncio.create_task(outcome(decoder, slow()))
            _, fork = await in_flight(own)
            waiting = asyncio.create_task(outcome(decoder, slow()))
            await asyncio.sleep(0)
            waiting.cancel()  # Before its turn.
            gone.cancel()
            np.testing.assert_array_equal(await outcome(decoder, FILES["png"]), NOISE)
            assert not alive(fork)

    asyncio.run(run())


def test_fifty_at_once_each_get_their_own():
    images = np.random.default_rng(3).integers(0, 256, (50, 32, 48, 3), np.uint8)

    async def run():
        async with aclosing(Decoder(max_pending=50)) as decoder:
            return await asyncio.gather(*(outcome(decoder, saved(image)) for image in images))

    np.testing.assert_array_equal(asyncio.run(run()), images)


def test_more_than_may_wait_are_turned_away():
    async def run():
        async with aclosing(Decoder(processes=1, max_pending=3)) as decoder:
            data = FILES["png"]
            tasks = [asyncio.create_task(decoder.decode(data, mode="RGB")) for _ in range(5)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            again = await decoder.decode(data, mode="RGB")
        return results, again

    results, again = asyncio.run(run())
    for pixels in (*results[:3], again):
        np.testing.assert_array_equal(pixels, NOISE)
    for error in results[3:]:
        assert isinstance(error, ProblemError)
        assert (error.status, error.headers) == (503, {"Retry-After": "1"})


def test_in_a_thread_with_the_event_loop_of_a_replica(own):
    """Ray Serve runs an application on uvloop, in a thread that is not the main one."""

    async def run():
        async with aclosing(Decoder()) as decoder:
            lost = asyncio.create_task(outcome(decoder, slow()))
            process, fork = await in_flight(own)
            os.kill(process, signal.SIGKILL)
            os.kill(fork, signal.SIGKILL)
            assert refused(await lost, 422, "could not be decoded")
            results = await asyncio.gather(*(outcome(decoder, FILES["png"]) for _ in range(8)))
            np.testing.assert_array_equal(results, [NOISE] * 8)
        return True

    done = []
    thread = threading.Thread(target=lambda: done.append(uvloop.run(run())))
    thread.start()
    thread.join(60)
    assert done == [True]


ENDPOINT = """
import asyncio, sys
from serving.uploads import Decoder

async def run():
    await Decoder().decode(sys.stdin.buffer.read(), mode="RGB")
    print("decoded", flush=True)
    await asyncio.sleep(600)

asyncio.run(run())
"""


def test_without_the_endpoint_its_processes_end():
    command = [sys.executable, "-c", ENDPOINT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as endpoint:
        endpoint.stdin.write(FILES["png"])
        endpoint.stdin.close()
        assert endpoint.stdout.readline() == b"decoded\n"
        [process] = decoding(endpoint.pid)
        endpoint.kill()
    deadline = time.monotonic() + 10
    while alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_that_cannot_start_are_no_fault_of_the_image(runner, monkeypatch):
    """Then the endpoint fails, rather than to tell clients that their images are bad."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])
        with pytest.raises(RuntimeError, match="did not start"):
            runner.run(Decoder().decode(FILES["png"], mode="RGB"))


# Base64.


def test_base64_bare_and_in_a_url():
    text = base64.b64encode(FILES["png"]).decode()
    assert decode_base64(text, "image") == FILES["png"]
    for kind in ("png", "jpeg", "webp", "svg+xml", "x-icon", "vnd.ms-photo"):
        assert decode_base64(f"data:image/{kind};base64,{text}", "image") == FILES["png"]
    assert decode_base64("", "image") == b""
    assert decode_base64("AA==", "image") == b"\0"


@pytest.mark.parametrize(
    "text",
    [
        "A",
        "AAAA=",
        "AAAA==",
        "AAAA====",
        "A===",
        "AA",
        "AA=",
        "====",
        "AA==AA==",
        "AAAA\n",
        "AA AA",
        "-_-_",
        "AAA\u00e4",
        "\ud800AAA",
        "\0\0\0\0",
        "data:image/png,AAAA",
        "data:text/html;base64,AAAA",
        "data:image/png;base64;base64,AAAA",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
    ],
)
def test_what_is_no_base64(text):
    with pytest.raises(ProblemError) as caught:
        decode_base64(text, "target")
    assert caught.value.status == 422
    [wrong] = caught.value.errors
    assert (wrong.field, wrong.value) == ("target", f"{len(text)} characters")
    assert wrong.limit.startswith("must be base64")


def test_base64_of_too_long_a_file():
    longest = base64.b64encode(bytes(MAX_UPLOAD_BYTES)).decode()
    assert decode_base64(longest, "image") == bytes(MAX_UPLOAD_BYTES)
    for text in ("A" * (len(longest) + 4), "data:image/png;base64," + "?" * 2 * len(longest)):
        with pytest.raises(ProblemError, match=r"image = .* at most 8,388,608 bytes") as caught:
            decode_base64(text, "image")
        assert caught.value.status == 413
