"""What people are shown of a dataset is what is in it, as text and as a page of its own."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from biggan.data.dataset import DESCRIPTION, DatasetInfo, Rejected
from biggan.data.describe import PAGE, describe, find_examples
from biggan.data.parts import encode
from biggan.storage import Folder, StorageError


def make(folder, counts, names=None, **fields):
    """A dataset of one flat image of grey `class_id % 256` after the other, without a reference."""

    folder.mkdir(parents=True)
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(0).shuffle(labels)
    for i, part in enumerate(np.array_split(labels, 3)):
        images = [encode(np.full((8, 8, 1), label % 256, np.uint8)) for label in part]
        refs = [f"{label}/{i}-{k}.png" for k, label in enumerate(part)]
        table = pa.table({"image": images, "label": part.astype(np.int32), "source": refs})
        pq.write_table(table, folder / f"part-{i:06d}.parquet")
    values = {
        "classes": names or [f"class {i}" for i in range(len(counts))],
        "resolution": 8,
        "channels": 1,
        "counts": counts,
        "fingerprint": "f" * 64,
        "source": {"kind": "folders"},
        "rejected": [],
    }
    info = DatasetInfo(**(values | fields))
    Folder(str(folder)).write_json(DESCRIPTION, info.model_dump())
    return info


def shown(folder):
    """The text and the page of a dataset."""
    file = io.StringIO()
    describe(str(folder), console=Console(file=file))
    return file.getvalue(), (folder / PAGE).read_text()


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects images and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.images, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def pixels(image):
    kind, content = image["src"].split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_a_small_dataset(tmp_path):
    make(
        tmp_path / "small",
        [3, 40],
        ["<b>cats</b> & [red]", "dogs"],
        held_out=[1, 4],
        held_out_fingerprint="e" * 64,
        duplicates=5,
        duplicates_conflicting=2,
        sizes={"width": [20, 300, 4000], "height": [10, 200, 3000]},
        rejected=[Rejected(path="a/<i>.png", reason="truncated (7 bytes)")],
        reasons={"truncated (N bytes)": 1},
    )
    text, page = shown(tmp_path / "small")
    parsed = Page(page)
    for part in (
        "<b>cats</b> & [red]",
        "20 to 4,000 pixels, median 300",
        "5 beyond the first of each, 2 of them under another label, kept",
        "truncated (N bytes)",
        "a/<i>.png",
        "e" * 64,
        "the largest has 13 times the images of the",
        "43 images are too few for FID",
    ):
        assert part in text
        assert part in parsed.text
    assert re.search(r"dogs +│ █{40} +│ +40 │ +4", text)
    assert re.search(r"\[red\] +│ █{3} +│ +3 │ +1", text)
    assert "<b>cats" not in page
    assert "dogs: 40 + 4" in parsed.text
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", page)
    assert [image["alt"] for image in parsed.images] == ["<b>cats</b> & [red]"] * 3 + ["dogs"] * 8
    for image in parsed.images:
        label = int(image["title"].split("/")[0])
        assert (pixels(image) == label).all()
        assert pixels(image).shape == (96, 96)


def test_a_thousand_classes(tmp_path):
    counts = [1 + i % 7 for i in range(1000)]
    info = make(tmp_path / "many", counts)
    text, page = shown(tmp_path / "many")
    assert "960 classes between" in text
    assert len(text.splitlines()) < 120
    parsed = Page(page)
    assert "1,000 classes by size, from 7 images to 1" in parsed.text
    assert "20 of 1,000 classes" in parsed.text
    assert len(page) < 500_000
    examples = list(find_examples(Folder(str(tmp_path / "many")), info))
    assert len(examples) == 20
    assert (examples[0].class_id, examples[-1].class_id) == (0, 999)
    for some in examples:
        assert len(some.images) == counts[some.class_id]
        assert all((image == some.class_id % 256).all() for image in some.images)


def test_a_prepared_one(digits):
    text, page = shown(Path(digits.folder.path))
    assert re.search(r"classifier for FID +│ 9\d\.\d% of the images", text)
    assert len(Page(page).images) == 80
    assert "│   178" in text


def test_there_is_nothing_to_describe(tmp_path):
    with pytest.raises(StorageError, match="no prepared dataset"):
        describe(str(tmp_path))


@pytest.mark.parametrize("part", ["\ud800", "x" * 300, "ﷺ\u202e"])
def test_names_of_any_kind(tmp_path, part):
    name = part.encode("utf-8", "backslashreplace").decode()
    make(tmp_path / "odd", [2, 2], [name, "b"])
    _, page = shown(tmp_path / "odd")
    Page(page)
