"""Where a picture came from, said by the file itself: written, read, and compared with its pixels.

A file carries an XMP packet (ISO 16684-1). Anybody's tools read from it that the picture is
synthetic: IPTC's `DigitalSourceType`, in the words of the Photo Metadata Standard 2025.1. In a
namespace of ours it holds the `Origin`, from which `biggan.reproduction` makes the picture again.

Imports no torch, for the endpoint's gateway reads and compares too.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal
from xml.sax.saxutils import escape, unescape

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict

from biggan.errors import UserError
from biggan.pixels import sheet
from biggan.recipe import Origin, Recipe

CREATOR = "biggan-platform"
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
NAMESPACE = "urn:x-biggan:origin:1#"
LEGIBLE = 2000
"""Characters up to which an origin stays JSON that people can read; then it is compressed."""
MAX_IMAGES, MAX_JSON = 4096, 2**20
"""Images of an origin, and characters: 1,400 latents of 128 numbers. A longer one is left out when
written, and not looked at when read."""
MAX_PIXELS = 20_000_000
"""Pixels of a picture that is compared, all frames together, or uploaded. The largest sheet that an
endpoint gives, 64 images of 512 pixels with gaps, has 16.9 million, and is to be verified there.
Comparing takes 24 bytes a pixel, of which `serving.decoding` has 1 GiB."""
FORMATS = ("PNG", "WEBP", "JPEG", "GIF")
"""Formats that carry an origin, as Pillow names them."""
SIGNATURE = re.compile(rb"\x89PNG\r\n\x1a\n|RIFF....WEBP|\xff\xd8\xff|GIF8[79]a", re.DOTALL)
"""How files of these begin."""
DEFAULTS: Mapping[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}

# Measured on random generators' images, scanned digits and photographs, of 16 to 64 pixels. Another
# batch size leaves 3 pixels in 100,000 one level off; with half of them off, a JPEG of quality 95
# comes out up to 14 levels from what it was. Quality 90 is 17 to 32 away (in a smooth gradient 12),
# quality 60 38 to 90 (31), another seed 139 to 255.
TOLERANCES: Mapping[str, int] = {"JPEG": 15}
"""Largest difference that is none, in grey levels; 1 in formats without loss."""
# Bicubic weights are up to 1.56 in all, of either sign, and are rounded after. With 3 pixels in
# 100,000 one level off, 2 in 1,200 resized noises of 64 pixels came out 2 levels off.
RESIZED = 2
"""The same of a picture that was resized, in formats without loss."""
# Median cut finds other palettes for pixels one level off: up to 152 levels away, on average 3.4;
# another seed's images are 35 to 103 away on average.
PALETTE_MEAN = 5.0
"""Mean difference up to which the 256 colours of a GIF neither prove an origin nor refute it."""


Status = Literal["verified", "altered", "claimed", "unknown model", "no origin"]


class Verdict(BaseModel):
    """Whether a picture came from a model of this store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Status
    """verified: the recipes give these pixels. altered: they give others. claimed: nothing
    proves the origin, as where 256 colours are left of the pixels, or one frame of many. unknown
    model: the store has no such model, or other weights under its name."""
    origin: Origin | None = None
    largest: int | None = None
    """Largest difference, in grey levels, from the picture made again and saved in its format; None
    if no pixels were compared."""
    mean: float | None = None
    """Mean of the differences."""
    sentence: str


def describe(origin: Origin) -> str:
    """An origin in words: "3, seed 7, truncation 0.7, by digits@v2; synthetic"."""
    recipes = origin.recipes
    if len(recipes) == 1:
        what = _describe_image(origin, recipes[0])
    else:
        ids = dict.fromkeys(i for recipe in recipes for i in recipe.classes)
        names = [origin.class_names.get(i, str(i)) for i in ids]
        what = f"{len(recipes)} images of {', '.join(names[:10])}{', ...' if names[10:] else ''}"
    resized = "; resized to {}x{}".format(*origin.size) if origin.size else ""
    return _UNPRINTABLE.sub("?", f"{what[:1000]}, by {origin.model}{resized}; synthetic")


_UNPRINTABLE = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot hold."""


def _describe_image(origin: Origin, recipe: Recipe) -> str:
    names = [(origin.class_names.get(i, str(i)), weight) for i, weight in recipe.classes.items()]
    parts = [name if weight == 1 else f"{weight:g} x {name}" for name, weight in names]
    said = [" + ".join(parts) or "a given class"]
    said.append("a given latent" if recipe.seed is None else f"seed {recipe.seed}")
    if recipe.truncation is not None:
        said.append(f"truncation {recipe.truncation:g}")
    if recipe.edits:
        said.append("edited")
    return ", ".join(said)


def save(picture: Image.Image, image_format: str, origin: Origin, **options: Any) -> bytes:
    """A picture as a file that carries its origin; `options` are those of Pillow's `save`.

    WebP is lossless and JPEG of quality 95 unless they say otherwise, and only such are verified.
    Formats other than `FORMATS` go without an origin.
    """
    image_format = image_format.upper()
    file = io.BytesIO()
    carrier = _CARRIERS.get(image_format, lambda _: {})
    picture.save(file, image_format, **DEFAULTS.get(image_format, {}) | carrier(origin) | options)
    content = file.getvalue()
    return gif_with(packet(origin), content) if image_format == "GIF" else content


def packet(origin: Origin) -> bytes:
    """The XMP packet, UTF-8, for files that `save` does not write."""
    return _packet(_standard(origin) + _own(origin))


def _packet(properties: str) -> bytes:
    """Properties within what XMP wants around them."""
    begin = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    return f'{begin}{_meta(properties)}<?xpacket end="r"?>'.encode()


def _meta(properties: str) -> str:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"'
        ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f' xmlns:biggan="{NAMESPACE}">{properties}</rdf:Description></rdf:RDF></x:xmpmeta>'
    )


def _standard(origin: Origin) -> str:
    """What everybody's tools understand."""
    return (
        f"<Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPES}trainedAlgorithmicMedia"
        f"</Iptc4xmpExt:DigitalSourceType><xmp:CreatorTool>{CREATOR}</xmp:CreatorTool>"
        '<dc:description><rdf:Alt><rdf:li xml:lang="x-default">'
        f"{escape(describe(origin))}</rdf:li></rdf:Alt></dc:description>"
    )


def _own(origin: Origin) -> str:
    """What only we understand; nothing if it is too long."""
    content = origin.model_dump(exclude_defaults=True)
    for recipe in content["recipes"]:
        for name in recipe.keys() & {"z", "y"}:
            recipe[name] = _pack(recipe[name])
    text = json.dumps(content, separators=(",", ":"))
    if len(origin.recipes) > MAX_IMAGES or len(text) > MAX_JSON:
        return ""
    if len(text) > LEGIBLE:
        text = base64.b64encode(zlib.compress(text.encode())).decode()
    return f"<biggan:origin>{escape(text)}</biggan:origin>"


def _pack(vector: tuple[float, ...]) -> str | tuple[float, ...]:
    """Numbers of float32 as base64, a quarter of the characters; others as they are."""
    packed = np.array(vector, "<f4")
    exact = packed.tolist() == list(vector)
    return base64.b64encode(packed.tobytes()).decode() if exact else vector


def _png(origin: Origin) -> dict[str, Any]:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet(origin))
    info.add_text("Software", CREATOR)
    info.add_text("Description", describe(origin))
    return {"pnginfo": info}


def _jpeg(origin: Origin) -> dict[str, Any]:
    """One segment if it fits, else extended XMP (XMP Specification, part 3: Storage in Files)."""
    whole, name = packet(origin), b"http://ns.adobe.com/xap/1.0/\0"
    if len(whole) <= 65502:
        return {"extra": _segment(name + whole)}
    rest = _meta(_own(origin)).encode()
    key = hashlib.md5(rest, usedforsecurity=False).hexdigest().upper()
    space = 'xmlns:xmpNote="http://ns.adobe.com/xmp/note/"'
    note = f"<xmpNote:HasExtendedXMP {space}>{key}</xmpNote:HasExtendedXMP>"
    segments = [_segment(name + _packet(_standard(origin) + note))]
    head = b"http://ns.adobe.com/xmp/extension/\0" + key.encode() + len(rest).to_bytes(4, "big")
    for start in range(0, len(rest), 65400):
        part = rest[start : start + 65400]
        segments.append(_segment(head + start.to_bytes(4, "big") + part))
    return {"extra": b"".join(segments)}


def _segment(content: bytes) -> bytes:
    return b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content


_CARRIERS = {"PNG": _png, "WEBP": lambda origin: {"xmp": packet(origin)}, "JPEG": _jpeg}


def gif_with(xmp: bytes, content: bytes) -> bytes:
    """A GIF with an XMP packet after its global palette (ISO 16684-3).

    The packet stands there as it is. Who reads it as blocks, each of which begins with its length,
    falls somewhere into the 258 bytes after it, all of which lead to their end.
    """
    palette = 3 << (content[10] & 7) + 1 if content[10] & 128 else 0
    start = 13 + palette
    way_out = bytes([1, *range(255, -1, -1), 0])
    block = b"\x21\xff\x0bXMP DataXMP" + xmp + way_out
    return b"GIF89a" + content[6:start] + block + content[start:]


# XMP packets are made to be found without knowledge of the file around them, so ours is: one
# pattern for all formats, and no XML is parsed, so that none of its traps can be laid. Who could
# smuggle an origin past this could as well write one: only pixels prove anything.
_ORIGIN = re.compile(rb"<biggan:origin>([^<]{1,%d})</biggan:origin>" % (2 * MAX_JSON))
_SEAM = re.compile(rb"\xff\xe1..http://ns\.adobe\.com/xmp/extension/\0[0-9A-F]{32}.{8}", re.DOTALL)
"""What lies between the parts of an extended XMP packet."""


def read_origin(data: bytes) -> Origin | None:
    """The origin in the content of a PNG, WebP, JPEG or GIF file, whoever wrote it, or None.

    Whatever the file, this takes memory in proportion to it and to `MAX_JSON`.
    """
    found = SIGNATURE.match(data) and _ORIGIN.search(_SEAM.sub(b"", data))
    if not found:
        return None
    try:
        content = json.loads(_inflated(unescape(found[1].decode())))
        if len(content["recipes"]) > MAX_IMAGES:
            return None
        content.pop("correction", None)  # Of old files, which said so of pixels changed afterwards.
        for recipe in content["recipes"]:
            for name in recipe.keys() & {"z", "y"}:
                if isinstance(recipe[name], str):
                    packed = base64.b64decode(recipe[name], validate=True)
                    recipe[name] = np.frombuffer(packed, "<f4").tolist()
        return Origin.model_validate(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error):
        return None


def _inflated(text: str) -> str:
    """The JSON that a packet's text stands for; raises ValueError if it is too long."""
    if text.startswith("{"):
        return text
    inflator = zlib.decompressobj()
    content = inflator.decompress(base64.b64decode(text, validate=True), MAX_JSON)
    if not inflator.eof:
        raise ValueError("too long")
    return content.decode()


def lay_out(images: np.ndarray, origin: Origin) -> Image.Image:
    """The picture of an origin's images, uint8 `[N, H, W, C]`."""
    page = sheet(images, origin.columns, origin.gap, origin.scale * max(images.shape[1:3]))
    return page.resize(origin.size, Image.Resampling.BICUBIC) if origin.size else page


def _laid_out(origin: Origin, n: int, resolution: int) -> tuple[int, int]:
    """Width and height of the sheet of n images, before it is resized."""
    step, rows = resolution * origin.scale + origin.gap, -(-n // origin.columns)
    return origin.columns * step + origin.gap, rows * step + origin.gap


def save_like(data: bytes, origin: Origin, images: np.ndarray, image_format: str) -> bytes:
    """An origin's images as a file that carries it, animated if the file `data` is.

    Raises `UserError` if that format cannot be, or if it would be larger than `MAX_PIXELS`.
    """
    frames, timing = 1, {}
    # Of a file that is damaged, the origin may be whole.
    with suppress(UserError), _opened(data) as image:
        image.load()  # From WebP, its duration comes with a frame.
        frames, timing = _frames(image), {"duration": image.info.get("duration", 100), "loop": 0}
    width, height = _laid_out(origin, len(images) if frames == 1 else 1, images.shape[1])
    if width * height > MAX_PIXELS:  # Whoever wrote the file could write anything.
        raise UserError(
            f"by what the file says, the picture would have more than {MAX_PIXELS:,} pixels: no"
            " larger ones are made"
        )
    if frames == 1:
        return save(lay_out(images, origin), image_format, origin)
    if image_format not in ("PNG", "WEBP", "GIF"):
        raise UserError(f"an animation is no {image_format}: write .webp, .gif or .png")
    first, *rest = _pages(images, origin, frames)
    return save(first, image_format, origin, save_all=True, append_images=rest, **timing)


def compare_size(origin: Origin, data: bytes, resolution: int) -> Verdict | None:
    """The verdict on a picture that cannot be the origin's, for its size; None if it may be.

    To be asked before anything is made again: what the recipes of a stranger's file cost to make
    is then bounded by its pixels, at most `MAX_PIXELS`. `resolution` is the model's.
    """
    try:
        with _opened(data) as image:
            size, frames = image.size, _frames(image)
    except TooLargeError as error:
        sentence = f"names {origin.model}, but {error}: too many to be compared"
        return Verdict(status="claimed", origin=origin, sentence=sentence)
    except UserError as error:
        return altered(origin, str(error))
    n, side = len(origin.recipes), resolution * origin.scale
    # Of equal frames an animation keeps one.
    if frames == 1 < n and size == (side, side) != origin.size:
        sentence = f"names {origin.model}, but of {n} frames one is left, which proves nothing"
        return Verdict(status="claimed", origin=origin, sentence=sentence)
    if frames > 1:
        fits = size == (side, side) and frames <= n and n * side**2 <= MAX_PIXELS
    else:
        fits = size == (origin.size or _laid_out(origin, n, resolution))
    return None if fits else altered(origin, "its size is another")


def compare(origin: Origin, data: bytes, remade: np.ndarray) -> Verdict:
    """The verdict on a picture whose model the store has.

    `remade` are the images of its recipes, uint8 `[N, H, W, C]`. They are laid out and saved as the
    picture was, so that what its format loses is lost in both.
    """
    if verdict := compare_size(origin, data, remade.shape[1]):
        return verdict
    try:
        with _opened(data) as image:
            pages = _pages(remade, origin, _frames(image))
            with _opened(_saved_like(image, pages)) as again:
                largest, mean = _difference(image, again)
            limit = TOLERANCES.get(str(image.format), RESIZED if origin.size else 1)
            quantized = image.format == "GIF" and pages[0].mode == "RGB"
    except UserError as error:
        return altered(origin, str(error))
    status: Status = "altered"
    said = f"names {origin.model}, but made again"
    if largest <= limit:
        status, said = "verified", f"made by {origin.model}: made again"
    elif quantized and mean <= PALETTE_MEAN:
        status, said = "claimed", f"names {origin.model}, of 256 colours: made again"
    apart = f"pixels differ by {largest} grey levels at most, {mean:.2f} on average"
    sentence = f"{said}, {apart}"
    return Verdict(status=status, origin=origin, largest=largest, mean=mean, sentence=sentence)


def altered(origin: Origin, why: str) -> Verdict:
    """The verdict that a picture is none of its origin's; `why` ends a sentence."""
    return Verdict(status="altered", origin=origin, sentence=f"names {origin.model}, but {why}")


class TooLargeError(UserError):
    """A picture of more than `MAX_PIXELS`."""


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A picture, not yet decoded; raises `UserError` for what is none, too large, or damaged."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height * _frames(image)
            if pixels > MAX_PIXELS:
                raise TooLargeError(f"its {pixels:,} pixels are more than {MAX_PIXELS:,}")
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds for files that are not what they seem.
        raise UserError(f"it cannot be read as a picture: {error}") from None


def _frames(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1))


def _pages(images: np.ndarray, origin: Origin, frames: int) -> list[Image.Image]:
    """The pictures of an origin's images: one with all, or of an animation each its own."""
    if frames == 1:
        return [lay_out(images, origin)]
    single = origin.model_copy(update={"columns": 1, "gap": 0})
    return [lay_out(image[None], single) for image in images]


def _saved_like(image: Image.Image, pages: list[Image.Image]) -> bytes:
    """Pictures in the format of another."""
    file, image_format = io.BytesIO(), str(image.format)
    options = DEFAULTS.get(image_format, {})
    pages[0].save(file, image_format, save_all=len(pages) > 1, append_images=pages[1:], **options)
    return file.getvalue()


def _difference(a: Image.Image, b: Image.Image) -> tuple[int, float]:
    """The largest and the mean difference of two pictures of one size, in grey levels."""
    if _frames(a) != _frames(b):
        raise UserError(f"it has {_frames(a)} frames instead of {_frames(b)}")
    if a.mode.startswith(("I", "F")):  # Which Pillow would cut off at 255.
        raise UserError("its pixels have more than 8 bits")
    largest, total = 0, 0.0
    for frame in range(_frames(a)):
        a.seek(frame)
        b.seek(frame)
        mode = "RGBA" if a.has_transparency_data else "RGB"
        one, other = np.asarray(a.convert(mode)), np.asarray(b.convert(mode))
        apart = np.maximum(one, other) - np.minimum(one, other)
        largest, total = max(largest, int(apart.max())), total + float(apart.mean())
    return largest, total / _frames(a)
