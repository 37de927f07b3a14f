"""Images of every kind come out as they should look."""

import io

import numpy as np
import pytest
from PIL import Image

from biggan.data.images import MAX_PIXELS, ImageError, standardize, to_image
from biggan.data.parts import decode, encode


def reopened(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def flat(mode, value, size=(8, 8)):
    return Image.new(mode, size, value)


@pytest.mark.parametrize(
    "image,rgb",
    [
        (flat("RGB", (10, 20, 30)), (10, 20, 30)),
        (flat("L", 77), (77, 77, 77)),
        (flat("1", 1), (255, 255, 255)),
        (flat("RGBA", (10, 20, 30, 255)), (10, 20, 30)),
        (flat("RGBA", (10, 20, 30, 0)), (255, 255, 255)),  # Transparent: the background shows.
        (flat("LA", (50, 0)), (255, 255, 255)),
        (flat("CMYK", (0, 0, 0, 255)), (0, 0, 0)),
        (flat("RGB", (255, 0, 0)).convert("P"), (255, 0, 0)),
        (flat("I;16", 0x8000), (128, 128, 128)),
        (flat("I;16", 0xFFFF), (255, 255, 255)),
        (flat("HSV", (0, 0, 128)), (128, 128, 128)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes(image, rgb):
    pixels = standardize(image, 8, 3)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - rgb).max() <= 2


def test_half_transparent_pixels_blend_with_the_background():
    image = flat("RGBA", (0, 0, 0, 128))
    assert abs(int(standardize(image, 8, 1)[0, 0, 0]) - 127) <= 1
    assert standardize(image, 8, 1, background=(0, 0, 0)).max() == 0


def test_a_palette_with_a_transparent_colour():
    image = flat("P", 0)
    image.putpalette([255, 0, 0] + [0, 0, 0] * 255)
    image = reopened(image, transparency=0)
    assert standardize(image, 8, 3)[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_files():
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    pixels = standardize(reopened(Image.fromarray(ramp)), 8, 1)[:, :, 0]
    assert np.abs(pixels - ramp / 257).max() <= 0.5


def test_floats_span_their_own_range():
    values = np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8)
    pixels = standardize(Image.fromarray(values), 8, 1)
    assert (pixels.min(), pixels.max()) == (0, 255)
    values[0, 0] = np.nan
    with pytest.raises(ImageError, match="not a number"):
        standardize(Image.fromarray(values), 8, 1)


def test_exif_orientation_is_applied():
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255  # Bright above.
    stored = Image.fromarray(upright).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn a quarter clockwise to look at.
    pixels = standardize(reopened(stored, "JPEG", exif=exif, quality=95), 8, 1)[:, :, 0]
    assert pixels[:3].min() > 200
    assert pixels[5:].max() < 50


def test_a_damaged_orientation_leaves_the_image_as_it_is():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (10, 200, 30)).save(file, "PNG", exif=b"Exif\0\0not a TIFF header")
    pixels = standardize(Image.open(io.BytesIO(file.getvalue())), 8, 3)
    assert pixels[4, 4].tolist() == [10, 200, 30]


def test_transparency_of_sixteen_bits():
    values = np.full((8, 8), 40_000, np.uint16)
    values[:, :4] = 1234
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", transparency=1234)
    image = Image.open(io.BytesIO(file.getvalue()))
    assert image.info["transparency"] == 1234
    pixels = standardize(image, 8, 1, background=(255, 255, 255))[:, :, 0]
    assert pixels[4].tolist() == [255] * 4 + [156] * 4


def test_whole_numbers_of_32_bits():
    eight = np.arange(64, dtype=np.int32).reshape(8, 8)
    assert np.array_equal(standardize(Image.fromarray(eight), 8, 1)[:, :, 0], eight)
    wide = np.linspace(-(2**31), 2**31 - 1, 64).astype(np.int32).reshape(8, 8)
    pixels = standardize(Image.fromarray(wide), 8, 1)
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_what_padding_would_leave_nothing_of():
    thin = Image.new("RGB", (1000, 1))
    with pytest.raises(ImageError, match="1000x1 pixels: too narrow"):
        standardize(thin, 16, 3, fit="pad")
    assert standardize(thin, 16, 3).shape == (16, 16, 3)


def test_crop_and_pad():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 100  # The middle square.
    image = Image.fromarray(wide)
    cropped = standardize(image, 8, 1)
    assert (cropped.min(), cropped.max()) == (100, 100)
    padded = standardize(image, 24, 1, fit="pad", background=(255, 0, 0))
    assert padded[0, 0, 0] == padded[-1, 0, 0] == 76  # The red, as grey.
    assert padded[12, 12, 0] == 100
    assert padded[12, 0, 0] == 0


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    pixels = standardize(Image.fromarray(stripes), 8, 1)
    assert np.abs(pixels.astype(int) - 127).max() < 10  # Without it: all black or all white.


def test_absurd_sizes_are_refused_before_decoding():
    bomb = flat("1", 0, (MAX_PIXELS // 1000 + 1, 1000))
    with pytest.raises(ImageError, match="decompression bomb"):
        standardize(reopened(bomb), 8, 1)


def test_truncated_files():
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    with pytest.raises(OSError, match="truncated"):
        standardize(Image.open(io.BytesIO(file.getvalue()[:-500])), 8, 3)


@pytest.mark.parametrize(
    "array,grey",
    [
        (np.array([[0, 77], [200, 255]], np.uint8), [[0, 77], [200, 255]]),
        (np.array([[False, True], [True, False]]), [[0, 255], [255, 0]]),
        (np.array([[0, 257], [514, 65535]], np.uint16), [[0, 1], [2, 255]]),
        (np.array([[0, 257], [514, 65535]], ">u2"), [[0, 1], [2, 255]]),
        (np.array([[0, 7], [9, 127]], np.int8), [[0, 7], [9, 127]]),
        (np.array([[0, 7], [9, 255]], np.int64), [[0, 7], [9, 255]]),
        (np.array([[0, 0.2], [0.4, 0.6]], np.float32), [[0, 51], [102, 153]]),
        (np.array([[0, 7], [9, 254]], np.float64), [[0, 7], [9, 254]]),
        (np.array([[-1, 0], [0.5, 1]], np.float16), [[0, 128], [191, 255]]),
        (np.array([[-5, 0], [5, 5]], np.int16), [[0, 128], [255, 255]]),
    ],
    ids=lambda value: getattr(value, "dtype", None) and str(value.dtype),
)
def test_arrays(array, grey):
    for same in (array, array[:, :, None], np.asfortranarray(array)):
        assert np.asarray(to_image(same)).tolist() == grey
        assert standardize(same, 2, 1)[:, :, 0].tolist() == grey
    colour = np.stack([array] * 3, axis=-1)
    assert np.asarray(to_image(colour))[:, :, 1].tolist() == grey


def test_arrays_with_opacity():
    array = np.zeros((8, 8, 4), np.uint8)
    array[:4, :, 3] = 255
    assert standardize(array, 8, 1)[:, 0, 0].tolist() == [0] * 4 + [255] * 4


@pytest.mark.parametrize(
    "array,said",
    [
        (np.zeros((8, 8, 2), np.uint8), r"channel mismatch: an array of shape \(8, 8, 2\)"),
        (np.zeros((3, 8, 8), np.uint8), r"channel mismatch: an array of shape \(3, 8, 8\)"),
        (np.zeros(8, np.uint8), r"an array of shape \(8,\) is no image"),
        (np.zeros((0, 8), np.uint8), r"holds no pixel"),
        (np.zeros((8, 8), np.complex64), "an array of complex64"),
        (np.full((8, 8), np.nan), "not a number"),
    ],
)
def test_arrays_that_are_no_images(array, said):
    with pytest.raises(ImageError, match=said):
        standardize(array, 8, 3)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_storage_is_lossless(channels):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, channels), dtype=np.uint8)
    assert np.array_equal(decode(encode(image)), image)
