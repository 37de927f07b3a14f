"""Animations, read back: frame for frame, for how long, how large, and what they carry."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from biggan.animation import XMP_BOX, animate
from biggan.errors import UserError

XMP = '<?xpacket begin="\ufeff"?><x:xmpmeta>Größe</x:xmpmeta><?xpacket end="w"?>'.encode()


def grey(n=5, height=16, width=16):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 1), dtype=np.uint8)


def few_colours(n=4):
    draws = np.random.default_rng(1)
    palette = draws.integers(0, 256, (256, 3), dtype=np.uint8)
    return palette[draws.integers(0, 256, (n, 24, 24))]


def smooth(n=6, side=64):
    """Soft blobs of all colours that drift, as generated images do: `[n, side, side, 3]`."""
    y, x, t = np.meshgrid(*(np.linspace(0, 1, k) for k in (side, side, n)), indexing="ij")
    channels = [np.sin(5 * x + 3 * y * x + k + t) * np.cos(4 * y - k * x + t) for k in range(3)]
    return np.round(127.5 + 127.5 * np.stack(channels, -1)).astype(np.uint8).transpose(2, 0, 1, 3)


def read(content):
    """Frames (uint8 RGB) of a WebP or GIF, their milliseconds, and what else is said of it."""
    image = Image.open(io.BytesIO(content))
    frames, durations = [], []
    for frame in ImageSequence.Iterator(image):
        frames.append(np.asarray(frame.convert("RGB")))
        durations.append(image.info["duration"])
    return np.stack(frames), durations, image.info


def decode(content):
    """Frames of an MP4 as planes Y and (U, V), and its video stream."""
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        planes = [frame.to_ndarray().astype(float) for frame in container.decode(stream)]
    height, width = stream.height, stream.width
    luma = np.stack([plane[:height] for plane in planes])
    chroma = np.stack([plane[height:] for plane in planes])
    return luma, chroma.reshape(len(planes), 2, height // 2, width // 2), stream


def boxes(content):
    """The top boxes of an MP4: (kind, what is in it)."""
    found, at = [], 0
    while at < len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        found.append((kind.decode(), content[at + 8 : at + size]))
        at += size
    return found


def rms(difference):
    return np.sqrt(np.square(difference.astype(float)).mean())


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize(
    "file_format,frames",
    [("webp", grey()), ("webp", smooth()), ("gif", grey()), ("gif", few_colours())],
    ids=["webp-grey", "webp-colour", "gif-grey", "gif-few-colours"],
)
def test_every_pixel_is_kept(file_format, frames, scale):
    content = animate(frames, file_format, fps=20, scale=scale)
    shown, durations, info = read(content)
    assert (shown == frames.repeat(scale, 1).repeat(scale, 2)).all()
    assert durations == [50] * len(frames)
    assert info["loop"] == 0  # For ever.


def test_many_colours_in_gif_are_near_and_true_from_afar():
    frames = smooth()
    shown, durations, _ = read(animate(frames, "gif", fps=50))
    assert durations == [20] * 6
    error = shown.astype(float) - frames
    assert rms(error) < 13
    # Without dithering it is 8.
    assert rms(error.reshape(6, 16, 4, 16, 4, 3).mean((2, 4))) < 4


@pytest.mark.parametrize("file_format,allowed", [("webp", {41, 42}), ("gif", {40, 50})])
def test_frames_are_rounded_and_the_whole_is_not(file_format, allowed):
    _, durations, _ = read(animate(grey(60), file_format, fps=24))
    assert set(durations) == allowed
    assert sum(durations) == 2500


@pytest.mark.parametrize("file_format", ["webp", "gif"])
def test_equal_neighbours_last_as_long(file_format):
    frames = grey(3)[[0, 0, 1, 2]]
    shown, durations, _ = read(animate(frames, file_format, fps=10))
    assert (shown == frames[1:]).all()
    assert durations == [200, 100, 100]


def test_mp4_is_what_browsers_play():
    frames = smooth()
    content = animate(frames, "mp4", fps=12.5, scale=2)
    luma, _, stream = decode(content)
    assert luma.shape == (6, 128, 128)
    assert stream.codec_context.name == "h264"
    assert stream.codec_context.pix_fmt == "yuv420p"
    assert stream.average_rate == 12.5
    assert stream.duration * stream.time_base == Fraction(6 * 2, 25)
    kinds = [kind for kind, _ in boxes(content)]
    assert kinds.index("moov") < kinds.index("mdat")
    weights = np.array([0.2126, 0.7152, 0.0722])  # BT.709's.
    expected = 16 + 219 / 255 * frames.repeat(2, 1).repeat(2, 2) @ weights
    assert rms(luma - expected) < 2


def test_greys_in_mp4_stay_grey():
    luma, chroma, _ = decode(animate(smooth()[..., :1], "mp4"))
    assert rms((luma - 16) * 255 / 219 - smooth()[..., 0]) < 2
    assert np.abs(chroma - 128).max() <= 1


def test_colours_in_mp4_are_those_of_bt709():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    frames = colours[:, None, None].repeat(32, 1).repeat(32, 2)
    luma, chroma, stream = decode(animate(frames, "mp4"))
    context = stream.codec_context
    assert (context.colorspace, context.color_range, context.color_primaries) == (1, 1, 1)
    # Its matrix by hand: Y = 16 + 219 w.c, U = 128 + 224 (b - Y) / 1.8556, V likewise with 1.5748.
    expected = [(63, 102, 240), (173, 42, 26), (32, 240, 118), (235, 128, 128)]
    found = np.concatenate([luma.mean((1, 2))[:, None], chroma.mean((2, 3))], 1)
    assert np.abs(found - expected).max() < 1.5


def test_odd_sides_of_mp4_are_made_even():
    frames = np.zeros((2, 9, 15, 1), np.uint8)
    frames[:, -1], frames[:, :, -1] = 255, 255
    luma, _, _ = decode(animate(frames, "mp4"))
    assert luma.shape == (2, 10, 16)
    assert luma[:, 9].min() > 200
    assert luma[:, :, 15].min() > 200


def test_one_frame_is_enough():
    assert (read_still(animate(grey(1), "gif")) == grey(1)[0]).all()
    assert (read_still(animate(grey(1), "webp")) == grey(1)[0]).all()
    assert len(decode(animate(grey(1), "mp4"))[0]) == 1


def read_still(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_webp_carries_xmp():
    assert read(animate(grey(), "webp", xmp=XMP))[2]["xmp"] == XMP
    assert "xmp" not in read(animate(grey(), "webp"))[2]


def test_gif_carries_xmp_that_any_reader_gets_over():
    plain, content = animate(grey(), "gif"), animate(grey(), "gif", xmp=XMP)
    for shown, expected in zip(read(content)[:2], read(plain)[:2], strict=True):
        assert np.array_equal(shown, expected)
    assert read(content)[2]["loop"] == 0
    start = content.index(b"\x21\xff\x0bXMP DataXMP")
    extension = content[start : start + len(content) - len(plain)]
    assert content == plain[:start] + extension + plain[start:]
    assert extension[14:-258] == XMP
    # Whichever byte of the packet is taken for a block's length, the blocks end with the extension.
    for start in range(14, 14 + len(XMP)):
        at = start
        while extension[at]:
            at += 1 + extension[at]
        assert at == len(extension) - 1


def test_mp4_carries_xmp():
    content = animate(grey(), "mp4", xmp=XMP)
    kind, body = boxes(content)[-1]
    assert (kind, body) == ("uuid", XMP_BOX + XMP)
    assert len(decode(content)[0]) == 5
    assert "uuid" not in [kind for kind, _ in boxes(animate(grey(), "mp4"))]


@pytest.mark.parametrize(
    "n,options,said",
    [
        (0, {}, "no frames"),
        (2, {"fps": 0.5}, "fps 0.5: must be from 1 to 50"),
        (2, {"fps": 60}, "fps 60: must be from 1 to 50"),
        (2, {"fps": float("nan")}, "fps nan"),
        (2, {"scale": 0}, "scale 0 makes .* 1 or more"),
        (2, {"scale": 257}, "scale 257 makes sides of 4112 pixels: .* at most 4096"),
    ],
)
def test_animations_that_cannot_be(n, options, said):
    with pytest.raises(UserError, match=said):
        animate(grey(n), "webp", **options)
