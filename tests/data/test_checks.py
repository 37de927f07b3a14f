"""Mistakes that users meet in silence elsewhere are told before the work begins, all at once."""

import numpy as np
import pytest
from PIL import Image

from biggan.data.checks import Checks, Colours, before
from biggan.data.dataset import Dataset, DatasetInfo
from biggan.data.plan import Plan
from biggan.data.preparation import Preparation, PreparationError, prepare
from biggan.data.shards import is_coloured
from biggan.data.sources import Finding
from biggan.data.sources.digits import DigitsSource


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def pets(tmp_path):
    """Twelve coloured images each of two classes."""
    for i in range(12):
        save(tmp_path / "pets" / "cats" / f"{i:02}.png", noise(i, 9, 9, 3))
        save(tmp_path / "pets" / "dogs" / f"{i:02}.png", noise(100 + i, 9, 9, 3))
    return tmp_path / "pets"


def refused(root, *said, **choices):
    """Preparing fails without Ray and leaves nothing; its one line says all of that."""
    with pytest.raises(PreparationError) as error:
        prepare(Preparation(str(root), 8, **choices), f"{root}-out", progress=lambda line: None)
    for text in said:
        assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in root.parent.iterdir()) == [root.name]


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    save(tmp_path / "root" / "only" / "0.png", noise(0, 9, 9, 3))
    refused(
        tmp_path / "root",
        "3 things are wrong with --source",
        "(1) all images are of one class, 'only' (1 of them)",
        "(2) fewer images in a class than the reference needs (2 of each class): 'only' has 1",
        "(3) 1 of 1 images looked at are coloured, and a grey dataset would lose that (1% may be)",
        "--allow one-class few-images channels lets it pass",
        channels=1,
    )


def test_small_classes_are_named_smallest_first(pets):
    for i in range(7):
        for k in range(2 if i else 1):
            save(pets / f"rare{i}" / f"{k}.png", noise(i * 10 + k, 9, 9, 3))
    refused(pets, "(2 of each class): 'rare0' has 1; add images", "--allow few-images lets")
    refused(
        pets,
        "(3 of each class, to hold one out): 'rare0' has 1, 'rare1' has 2, 'rare2' has 2,"
        " 'rare3' has 2, 'rare4' has 2 and 2 more; add images",
        held_out=0.1,
    )


def test_rgb_for_grey_images(tmp_path):
    for i in range(4):
        pixels = np.repeat(noise(i, 9, 9, 1), 3, axis=2)  # Grey, and stored as RGB.
        save(tmp_path / "root" / "ab"[i % 2] / f"{i}.png", pixels)
    said = "none of 4 images looked at is coloured: RGB would hold the same values three times"
    refused(tmp_path / "root", said, "use --mode grey", channels=3)


@pytest.mark.parametrize(
    "image,coloured",
    [
        (Image.new("RGB", (50, 50), (200, 60, 60)), True),
        (Image.new("RGB", (50, 50), (90, 94, 90)), False),
        (Image.new("L", (50, 50), 90), False),
        (Image.new("RGB", (50, 50), (200, 60, 60)).convert("P"), True),
        (Image.new("CMYK", (50, 50), (0, 200, 0, 0)), True),
        (Image.new("RGBA", (50, 50), (200, 60, 60, 0)), False),  # Nobody sees it.
        (Image.new("LA", (50, 50)), False),
        (Image.new("I;16", (50, 50)), False),
        (Image.new("YCbCr", (1, 1), (100, 40, 200)), True),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_what_colour_is(image, coloured):
    assert is_coloured(image) == coloured


def test_what_the_source_finds_is_told_too():
    class Gappy(DigitsSource):
        findings = (Finding("gaps", "class ids 3 and 5 without 4"), Finding("labels", "no match"))

    said = []
    source = Gappy()
    colours = Colours.look(source, Plan(len(source), 1, 64))
    assert (colours.coloured, colours.looked_at) == (0, 256)
    findings = before(Preparation("digits", 8), source, colours)
    with pytest.raises(PreparationError, match=r"^no match; --allow labels lets it pass$"):
        Checks(Preparation("digits", 8, allow=("gaps",)), said.append).tell(findings)
    assert said == ["warning: class ids 3 and 5 without 4"]
    told = Checks(Preparation("digits", 8, allow=("gaps", "labels")), said.append)
    for _ in range(2):
        told.tell(findings)
    assert len(said) == 3


def test_unknown_checks():
    with pytest.raises(PreparationError, match="allow 'gap': must be of one-class, labels, gaps"):
        Preparation("digits", 8, allow=("gap",))


def test_an_image_with_nothing_on_it_is_left_out(pets, storage, cluster):
    blank = np.full((9, 9, 3), 250, np.uint8)
    blank[4, 4] = 251
    save(pets / "cats" / "blank.png", blank)
    said = []
    with pytest.raises(PreparationError, match="1 are nearly one colour, which --allow empty-im"):
        prepare(Preparation(str(pets), 8), "blank", progress=said.append)
    assert any(line.startswith("rejected cats/blank.png: nearly one colour") for line in said)
    info = prepare(Preparation(str(pets), 8, allow=("empty-images",)), "blank")
    assert info.counts == [13, 12]


def test_colour_that_the_sample_missed_is_found_in_the_end(tmp_path, storage, cluster, monkeypatch):
    for i in range(40):
        save(tmp_path / "root" / "ab"[i % 2] / f"{i}.png", noise(i, 9, 9))
    save(tmp_path / "root" / "a" / "red.png", noise(99, 9, 9, 3))
    monkeypatch.setattr("biggan.data.checks.Colours.look", lambda source, plan: Colours(0, 40))
    with pytest.raises(PreparationError, match="1 of 41 images are coloured, and a grey dataset"):
        prepare(Preparation(str(tmp_path / "root"), 8), "reddish", progress=lambda line: None)


def test_copies_held_out_images_and_their_reference(pets, storage, cluster):
    for i in range(3):
        save(pets / "dogs" / f"copy{i}.png", noise(i, 9, 9, 3))  # Of cats.
    save(pets / "cats" / "copy.png", noise(0, 9, 9, 3))
    said = []
    info = prepare(Preparation(str(pets), 8, held_out=0.25), "split", progress=said.append)
    line = "4 images are exact copies of others, 3 of them under another label"
    assert f"warning: {line}; --drop-duplicates drops them" in said
    assert "  dogs/copy0.png is a copy of cats/00.png" in said
    assert (info.counts, info.held_out) == ([10, 11], [3, 4])
    assert (info.duplicates, info.duplicates_conflicting, info.duplicates_dropped) == (4, 3, False)
    train, held_out = Dataset.open("split"), Dataset.open("split", split="held_out")
    assert (len(train), len(held_out)) == (21, 7)
    rows = {image.numpy().tobytes() for image in train.images}
    assert not rows & {image.numpy().tobytes() for image in held_out.images}
    references = [
        np.load(f"{train.folder.path}/reference/{name}.npz")
        for name in ("classifier", "classifier.held_out")
    ]
    assert [int(reference["count"]) for reference in references] == [21, 7]
    assert len({str(reference["extractor_fingerprint"]) for reference in references}) == 1
    dropped = prepare(
        Preparation(str(pets), 8, held_out=0.25, drop_duplicates=True),
        "split",
        overwrite=True,
        progress=lambda line: None,
    )
    assert (dropped.counts, dropped.held_out) == ([9, 9], [3, 3])
    assert DatasetInfo.read(train.folder) == dropped
    assert {dropped.fingerprint, dropped.held_out_fingerprint}.isdisjoint(
        {info.fingerprint, info.held_out_fingerprint}
    )
