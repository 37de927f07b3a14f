"""Generating images: sheets, and in bulk with Ray Data PNG files by class, or Parquet.

Whatever is written carries its origin (`biggan.provenance`).
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from biggan.cluster import connect, largest_node, own_device, quiet_ray_data
from biggan.data.dataset import Progress
from biggan.data.parts import encode
from biggan.errors import UserError
from biggan.models import find_model, load_generator, model_name, weights_sha256
from biggan.networks import Generator
from biggan.pixels import to_pil
from biggan.provenance import lay_out, save
from biggan.recipe import Origin, Recipe
from biggan.reproduction import make
from biggan.storage import Folder, absolute

Format = Literal["png", "parquet"]
PART_IMAGES = 1024
LEGIBLE_SIDE = 32
"""Pixels that the images of a sheet have a side, at least."""


class _Part:
    """Generates and writes one part; an actor keeps the model between parts."""

    def __init__(
        self,
        model: str,
        weights: str,
        truncation: float | None,
        output: str,
        file_format: Format,
    ) -> None:
        self.G = load_generator(model, device=own_device())
        self.model, self.weights = model_name(Folder(model)), weights
        self.truncation = truncation
        self.output = Folder(output)
        self.write = self._write_png if file_format == "png" else self._write_parquet

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        ids, seeds = [int(i) for i in row["ids"]], [int(s) for s in row["seeds"]]
        self.write(int(row["part"]), self.G.sample(ids, seeds, self.truncation), ids, seeds)
        return {"images": len(ids)}

    def _write_png(self, _part: int, images: np.ndarray, ids: list[int], seeds: list[int]) -> None:
        for image, class_id, seed in zip(images, ids, seeds, strict=True):
            name = re.sub(r"[^\w.-]", "_", self.G.class_names[class_id])
            content = self._png(image, class_id, seed)
            self.output.write_bytes(f"{class_id:04d}-{name}/{seed:08d}.png", content)

    def _png(self, image: np.ndarray, class_id: int, seed: int, **options: int) -> bytes:
        recipe = Recipe(classes={class_id: 1.0}, seed=seed, truncation=self.truncation)
        origin = Origin.of(self.model, self.weights, self.G.class_names, [recipe])
        return save(to_pil(image), "PNG", origin, **options)

    def _write_parquet(
        self, part: int, images: np.ndarray, ids: list[int], seeds: list[int]
    ) -> None:
        encoded = [
            # As datasets are encoded; of other numbers of channels, a PNG would hold a part.
            self._png(*row, compress_level=1) if images.shape[3] in (1, 3) else encode(row[0])
            for row in zip(images, ids, seeds, strict=True)
        ]
        columns = {
            "image": pa.array(encoded, pa.binary()),
            "label": pa.array(ids, pa.int32()),
            "class": [self.G.class_names[i] for i in ids],
            "seed": pa.array(seeds, pa.int64()),
        }
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file)
        self.output.write_bytes(f"part-{part:06d}.parquet", file.getvalue())


def draw_sheet(
    folder: Folder, G: Generator, recipes: Sequence[Recipe], columns: int, image_format: str
) -> bytes:
    """Images on one sheet, in rows of `columns`, as a file; `folder` is that of G in the store.

    Raises `UserError` for recipes that G cannot follow.
    """
    origin = Origin.of(
        model_name(folder),
        weights_sha256(folder),
        G.class_names,
        recipes,
        columns=columns,
        gap=2,
        scale=-(-LEGIBLE_SIDE // G.resolution),
    )
    return save(lay_out(make(G, recipes), origin), image_format, origin)


def generate(
    model: str,
    output: str,
    *,
    class_ids: Sequence[int],
    seed: int = 0,
    truncation: float | None = None,
    file_format: Format = "png",
    gpu: bool | None = None,
    root: str | None = None,
    progress: Progress = print,
) -> int:
    """Generate an image for each entry of `class_ids` into folder `output` (path or URI).

    Image i has seed `seed + i`, from 0 to 2^63 - 1; `truncation` is above 0, or None for none. PNG
    files go to `ID-CLASS/SEED.png` (`0003-cat/00000007.png`); Parquet parts have columns `image`
    (PNG bytes), `label`, `class` and `seed`. All GPUs of the cluster are used if `gpu`, else all
    its CPU cores; if not said, GPUs if there are any by now. Returns the number of images written.
    Raises `StorageError` if there is no such model, `UserError` for a value out of range.
    """
    if not class_ids:
        raise UserError("no classes given: name one for each image")
    folder = find_model(model, root)
    # What is out of range is told here, not by an actor.
    load_generator(folder.uri).latents([seed, seed + len(class_ids) - 1], truncation)
    output = absolute(output)  # Where the actors run, a relative path would lead elsewhere.
    connect()
    plan = [
        {
            "part": part,
            "ids": list(class_ids[start : start + PART_IMAGES]),
            "seeds": list(range(seed + start, seed + min(start + PART_IMAGES, len(class_ids)))),
        }
        for part, start in enumerate(range(0, len(class_ids), PART_IMAGES))
    ]
    quiet_ray_data()
    on_gpu = largest_node().gpus > 0 if gpu is None else gpu
    parts = ray.data.from_items(plan, override_num_blocks=len(plan)).map(
        _Part,  # type: ignore[arg-type]  # Ray makes actors of classes; its types know functions.
        fn_constructor_args=(folder.uri, weights_sha256(folder), truncation, output, file_format),
        concurrency=(1, len(plan)),
        num_cpus=1,
        num_gpus=1 if on_gpu else 0,
    )
    done, start = 0, time.monotonic()
    for row in parts.iter_rows():
        done += int(row["images"])
        rate = done / (time.monotonic() - start)
        progress(f"generated {done:,}/{len(class_ids):,} images, {rate:,.0f} images/s")
    return done
