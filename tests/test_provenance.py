"""Where pictures came from: what files carry, as others read it, and what is believed of it."""

import base64
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import add_imported, job
from PIL import Image

from biggan.animation import animate
from biggan.config import ModelConfig
from biggan.directions import find_directions
from biggan.errors import UserError
from biggan.generation import draw_sheet
from biggan.interpolation import walk
from biggan.models import ModelCard, ModelStore, load_generator, model_name, weights_sha256
from biggan.networks import Generator
from biggan.provenance import (
    MAX_IMAGES,
    compare,
    compare_size,
    describe,
    lay_out,
    packet,
    read_origin,
    save,
    save_like,
)
from biggan.recipe import Origin, Recipe
from biggan.reproduction import UnknownModelError, make, remake, verify
from biggan.truncation import TruncationTables

FORMATS = ("PNG", "WEBP", "JPEG", "GIF")
NAMES = ["cat", 'a "dog" & <bird>', "Käfer 虫", "]]> '\n\x00"]
SPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "iptc": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "note": "http://ns.adobe.com/xmp/note/",
    "own": "urn:x-biggan:origin:1#",
}


def generator(channels, seed=0):
    torch.manual_seed(seed)
    config = ModelConfig(ch_g=4, ch_d=2, z_dim=12, shared_dim=8)
    G = Generator(config, resolution=16, channels=channels, n_classes=4)
    G.class_names = NAMES
    return G.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def model(request, storage):
    """A model in the store: its folder and generator."""
    folder = add_imported(f"pictures{request.param}", generator(request.param))
    return folder, load_generator(folder.uri)


def way(G, start, end, steps):
    """The recipes from one (seed, class id) pair to another."""
    stops = [Recipe(classes={class_id: 1.0}, seed=seed) for seed, class_id in (start, end)]
    return walk(G, stops, steps - 1, find_directions(G))


def origin_by(model, recipes, **layout):
    folder, G = model
    return Origin.of(model_name(folder), weights_sha256(folder), G.class_names, recipes, **layout)


def picture_by(model, image_format, n=1, **options):
    """A picture of `n` images with consecutive seeds, as a file, and its origin."""
    recipes = [Recipe(classes={i % 4: 1.0}, seed=i, truncation=0.7) for i in range(n)]
    layout = {"columns": 3, "gap": 2, "scale": 2} if n > 1 else {}
    origin = origin_by(model, recipes, **layout)
    picture = lay_out(make(model[1], recipes), origin)
    return save(picture, image_format, origin, **options), origin


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


# What a file carries.


def latents(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 128)).astype(np.float32).tolist()


def origin_of(*recipes, **layout):
    return Origin.of("m@v1", "0" * 64, NAMES, recipes, **layout)


ONE = origin_of(Recipe(classes={0: 1.0}, seed=2**63 - 1, truncation=0.7))
GIVEN = [Recipe(classes={}, z=z, y=y) for z, y in zip(latents(128), latents(128, 1), strict=True)]
ORIGINS = {
    "one": ONE,
    "resized": ONE.model_copy(update={"size": (24, 1024)}),
    "names": origin_of(Recipe(classes=dict.fromkeys(range(4), 0.25), seed=0)),
    "given": origin_of(GIVEN[0].model_copy(update={"edits": {3: -0.1, 0: 1e-30}})),
    "double": origin_of(Recipe(classes={1: 0.1}, z=(0.1, 1 / 3, -1e-300))),
    "seeds": origin_of(
        *[Recipe(classes={i % 4: 1.0}, seed=i) for i in range(1000)], columns=40, gap=2, scale=2
    ),
    "64 latents": origin_of(*[Recipe(classes={0: 1.0}, z=z) for z in latents(64)]),
    "128 given": origin_of(*GIVEN),
}


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("name", ORIGINS)
def test_a_file_gives_back_its_origin_and_its_pixels(image_format, name):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
    data = save(picture, image_format, ORIGINS[name])
    read = read_origin(data)
    assert read == ORIGINS[name]
    assert read.model_dump_json() == ORIGINS[name].model_dump_json()
    plain = io.BytesIO()
    picture.save(
        plain,
        image_format,
        **{"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(image_format, {}),
    )
    assert np.array_equal(pixels(data), pixels(plain.getvalue()))


def jpeg_segments(data):
    """The content of the APP1 segments, by the book."""
    place, found = 2, []
    while data[place + 1] != 0xDA:
        length = struct.unpack(">H", data[place + 2 : place + 4])[0]
        if data[place + 1] == 0xE1:
            found.append(data[place + 4 : place + 2 + length])
        place += 2 + length
    return found


def xmp_of(data, image_format):
    """The packet as others find it: in Pillow's way, or in a GIF's application block."""
    if image_format != "GIF":
        return Image.open(io.BytesIO(data)).info["xmp"]
    block = re.search(
        rb"\x21\xff\x0bXMP DataXMP(.+?)\x01\xff\xfe.{252}\x01\x00\x00", data, re.DOTALL
    )
    return block[1]


def properties(xmp):
    return ElementTree.fromstring(xmp).find("rdf:RDF/rdf:Description", SPACES)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("name", ["one", "names", "128 given"])
def test_others_read_that_it_is_synthetic(image_format, name):
    origin = ORIGINS[name]
    data = save(Image.new("RGB", (16, 16), "red"), image_format, origin)
    found = properties(xmp_of(data, image_format))
    assert found.findtext("iptc:DigitalSourceType", None, SPACES) == (
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    )
    assert found.findtext("xmp:CreatorTool", None, SPACES) == "biggan-platform"
    text = found.findtext("dc:description/rdf:Alt/rdf:li", None, SPACES)
    assert text == describe(origin)
    if image_format == "PNG":
        shown = Image.open(io.BytesIO(data)).text
        assert (shown["Software"], shown["Description"]) == ("biggan-platform", text)


def test_descriptions():
    assert describe(ONE) == f"cat, seed {2**63 - 1}, truncation 0.7, by m@v1; synthetic"
    names = '0.25 x cat + 0.25 x a "dog" & <bird> + 0.25 x Käfer 虫 + 0.25 x ]]> \'\n?'
    assert describe(ORIGINS["names"]) == f"{names}, seed 0, by m@v1; synthetic"
    assert describe(ORIGINS["given"]) == "a given class, a given latent, edited, by m@v1; synthetic"
    assert describe(ORIGINS["64 latents"]) == "64 images of cat, by m@v1; synthetic"
    assert describe(ORIGINS["resized"]).endswith("by m@v1; resized to 24x1024; synthetic")


def test_the_origin_of_one_image_is_legible_json():
    found = properties(packet(ONE)).findtext("own:origin", None, SPACES)
    assert json.loads(found) == {
        "model": "m@v1",
        "weights": "0" * 64,
        "class_names": {"0": "cat"},
        "recipes": [{"classes": {"0": 1.0}, "seed": 2**63 - 1, "truncation": 0.7}],
    }


def test_a_jpeg_has_room_for_more_than_a_segment():
    data = save(Image.new("L", (8, 8)), "JPEG", ORIGINS["128 given"])
    first, *rest = jpeg_segments(data)
    start = b"http://ns.adobe.com/xap/1.0/\0"
    assert first.startswith(start)
    key = properties(first.removeprefix(start)).findtext("note:HasExtendedXMP", None, SPACES)
    whole = b""
    for part in rest:
        head, guid, (size, offset) = part[:35], part[35:67], struct.unpack(">II", part[67:75])
        assert head == b"http://ns.adobe.com/xmp/extension/\0"
        assert (guid.decode(), offset) == (key, len(whole))
        whole += part[75:]
    assert len(whole) == size > 65502
    assert hashlib.md5(whole).hexdigest().upper() == key
    assert properties(whole).find("own:origin", SPACES) is not None


def test_64_latents_fit_into_one_segment():
    assert len(packet(ORIGINS["64 latents"])) <= 65502
    assert len(jpeg_segments(save(Image.new("L", (8, 8)), "JPEG", ORIGINS["64 latents"]))) == 1


def test_an_origin_that_is_too_long_is_left_out():
    picture = Image.new("L", (8, 8))
    longest = ONE.model_copy(update={"recipes": ONE.recipes * MAX_IMAGES})
    assert read_origin(save(picture, "PNG", longest)) == longest
    for recipes in (ONE.recipes * (MAX_IMAGES + 1), GIVEN * 6):
        data = save(picture, "PNG", ONE.model_copy(update={"recipes": tuple(recipes)}))
        assert read_origin(data) is None
        assert b"trainedAlgorithmicMedia" in data
        assert len(data) < 2000


def test_reading_and_comparing_load_no_torch():
    code = "import sys, biggan.provenance; print({'torch', 'ray'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


# What is believed.


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("n", [1, 7])
def test_pictures_of_the_store_are_verified(model, image_format, n):
    data, origin = picture_by(model, image_format, n)
    verdict = verify(data)
    assert (verdict.status, verdict.origin) == ("verified", origin)
    assert (verdict.largest, verdict.mean) == (0, 0.0)
    assert verdict.sentence.startswith(f"made by {origin.model}: made again")


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF"])
def test_animations_are_verified_frame_by_frame(model, image_format):
    origin = origin_by(model, way(model[1], (1, 0), (2, 3), 5))
    first, *rest = (Image.fromarray(i.squeeze()) for i in make(model[1], origin.recipes))

    def animation(frames):
        return save(first, image_format, origin, save_all=True, append_images=frames, duration=40)

    assert verify(animation(rest)).status == "verified"
    assert verify(animation(rest[::-1])).status == "altered"
    assert "frames" in verify(animation(rest[1:])).sentence


@pytest.mark.parametrize("image_format", ["webp", "gif"])
def test_of_equal_frames_one_is_left_which_proves_nothing(model, image_format):
    origin = origin_by(model, way(model[1], (1, 0), (1, 0), 4), scale=2)
    frames = make(model[1], origin.recipes)
    verdict = verify(animate(frames, image_format, scale=2, xmp=packet(origin)))
    assert (verdict.status, verdict.largest) == ("claimed", None)
    assert verdict.sentence.endswith("of 4 frames one is left, which proves nothing")


def test_given_latents_and_edits_are_made_again(model):
    z, y = (np.random.default_rng(i).standard_normal(n) for i, n in enumerate((12, 8)))
    recipes = [
        Recipe(classes={}, z=z.tolist(), y=y.tolist(), edits={0: 2.0}),
        Recipe(classes={1: 0.5, 2: 0.5}, seed=3, edits={1: -1.0}),
    ]
    origin = origin_by(model, recipes, columns=2)
    data = save(lay_out(make(model[1], recipes), origin), "PNG", origin)
    assert np.array_equal(remake(read_origin(data)), make(model[1], recipes))
    assert verify(data).status == "verified"


def shifted(image, by):
    return Image.fromarray((np.asarray(image).astype(int) + by).clip(0, 255).astype(np.uint8))


def block(image):
    changed = np.asarray(image).copy()
    changed[4:8, 4:8] = 255 - changed[4:8, 4:8]
    return Image.fromarray(changed)


CHANGES = {
    "one block": block,
    "cropped": lambda image: image.crop((0, 0, image.width - 1, image.height)),
    "two levels brighter": lambda image: shifted(image, 2),
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "transparent": lambda image: image.convert("RGBA" if image.mode == "RGB" else "LA"),
    "tinted": lambda image: Image.merge(
        "RGB", [image.getchannel(0), *[block(image).getchannel(0)] * 2]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_pixels_are_found_out(model, change):
    data, origin = picture_by(model, "PNG")
    changed = CHANGES[change](Image.open(io.BytesIO(data)))
    if change == "transparent":
        changed.putalpha(0)
    verdict = verify(save(changed, "PNG", origin))
    assert (verdict.status, verdict.origin) == ("altered", origin)


def test_the_difference_is_told_in_grey_levels(model):
    data, origin = picture_by(model, "PNG")
    remade = remake(origin)
    remade[0, 0, 0] = remade[0, 0, 0] ^ 64
    verdict = compare(origin, data, remade)
    assert (verdict.status, verdict.largest, verdict.mean) == ("altered", 64, 64 / 256)
    assert "64 grey levels at most, 0.25 on average" in verdict.sentence


def test_one_grey_level_is_no_difference(model):
    data, origin = picture_by(model, "PNG", n=7)
    remade = remake(origin)
    near = compare(origin, data, remade ^ 1)
    assert (near.status, near.largest) == ("verified", 1)


@pytest.mark.parametrize("n", [1, 7])
def test_jpeg_forgives_rounding_but_neither_seeds_nor_quality(model, n):
    data, origin = picture_by(model, "JPEG", n)
    remade = remake(origin)
    flips = np.random.default_rng(0).random(remade.shape) < 0.01
    assert compare(origin, data, remade ^ flips).status == "verified"
    assert verify(picture_by(model, "JPEG", n, quality=60)[0]).status == "altered"
    others = [recipe.model_copy(update={"seed": 100 + recipe.seed}) for recipe in origin.recipes]
    forged = save(lay_out(make(model[1], others), origin), "JPEG", origin)
    assert verify(forged).status == "altered"
    assert verify(save(block(Image.open(io.BytesIO(data))), "JPEG", origin)).status == "altered"
    png = picture_by(model, "PNG", n)[0]
    again = save(Image.open(io.BytesIO(png)), "JPEG", read_origin(png), quality=60)
    assert verify(again).status == "altered"


def resized(model, image_format, size, **options):
    """A picture of one image, resized, as a file, and its origin."""
    origin = origin_by(model, [Recipe(classes={1: 1.0}, seed=5)], size=size)
    return save(lay_out(remake(origin), origin), image_format, origin, **options), origin


SIZES = [(40, 40), (16, 16), (9, 31), (1, 1), (700, 1024)]


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_resized_pictures_are_verified(model, image_format, size):
    data, origin = resized(model, image_format, size)
    verdict = verify(data)
    assert (verdict.status, verdict.origin, verdict.largest) == ("verified", origin, 0)
    image = Image.fromarray(make(model[1], origin.recipes)[0].squeeze())
    expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    assert np.array_equal(pixels(resized(model, "PNG", size)[0]), expected)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_changes_of_a_resized_picture_are_found_out(model, image_format):
    data, origin = resized(model, image_format, (40, 56))
    picture = Image.open(io.BytesIO(data))
    others = [recipe.model_copy(update={"seed": 6}) for recipe in origin.recipes]
    forged = {
        "block": block(picture),
        "another seed": lay_out(make(model[1], others), origin),
        "another size": picture.resize((41, 56)),
        "not resized": lay_out(remake(origin), origin.model_copy(update={"size": None})),
        "another filter": Image.open(io.BytesIO(resized(model, image_format, None)[0])).resize(
            (40, 56), Image.Resampling.NEAREST
        ),
    }
    for what, other in forged.items():
        assert verify(save(other, image_format, origin)).status == "altered", what
    # Without its size, the origin is not that of this picture.
    unsaid = origin.model_copy(update={"size": None})
    assert verify(save(picture, image_format, unsaid)).status == "altered"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_one_grey_level_is_no_difference_once_it_is_resized(model, image_format):
    data, origin = resized(model, image_format, (40, 40))
    remade = remake(origin)
    flips = np.random.default_rng(0).random(remade.shape) < 0.01
    assert compare(origin, data, remade ^ flips).status == "verified"
    brighter = shifted(Image.open(io.BytesIO(data)), 3 if image_format == "PNG" else 30)
    assert verify(save(brighter, image_format, origin)).status == "altered"


def test_the_colours_of_a_gif_prove_little(storage):
    folder = add_imported("palettes", generator(3))
    model = folder, load_generator(folder.uri)
    data, origin = picture_by(model, "GIF", n=30)
    remade = remake(origin)
    noise = np.random.default_rng(0).random(remade.shape) < 0.5
    assert compare(origin, data, remade ^ noise).status == "claimed"
    others = [recipe.model_copy(update={"seed": 100 + recipe.seed}) for recipe in origin.recipes]
    forged = save(lay_out(make(model[1], others), origin), "GIF", origin)
    assert verify(forged).status == "altered"


def test_what_a_file_says_beyond_its_recipes_is_not_repeated(model):
    data, origin = picture_by(model, "PNG")
    lying = origin.model_copy(update={"class_names": {0: "a real photograph"}})
    verdict = verify(save(Image.open(io.BytesIO(data)), "PNG", lying))
    assert (verdict.status, verdict.origin) == ("verified", origin)


def test_16_bits_are_not_read_as_8(model):
    data, origin = picture_by(model, "PNG")
    grey = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    dark = Image.fromarray(grey.astype(np.uint16))  # Black, wherever it is looked at.
    assert verify(save(dark, "PNG", origin)).status == "altered"


def test_another_seeds_pixels_are_altered(model):
    origin = picture_by(model, "PNG")[1]
    for seed in range(1, 6):
        image = make(model[1], [Recipe(classes={0: 1.0}, seed=seed, truncation=0.7)])
        for image_format in FORMATS:
            forged = save(lay_out(image, origin), image_format, origin)
            assert verify(forged).status == "altered"


@pytest.mark.parametrize(
    "name",
    ["absent@v1", "{}@v9", "{}@best", "{}", "", "@", "../{}@v1", "models/{}@v1", "{0}@../{0}/v1",
     "s3://bucket/{}@v1", "/etc@v1", "{}@v1/", "{}@\x00", "x" * 599],
)  # fmt: skip
def test_models_that_are_not_in_the_store(model, name):
    data, origin = picture_by(model, "PNG")
    named = origin.model_copy(update={"model": name.format(model[0].parent.name)})
    verdict = verify(save(Image.open(io.BytesIO(data)), "PNG", named))
    assert (verdict.status, verdict.origin) == ("unknown model", named)
    with pytest.raises(UnknownModelError):
        remake(named)


def test_other_weights_under_the_same_name(model, tmp_path):
    data, origin = picture_by(model, "PNG")
    folder, G = model
    store = ModelStore(folder.parent.name, str(tmp_path))
    card = ModelCard(name=store.name, version="v1", created="2026-01-01", code={}, licence="")
    store.add(generator(G.channels, seed=1), card, G.sample([0]), 1)
    verdict = verify(data, str(tmp_path))
    assert (verdict.status, verdict.origin) == ("unknown model", origin)
    assert "other weights" in verdict.sentence
    assert verify(data).status == "verified"


@pytest.mark.parametrize("image_format", FORMATS)
def test_pictures_that_say_nothing(image_format):
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, image_format)
    verdict = verify(file.getvalue())
    assert (verdict.status, verdict.origin) == ("no origin", None)


@pytest.mark.parametrize(
    "recipe,said",
    [
        (Recipe(classes={4: 1.0}, seed=0), "class 4 is not in 0..3"),
        (Recipe(classes={-1: 1.0}, seed=0), "class -1"),
        (Recipe(classes={2**70: 1.0}, seed=0), "class 1180591620717411303424"),
        (Recipe(classes={}, z=(1.0,)), "z has 1 numbers"),
        (Recipe(classes={}, seed=0, y=(1.0,) * 9), "y has 9 numbers"),
        (Recipe(classes={}, seed=0, edits={12: 1.0}), "direction 12"),
        (Recipe(classes={}, z=(0.0,) * 12, truncation=1.5), "truncation is 1.5"),
        (Recipe(classes={}, seed=0, truncation=1e300), "truncation is 1e+300"),
    ],
)
def test_recipes_that_the_model_cannot_follow(storage, recipe, said):
    G = generator(1)
    G.add_tables(TruncationTables(truncations=(0.0, 0.5, 1.0), convention="scale"))
    folder = add_imported("scaled-provenance", G)
    origin = Origin(
        model=model_name(folder), weights=weights_sha256(folder), class_names={}, recipes=(recipe,)
    )
    verdict = verify(save(Image.new("L", (16, 16)), "PNG", origin))
    assert verdict.status == "altered"
    assert said in verdict.sentence


def test_extreme_numbers_are_made_without_a_word(model):
    recipe = Recipe(
        classes={0: 3.4e38, 1: -3.4e38}, z=(3.4e38,) * 12, y=(-3.4e38,) * 8, edits={0: 3.4e38}
    )
    origin = origin_by(model, [recipe])
    assert verify(save(lay_out(remake(origin), origin), "PNG", origin)).status == "verified"


@pytest.mark.parametrize(
    "layout",
    [
        {"columns": 10**6},
        {"gap": 10**9},
        {"scale": 10**9},
        {"columns": 10**4000, "scale": 10**4000},
    ],
)
def test_sizes_are_compared_before_anything_is_laid_out(model, layout):
    data, origin = picture_by(model, "PNG")
    large = save(Image.open(io.BytesIO(data)), "PNG", origin.model_copy(update=layout))
    tracemalloc.start()
    assert verify(large).status == "altered"
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("layout", [{"scale": 10**6}, {"gap": 10**4000}, {"columns": 10**6}])
def test_a_file_cannot_ask_for_a_huge_picture(model, layout):
    origin = origin_by(model, [Recipe(classes={1: 1.0}, seed=5)], **layout)
    data = save(Image.new("RGB", (16, 16)), "PNG", origin)
    with pytest.raises(UserError, match="more than 20,000,000 pixels"):
        save_like(data, origin, remake(origin), "PNG")


def test_a_long_recipe_beside_a_small_picture_is_not_made(model):
    data, origin = picture_by(model, "PNG")
    many = origin.model_copy(update={"recipes": origin.recipes * 4000})
    verdict = verify(save(Image.open(io.BytesIO(data)), "PNG", many))
    assert verdict == compare_size(many, data, 16)
    assert (verdict.status, verdict.largest) == ("claimed", None)


# Hostile files.


def xmp_file(content: bytes, image_format: str = "PNG") -> bytes:
    """A picture with a packet of somebody's."""
    file = io.BytesIO()
    picture = Image.new("L", (16, 16))
    if image_format == "PNG":
        chunk = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + content
        framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        picture.save(file, "PNG")
        return file.getvalue()[:33] + framed + file.getvalue()[33:]
    picture.save(file, image_format, xmp=content)
    return file.getvalue()


def wrapped(text: bytes) -> bytes:
    return (
        b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><biggan:origin>"
        + text
        + b"</biggan:origin></x:xmpmeta>"
    )


def squeezed(text: bytes) -> bytes:
    return base64.b64encode(zlib.compress(text, 9))


ENTITIES = [f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9)]
BOMB = f'<!DOCTYPE x [<!ENTITY a0 "aaaaaaaaaa">{"".join(ENTITIES)}]>'.encode()
GOOD = json.loads(packet(ONE).decode().partition("<biggan:origin>")[2].partition("<")[0])


def bad(**fields):
    return wrapped(json.dumps(GOOD | fields).encode())


def bad_recipe(**fields):
    return bad(recipes=[GOOD["recipes"][0] | fields])


HOSTILE = {
    "entities": BOMB + wrapped(b"&a9;"),
    "external entity": b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + wrapped(b"&e;"),
    "10 MB without": b"<x:xmpmeta>" + b" " * 10_000_000,
    "10 MB of ours": wrapped(b"{" + b"1" * 10_000_000),
    "10 MB never closed": b"<biggan:origin>" + b"{" * 10_000_000,
    "a million openings": b"<biggan:origin>" * 700_000,
    "no JSON": wrapped(b"{nonsense"),
    "empty": wrapped(b""),
    "no UTF-8": wrapped(b"{\xff\xfe"),
    "no base64": wrapped(b"(((("),
    "base64 of nothing": wrapped(base64.b64encode(b"nothing")),
    "zip bomb": wrapped(squeezed(b'{"model": "' + b"a" * 200_000_000)),
    "zip cut short": wrapped(squeezed(json.dumps(GOOD).encode())[:80]),
    "deep": wrapped(b'{"a":' * 170_000),
    "deeper": wrapped(squeezed(b"[" * 1_000_000)),
    "long number": wrapped(b'{"recipes":' + b"9" * 1_000_000 + b"}"),
    "lists": wrapped(squeezed(b'{"recipes":[' + b"[]," * 100_000 + b"[]]}")),
    "objects": wrapped(squeezed(b'{"recipes":[' + b'{"a":0},' * 50_000 + b"{}]}")),
    "huge n": wrapped(squeezed(b'{"recipes":[' + b'{"classes":{},"seed":1},' * 43_000 + b"{}]}")),
    "a list": wrapped(b"[1, 2]"),
    "a squeezed list": wrapped(squeezed(b"[1, 2]")),
    "recipes of numbers": bad(recipes=[1, 2]),
    "recipes of text": bad(recipes="abc"),
    "no recipes": bad(recipes=[]),
    "recipes null": bad(recipes=None),
    "unknown field": bad(owner="me"),
    "model a number": bad(model=7),
    "model a novel": bad(model="x" * 10_000),
    "weights no digest": bad(weights="f" * 63),
    "columns zero": bad(columns=0),
    "gap negative": bad(gap=-1),
    "scale zero": bad(scale=0),
    "columns a fraction": bad(columns=1.5),
    "size of a million": bad(size=[10**6, 10**6]),
    "size of 10,000 digits": wrapped(squeezed(b'{"size":[' + b"9" * 10_000 + b",1]}")),
    "size above the most": bad(size=[16, 1025]),
    "size zero": bad(size=[0, 16]),
    "size negative": bad(size=[-1, 16]),
    "size a number": bad(size=16),
    "size a fraction": bad(size=[16.5, 16]),
    "size of three": bad(size=[16, 16, 16]),
    "size of a sheet": bad(size=[16, 16], columns=10**6),
    "size and a gap": bad(size=[16, 16], gap=10**9),
    "size and a scale": bad(size=[16, 16], scale=10**9),
    "size of two images": bad(size=[16, 16], recipes=GOOD["recipes"] * 2),
    "class no number": bad_recipe(classes={"cat": 1.0}),
    "weight NaN": bad_recipe(classes={"0": float("nan")}),
    "weight infinite": bad_recipe(classes={"0": float("inf")}),
    "weight too large": bad_recipe(classes={"0": 1e39}),
    "seed negative": bad_recipe(seed=-1),
    "seed and z": bad_recipe(z=[0.0]),
    "z of NaN": bad_recipe(seed=None, z=base64.b64encode(b"\xff" * 8).decode()),
    "z cut short": bad_recipe(seed=None, z=base64.b64encode(b"\0" * 7).decode()),
    "z no base64": bad_recipe(seed=None, z="!"),
    "z nested": bad_recipe(seed=None, z=[[0.0]]),
    "edits a list": bad_recipe(edits=[1]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_packets_are_no_origins_and_take_little(name):
    data = xmp_file(HOSTILE[name])
    tracemalloc.start()
    assert read_origin(data) is None
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()
    assert verify(data).status == "no origin"


def test_the_hostile_packets_differ_from_one_that_is_read():
    for image_format in ("PNG", "WEBP", "JPEG"):
        assert read_origin(xmp_file(bad(), image_format)) == ONE
        assert read_origin(xmp_file(bad(size=[24, 1024]), image_format)) == ORIGINS["resized"]
    assert read_origin(xmp_file(wrapped(squeezed(json.dumps(GOOD).encode())))) == ONE
    assert read_origin(xmp_file(bad(correction=True))) == ONE  # An old file's.


@pytest.mark.parametrize("image_format", FORMATS)
def test_files_cut_short_or_with_wrong_bytes(model, image_format):
    data, origin = picture_by(model, image_format)
    for end in range(0, len(data), 61):
        cut = data[:end]
        assert read_origin(cut) in (None, origin)
        assert verify(cut).status in ("no origin", "altered", "verified")
    assert verify(data[:-40]).status == "altered"
    draws = np.random.default_rng(0)
    for _ in range(30):
        wrong = bytearray(data)
        for place in draws.integers(0, len(data), 5):
            wrong[place] = draws.integers(256)
        verify(bytes(wrong))  # Raises nothing.


@pytest.mark.parametrize("data", [b"", b"GIF8", packet(ONE), b"\0" * 1000], ids=len)
def test_what_is_no_picture_has_no_origin(data):
    assert read_origin(data) is None


def test_a_picture_of_too_many_pixels_is_not_decoded(model):
    origin = picture_by(model, "PNG")[1]
    wide = origin.model_copy(update={"scale": 400})
    data = save(Image.new("L", (6400, 6400)), "PNG", wide)
    verdict = verify(data)
    assert verdict.status == "claimed"  # Nobody has looked whether it was altered.
    assert "40,960,000 pixels are more than 20,000,000: too many to be compared" in verdict.sentence


# Sheets and the command.


@pytest.mark.parametrize("image_format", FORMATS)
def test_sheets_carry_their_origin(model, image_format):
    folder, G = model
    recipes = way(G, (1, 0), (2, 3), 4) + way(G, (2, 3), (3, 3), 4)
    data = draw_sheet(folder, G, recipes, 4, image_format)
    assert pixels(data).shape[:2] == (2 * 34 + 2, 4 * 34 + 2)
    assert verify(data).status == "verified"


@pytest.fixture
def generate_here(storage, job_here):
    """`jobs/generate.py` in this process: its exit status, and what it said."""
    return partial(job_here, "generate")


def test_the_command_makes_a_picture_again(storage, generate_here, tmp_path):
    folder = add_imported("again", generator(3))
    picture, again = str(tmp_path / "a.png"), str(tmp_path / "again.webp")
    sheet = ["--model", "again", "--output", picture, "--n", "12", "--interpolate", "4"]
    assert generate_here(*sheet) == (0, f"12 images in {picture}\n")
    done = job("generate", "--reproduce", picture, "--output", again)
    assert f"12 images of {NAMES[0]}" in done.stdout
    assert f"verified: made by {model_name(folder)}: made again, pixels differ by 0" in done.stdout
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(picture)))


def test_what_the_command_says_of_a_picture(model, generate_here, tmp_path):
    data, origin = picture_by(model, "PNG")
    picture = tmp_path / "a.png"
    picture.write_bytes(save(block(Image.open(io.BytesIO(data))), "PNG", origin))
    status, said = generate_here("--reproduce", picture, "--output", tmp_path / "mended.png")
    assert status == 1
    assert f"altered: names {origin.model}, but made again, pixels differ by" in said
    assert np.array_equal(pixels((tmp_path / "mended.png").read_bytes()), pixels(data))
    status, said = generate_here("--reproduce", picture, "--storage", tmp_path)
    assert (status, said) == (2, f"error: model {origin.model} is not in the store\n")


def test_a_resized_picture_is_made_again(model, generate_here, tmp_path):
    data, origin = resized(model, "PNG", (40, 24))
    (tmp_path / "a.png").write_bytes(data)
    status, said = generate_here("--reproduce", tmp_path / "a.png", "--output", tmp_path / "b.png")
    assert (status, "; resized to 40x24; synthetic" in said) == (0, True)
    again = (tmp_path / "b.png").read_bytes()
    assert np.array_equal(pixels(again), pixels(data))
    assert read_origin(again) == origin
    (tmp_path / "a.png").write_bytes(save(block(Image.open(io.BytesIO(data))), "PNG", origin))
    status, said = generate_here("--reproduce", tmp_path / "a.png")
    assert (status, f"altered: names {origin.model}" in said) == (1, True)


def test_an_animation_is_made_again_as_one(model, generate_here, tmp_path):
    origin = origin_by(model, way(model[1], (1, 0), (2, 3), 5))
    first, *rest = (Image.fromarray(i.squeeze()) for i in make(model[1], origin.recipes))
    options = {"save_all": True, "append_images": rest, "duration": 40}
    (tmp_path / "a.webp").write_bytes(save(first, "WEBP", origin, **options))
    assert generate_here("--reproduce", tmp_path / "a.webp", "--output", tmp_path / "b.png")[0] == 0
    again = Image.open(tmp_path / "b.png")
    assert (again.n_frames, again.info["duration"]) == (5, 40)
    assert verify((tmp_path / "b.png").read_bytes()).status == "verified"
    status, said = generate_here("--reproduce", tmp_path / "a.webp", "--output", tmp_path / "b.jpg")
    assert status == 2
    assert "an animation is no JPEG: write .webp, .gif or .png" in said


@pytest.mark.parametrize(
    "arguments,said",
    [
        ([], "give --model and --output, or --reproduce with a picture"),
        (["--model", "x"], "give --model and --output"),
        (["--reproduce", "{}/absent.png"], "absent.png: there is no such file"),
        (["--reproduce", "{}/plain.png"], "plain.png: it says nothing of where it came from"),
        (
            ["--reproduce", "{}/ours.png", "--output", "{}/x"],
            "/x: must be a picture, such as x.png",
        ),
    ],
)
def test_mistakes(model, generate_here, tmp_path, arguments, said):
    Image.new("L", (16, 16)).save(tmp_path / "plain.png")
    (tmp_path / "ours.png").write_bytes(picture_by(model, "PNG")[0])
    status, output = generate_here(*[argument.format(tmp_path) for argument in arguments])
    assert status == 2
    assert said in output
