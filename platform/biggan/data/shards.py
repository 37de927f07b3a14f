"""One shard of a dataset: its images read, standardized and written, with a record of each item.

A shard is `part-INDEX.parquet` and then `.records/INDEX.npz`, both written whole or not at all. So
whoever finds the record need not write the part again, and whoever writes it twice does no harm.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from biggan.data.dataset import Rejected
from biggan.data.images import ImageError, standardize
from biggan.data.parts import encode
from biggan.data.plan import Plan, Preparation
from biggan.data.sources import Sample, Source
from biggan.storage import Folder

SCHEMA = pa.schema([("image", pa.binary()), ("label", pa.int32()), ("source", pa.string())])
RECORDS = ".records"
SORTED_OUT = {b"biggan": b"sorted out"}
"""Marks a part from which `sort_out` has taken what it should."""
EMPTY = "nearly one colour"
"""How the reason begins for which an image with nothing on it is rejected."""


@dataclass
class Record:
    """What became of a shard's items, a row each in the plan's order."""

    kept: np.ndarray
    """bool `[n]`: the item is an image, and has a row in the part."""
    coloured: np.ndarray
    """bool `[n]`: it showed colour, which a grey dataset has lost."""
    sizes: np.ndarray
    """int32 `[n, 2]`: width and height, as it came."""
    digests: np.ndarray
    """uint8 `[n, 32]`: SHA-256 of class and pixels, of which the fingerprint is made."""
    pixels: np.ndarray
    """uint8 `[n, 16]`: a hash of the pixels alone, equal for copies."""
    rejected: list[Rejected] = field(default_factory=list)

    @classmethod
    def blank(cls, n: int) -> Self:
        """A record of `n` items of which nothing is known."""
        return cls(
            kept=np.zeros(n, dtype=bool),
            coloured=np.zeros(n, dtype=bool),
            sizes=np.zeros((n, 2), dtype=np.int32),
            digests=np.zeros((n, 32), dtype=np.uint8),
            pixels=np.zeros((n, 16), dtype=np.uint8),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but the rejected ones."""
        return {key: value for key, value in vars(self).items() if key != "rejected"}

    def to_bytes(self) -> bytes:
        """As a file's content."""
        rejected = json.dumps([entry.model_dump() for entry in self.rejected]).encode()
        file = io.BytesIO()
        arrays: dict[str, Any] = {**self.arrays(), "rejected": np.frombuffer(rejected, np.uint8)}
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """What `to_bytes` gave; raises whatever a damaged one makes NumPy raise."""
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        rejected = json.loads(arrays.pop("rejected").tobytes())
        return cls(**arrays, rejected=[Rejected(**entry) for entry in rejected])


def write_shard(
    preparation: Preparation, source: Source, items: np.ndarray, draft: Folder, index: int
) -> Record:
    """Load, standardize and write one shard's items as part and record `index`."""
    record = Record.blank(len(items))
    columns: dict[str, list[Any]] = {"image": [], "label": [], "source": []}
    labels = source.labels[items].tolist()
    for row, sample in enumerate(source.read(items)):
        try:
            name = source.classes[labels[row]]
            pixels = _standardized(preparation, sample, name, record, row)
        except UnidentifiedImageError:  # Its text holds an address, another one each time.
            reason = "no image that Pillow can open"
        except ImageError as error:
            reason = str(error)
        except Exception as error:  # Decoders raise anything at all on damaged files.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        else:
            record.kept[row] = True
            columns["image"].append(encode(pixels))
            columns["label"].append(labels[row])
            columns["source"].append(sample.ref)
            continue
        record.rejected.append(Rejected(path=sample.ref, reason=reason))
    _write(draft, part_name(index), pa.table(columns, schema=SCHEMA))
    draft.write_bytes(_record_name(index), record.to_bytes())
    return record


def _standardized(
    preparation: Preparation, sample: Sample, class_name: str, record: Record, row: int
) -> np.ndarray:
    """The pixels of one item, with what there is to record of them."""
    assert preparation.channels is not None
    image = sample.image()
    pixels = standardize(
        image,
        preparation.resolution,
        preparation.channels,
        preparation.fit,
        preparation.background,
    )
    pixels = np.ascontiguousarray(pixels)
    digest = hashlib.sha256(class_name.encode() + b"\0")
    digest.update(pixels.data)
    record.digests[row] = np.frombuffer(digest.digest(), np.uint8)
    record.pixels[row] = np.frombuffer(hashlib.sha256(pixels.data).digest()[:16], np.uint8)
    record.sizes[row] = image.size
    # Of RGB the images themselves can tell.
    record.coloured[row] = preparation.channels == 1 and is_coloured(image)
    if "empty-images" not in preparation.allow and (spread := _spread(pixels)) < 1:
        raise ImageError(f"{EMPTY} (its pixels deviate by {spread:.2f} of 255 levels)")
    return pixels


def is_coloured(image: Image.Image) -> bool:
    """Whether a loaded image shows colour: some of its opaque pixels are far from grey."""
    if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
        return False
    side = min(image.width, 64), min(image.height, 64)
    few = image.resize(side, Image.Resampling.NEAREST).convert("RGBA")
    pixels = np.asarray(few).reshape(-1, 4).astype(np.int16)
    red, green, blue = (pixels[:, channel] for channel in range(3))
    apart = np.maximum(abs(red - green), abs(green - blue))
    # Compression leaves grey images a few levels of colour.
    return bool(((apart > 16) & (pixels[:, 3] > 0)).mean() > 0.001)


def _spread(pixels: np.ndarray) -> float:
    """Standard deviation of the channel that varies most, or 1 if it is at least that."""
    few = pixels[::8, ::8, 0].astype(np.float32).ravel()
    # The whole has at least the squared deviations of a part, which mostly are enough.
    if few @ few - few.sum() ** 2 / few.size >= pixels[:, :, 0].size:
        return 1.0
    return float(pixels.std((0, 1)).max())


def part_name(index: int) -> str:
    """The file of a shard's images."""
    return f"part-{index:06d}.parquet"


def _record_name(index: int) -> str:
    return f"{RECORDS}/{index:06d}.npz"


def _write(draft: Folder, name: str, table: pa.Table) -> None:
    file = pa.BufferOutputStream()
    # The images are compressed already.
    pq.write_table(table, file, compression={"image": "NONE", "label": "ZSTD", "source": "ZSTD"})
    draft.write_bytes(name, file.getvalue())


def finished_shards(draft: Folder, plan: Plan) -> Iterator[tuple[int, Record]]:
    """The shards that an interrupted preparation left whole, with their records."""
    records = set((draft / RECORDS).children())
    there = [i for i in range(len(plan)) if f"{i:06d}.npz" in records]
    with ThreadPoolExecutor(16) as pool:  # Object stores take their time to answer.
        for index, record in zip(
            there, pool.map(lambda i: _finished(draft, i), there), strict=True
        ):
            if record is not None and len(record.kept) == len(plan.items(index)):
                yield index, record


def _finished(draft: Folder, index: int) -> Record | None:
    try:
        record = Record.from_bytes(draft.read_bytes(_record_name(index)))
        path = f"{draft.path}/{part_name(index)}"
        with pq.ParquetFile(path, filesystem=draft.filesystem) as part:
            whole = part.metadata.num_rows == record.kept.sum() or _is_sorted_out(part.schema_arrow)
    except Exception:  # Damaged or gone, in any way: it is written again.
        return None
    return record if whole else None


def _is_sorted_out(schema: pa.Schema) -> bool:
    return SORTED_OUT.items() <= (schema.metadata or {}).items()


def sort_out(
    draft: Folder, index: int, dropped: np.ndarray, held_out: np.ndarray, renumbered: np.ndarray
) -> None:
    """Take rows out of a part: some for good, some into `held_out-INDEX.parquet`.

    Labels become `renumbered[label]`. A part that was sorted out before is left alone.
    """
    table = pq.read_table(f"{draft.path}/{part_name(index)}", filesystem=draft.filesystem)
    if _is_sorted_out(table.schema):
        return
    labels = pa.array(renumbered[table["label"].to_numpy()], pa.int32())
    table = table.set_column(1, SCHEMA.field("label"), labels)
    if held_out.any():
        _write(draft, f"held_out-{index:06d}.parquet", table.filter(pa.array(held_out)))
    table = table.filter(pa.array(~(dropped | held_out)))
    # Last, since its mark says that all is done.
    _write(draft, part_name(index), table.replace_schema_metadata(SORTED_OUT))
