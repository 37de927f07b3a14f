"""Bulk generation: files that hold the model's images."""

import io

import numpy as np
import pandas as pd
import pytest
from conftest import add_imported, job
from PIL import Image

import biggan
from biggan.errors import UserError
from biggan.generation import PART_IMAGES, generate
from biggan.reproduction import verify
from biggan.truncation import TruncationTables


def test_parquet_parts_hold_every_image_once(cluster, tiny_model, tmp_path):
    n = PART_IMAGES + 7
    ids = [i % 10 for i in range(n)]
    said = []
    done = generate(
        "tiny@best",
        str(tmp_path),
        class_ids=ids,
        seed=100,
        truncation=0.5,
        file_format="parquet",
        progress=said.append,
    )
    assert done == n
    assert f"generated {n:,}/{n:,} images" in said[-1]
    table = pd.read_parquet(tmp_path).sort_values("seed", ignore_index=True)
    assert table["seed"].tolist() == list(range(100, 100 + n))
    assert table["label"].tolist() == ids
    assert table["class"].tolist() == [str(i) for i in ids]
    G = biggan.load_generator("tiny")
    for row in (0, 3, n - 1):
        image = np.asarray(Image.open(io.BytesIO(table["image"][row])))
        expected = G.sample([ids[row]], seed=100 + row, truncation=0.5)[0, ..., 0]
        assert np.abs(image.astype(int) - expected).max() <= 1
        verdict = verify(table["image"][row])
        assert (verdict.status, verdict.origin.recipes[0].seed) == ("verified", 100 + row)


def test_the_command_writes_folders_of_png_and_sheets(tiny_model, job_here, tmp_path):
    done = job("generate", "--model", "tiny", "--output", str(tmp_path / "set"), "--n", "12",
               "--classes", "3", "7")  # fmt: skip
    assert "12 images in" in done.stdout
    files = sorted(path.relative_to(tmp_path / "set") for path in tmp_path.rglob("*.png"))
    assert [str(file) for file in files[:2]] == ["0003-3/00000000.png", "0003-3/00000002.png"]
    assert len(files) == 12
    for file in files:
        assert verify((tmp_path / "set" / file).read_bytes()).status == "verified"
    sheet = tmp_path / "new" / "sheet.png"
    assert job_here("generate", "--model", "tiny", "--output", sheet, "--n", 40)[0] == 0
    assert Image.open(sheet).size == (10 * 34 + 2, 4 * 34 + 2)
    gif = ("--output", f"{tmp_path}/sheet.GIF", "--n", "10")
    assert job_here("generate", "--model", "tiny", *gif)[0] == 0
    assert Image.open(tmp_path / "sheet.GIF").format == "GIF"


def test_rows_of_a_sheet_lead_from_image_to_image(tiny_model, job_here, tmp_path):
    picture = tmp_path / "between.png"
    flags = ("--interpolate", "4", "--classes", "3", "7", "--seed", "5")
    status, said = job_here("generate", "--model", "tiny", "--output", picture, "--n", 14, *flags)
    assert status == 0
    assert "12 images in" in said
    pixels = np.asarray(Image.open(picture)).astype(int)
    assert pixels.shape == (3 * 34 + 2, 4 * 34 + 2)
    ends = biggan.load_generator("tiny").sample([3, 7, 3, 7], seed=5)[..., 0]
    for row in range(3):  # Every pixel is two by two; 34 pixels from tile to tile.
        for column, image in ((0, ends[row]), (3, ends[row + 1])):
            top, left = 2 + 34 * row, 2 + 34 * column
            tile = pixels[top : top + 32 : 2, left : left + 32 : 2]
            assert np.abs(tile - image).max() <= 1


def test_a_scale_above_one_is_refused_before_anything_runs(tiny_model, tmp_path):
    G = biggan.load_generator("tiny@v1")
    G.add_tables(TruncationTables(truncations=(0.0, 0.5, 1.0), convention="scale"))
    folder = add_imported("scaled", G)
    with pytest.raises(UserError, match=r"truncation is 1.5: this model scales its latents"):
        generate(folder.uri, str(tmp_path / "out"), class_ids=[0], truncation=1.5)


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--n", "0"], "--n 0: must be 1 or more"),
        (["--seed", "-1"], "seed -1: must be from 0 to"),
        (["--truncation", "-1"], "truncation"),
        (["--classes", "cat"], "cat"),
        (["--interpolate", "1"], "--interpolate 1: must be from 2 to --n 100"),
        (["--interpolate", "8", "--output", "frames"], "--output frames: --interpolate makes a"),
        (["--model", "absent"], "not in the store"),
    ],
)
def test_mistakes(tiny_model, job_here, tmp_path, flags, said):
    output = tmp_path / "x.png"
    status, told = job_here("generate", "--output", output, "--model", "tiny", *flags)
    assert status == 2
    assert said in told
    assert "Traceback" not in told
    assert not output.exists()
