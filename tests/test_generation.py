"""Bulk generation: files that hold the model's images."""

import io

import numpy as np
import pandas as pd
import pytest
from conftest import job
from PIL import Image

import biggan
from biggan.generation import PART_IMAGES, generate


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


def test_the_command_writes_folders_of_png_and_sheets(tiny_model, tmp_path):
    done = job("generate", "--model", "tiny", "--output", str(tmp_path / "set"), "--n", "12",
               "--classes", "3", "7")  # fmt: skip
    assert "12 images in" in done.stdout
    files = sorted(path.relative_to(tmp_path / "set") for path in tmp_path.rglob("*.png"))
    assert [str(file) for file in files[:2]] == ["0003-3/00000000.png", "0003-3/00000002.png"]
    assert len(files) == 12
    sheet = tmp_path / "new" / "sheet.png"
    job("generate", "--model", "tiny", "--output", str(sheet), "--n", "40")
    assert Image.open(sheet).size == (10 * 34 + 2, 4 * 34 + 2)
    job("generate", "--model", "tiny", "--output", f"{tmp_path}/sheet.GIF", "--n", "10")
    assert Image.open(tmp_path / "sheet.GIF").format == "GIF"


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--n", "0"], "--n 0: must be 1 or more"),
        (["--seed", "-1"], "seed -1: must be from 0 to"),
        (["--truncation", "-1"], "truncation"),
        (["--classes", "cat"], "cat"),
        (["--model", "absent"], "not in the store"),
    ],
)
def test_mistakes(tiny_model, tmp_path, flags, said):
    output = tmp_path / "x.png"
    done = job(
        "generate", "--output", str(output), *{"--model": "tiny"}.popitem(), *flags, status=2
    )
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()
