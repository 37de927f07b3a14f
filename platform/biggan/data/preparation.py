"""Preparing a dataset: any images in, Parquet shards and FID reference statistics out.

Runs on Ray Data: the source's items are dealt out as shards, and each shard is one task that loads,
standardizes and writes its images, on any core of any machine, in memory that one shard bounds.
The images do not depend on how many there are. The dataset comes into being whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from PIL import Image, UnidentifiedImageError

from biggan.cluster import connect, largest_node, own_device, quiet_ray_data
from biggan.config import RESOLUTIONS
from biggan.data.dataset import (
    DESCRIPTION,
    Dataset,
    DatasetInfo,
    Progress,
    Rejected,
)
from biggan.data.images import Fit, standardize
from biggan.data.parts import encode, part_files
from biggan.data.sources import Source, open_source
from biggan.errors import UserError
from biggan.latents import Stream, rng
from biggan.metrics.extractors import load_extractor, save_classifier, train_classifier
from biggan.metrics.reference import Reference
from biggan.storage import Folder, locate

SHARD_IMAGES = 1024


class PreparationError(UserError):
    """A dataset that could not be prepared: what was wrong with the images, and the mend."""


@dataclass(frozen=True)
class Shard:
    """What became of one shard's items."""

    index: int
    counts: np.ndarray
    digests: list[bytes]
    rejected: list[Rejected]


@dataclass(frozen=True)
class Preparation:
    """How a source becomes a dataset."""

    source: str
    """`digits`, or a folder (path or URI) with one sub-folder of images a class."""
    resolution: int
    """Side of the square images in pixels: 8, 16, 32, 64, 128, 256 or 512."""
    channels: int = 3
    """3 (RGB) or 1 (grey)."""
    fit: Fit = "crop"
    """Crop the longer side about the centre, or pad the shorter."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB that shows through transparency and fills padding."""
    max_rejected: float = 0.01
    """Largest part of the files that may be unusable, from 0 to 1."""

    def __post_init__(self) -> None:
        if self.resolution not in RESOLUTIONS:
            raise PreparationError(f"resolution {self.resolution}: must be one of {RESOLUTIONS}")
        if self.channels not in (1, 3):
            raise PreparationError(f"channels {self.channels}: must be 1 (grey) or 3 (RGB)")
        if len(self.background) != 3 or not all(0 <= part <= 255 for part in self.background):
            raise PreparationError(f"background {self.background}: must be RGB, 0 to 255 each")
        if not 0 <= self.max_rejected <= 1:
            raise PreparationError(f"max_rejected {self.max_rejected}: must be from 0 to 1")

    def settings(self) -> dict[str, Any]:
        """The choices that shape the images."""
        return {"fit": self.fit, "background": list(self.background)}


def prepare(
    preparation: Preparation,
    name: str,
    root: str | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = print,
) -> DatasetInfo:
    """Prepare dataset `name` and its FID reference; returns its description.

    A dataset that was already prepared from the same source in the same way is kept. Raises
    `PreparationError` if nothing usable is left, if more than `max_rejected` of the files are
    unusable, or if something else has the name (a different dataset with `overwrite` off, or a
    folder that is no dataset); storage is then as it was before. Raises `SourceError` if the source
    has nothing to offer.
    """
    folder = locate("datasets", name, root)
    source = open_source(preparation.source)
    if not folder.exists(DESCRIPTION) and any(map(_is_foreign, folder.children())):
        raise PreparationError(
            f"{folder} exists and is no prepared dataset: use another --name, or remove it yourself"
        )
    if folder.exists(DESCRIPTION) and not overwrite:
        return _existing(folder, preparation, source, progress)
    progress(f"preparing {len(source):,} images in {len(source.classes)} classes")
    connect()
    with folder.created_whole(marker=DESCRIPTION) as draft:
        info = _write_images(preparation, source, draft, progress)
        _measure_reference(draft, progress)
    progress(
        f"dataset {folder.name}: {info.n_images:,} images, {len(info.classes)} classes,"
        f" {len(info.rejected):,} rejected, at {folder}"
    )
    return info


def _is_foreign(name: str) -> bool:
    """Whether a file of that name is none that an interrupted preparation can leave behind."""
    return not (name == "reference" or name.startswith("part-"))


def _existing(
    folder: Folder, preparation: Preparation, source: Source, progress: Progress
) -> DatasetInfo:
    info = DatasetInfo.read(folder)
    wanted = (preparation.resolution, preparation.channels, _origin(preparation, source))
    if (info.resolution, info.channels, info.source) != wanted:
        raise PreparationError(
            f"dataset {folder.name} exists and was prepared differently ({info.resolution} pixels,"
            f" {info.channels} channels, from {info.source}): use another --name, or --overwrite"
        )
    progress(f"dataset {folder.name} is already prepared ({info.n_images:,} images); --overwrite")
    return info


def _origin(preparation: Preparation, source: Source) -> dict[str, Any]:
    return {**source.description, **preparation.settings()}


def _write_images(
    preparation: Preparation, source: Source, draft: Folder, progress: Progress
) -> DatasetInfo:
    counts = np.zeros(len(source.classes), dtype=np.int64)
    digests: list[bytes] = []
    rejected = list(source.rejected)
    start = time.monotonic()
    done = 0
    for shard in _run_shards(preparation, source, draft):
        counts += shard.counts
        digests += shard.digests
        rejected += shard.rejected
        done += int(shard.counts.sum()) + len(shard.rejected)
        rate = done / (time.monotonic() - start)
        progress(f"prepared {done:,}/{len(source):,} images, {rate:,.0f} images/s")
    empty = [i for i, count in enumerate(counts) if count == 0]
    rejected += [
        Rejected(path=source.classes[i], reason="class without a readable image") for i in empty
    ]
    _check_rejected(preparation, source, int(counts.sum()), rejected, progress)
    _drop_classes(draft, empty, len(counts))
    kept = [i for i in range(len(counts)) if i not in empty]
    if len(kept) == 1:
        progress(
            f"warning: all images are of one class, {source.classes[kept[0]]!r}: there is nothing"
            " to choose by class"
        )
    info = DatasetInfo(
        classes=[source.classes[i] for i in kept],
        resolution=preparation.resolution,
        channels=preparation.channels,
        counts=counts[kept].tolist(),
        fingerprint=_fingerprint(preparation, digests),
        source=_origin(preparation, source),
        rejected=rejected,
    )
    draft.write_json(DESCRIPTION, info.model_dump())
    return info


def _run_shards(preparation: Preparation, source: Source, draft: Folder) -> Iterator[Shard]:
    """Write all shards on the cluster; yields what became of each as it is done."""
    # Shuffled, so that a part file is a sample of the whole and streaming readers see all classes.
    order = rng(0, Stream.DATA_ORDER).permutation(len(source))
    plan = [
        {"index": i, "items": order[start : start + SHARD_IMAGES].tolist()}
        for i, start in enumerate(range(0, len(order), SHARD_IMAGES))
    ]
    shared = ray.put(source)

    def task(row: dict[str, Any]) -> dict[str, Any]:
        items = np.asarray(row["items"])
        shard = write_shard(preparation, ray.get(shared), items, draft, int(row["index"]))
        return {
            "index": shard.index,
            "counts": shard.counts.tolist(),
            "digests": b"".join(shard.digests),
            "rejected": json.dumps([r.model_dump() for r in shard.rejected]),
        }

    quiet_ray_data()
    shards = ray.data.from_items(plan, override_num_blocks=len(plan)).map(task)
    for row in shards.iter_rows():
        digests = row["digests"]
        yield Shard(
            index=row["index"],
            counts=np.asarray(row["counts"]),
            digests=[digests[i : i + 32] for i in range(0, len(digests), 32)],
            rejected=[Rejected(**entry) for entry in json.loads(row["rejected"])],
        )


def write_shard(
    preparation: Preparation, source: Source, items: np.ndarray, draft: Folder, index: int
) -> Shard:
    """Load, standardize and write one shard's items as `part-INDEX.parquet`."""
    columns: dict[str, list[Any]] = {"image": [], "label": [], "source": []}
    digests, rejected = [], []
    counts = np.zeros(len(source.classes), dtype=np.int64)
    for sample, label in zip(source.read(items), source.labels[items].tolist(), strict=True):
        try:
            image = sample.load()
            pixels = standardize(
                image if isinstance(image, Image.Image) else Image.fromarray(image),
                preparation.resolution,
                preparation.channels,
                preparation.fit,
                preparation.background,
            )
        except UnidentifiedImageError:  # Its text holds an address, another one each time.
            rejected.append(Rejected(path=sample.ref, reason="no image that Pillow can open"))
            continue
        except Exception as error:  # Decoders raise anything at all on damaged files.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            rejected.append(Rejected(path=sample.ref, reason=reason))
            continue
        digests.append(_digest(source.classes[label], pixels))
        counts[label] += 1
        columns["image"].append(encode(pixels))
        columns["label"].append(label)
        columns["source"].append(sample.ref)
    _write_part(draft, index, columns)
    return Shard(index, counts, digests, rejected)


SCHEMA = pa.schema([("image", pa.binary()), ("label", pa.int32()), ("source", pa.string())])


def _write_part(draft: Folder, index: int, columns: dict[str, list[Any]]) -> None:
    file = io.BytesIO()
    table = pa.table(columns, schema=SCHEMA)
    # The images are compressed already.
    pq.write_table(table, file, compression={"image": "NONE", "label": "ZSTD", "source": "ZSTD"})
    draft.write_bytes(f"part-{index:06d}.parquet", file.getvalue())


def _digest(class_name: str, pixels: np.ndarray) -> bytes:
    return hashlib.sha256(class_name.encode() + b"\0" + pixels.tobytes()).digest()


def _fingerprint(preparation: Preparation, digests: list[bytes]) -> str:
    total = hashlib.sha256(f"{preparation.resolution}x{preparation.channels}".encode())
    for digest in sorted(digests):
        total.update(digest)
    return total.hexdigest()


def _check_rejected(
    preparation: Preparation,
    source: Source,
    usable: int,
    rejected: list[Rejected],
    progress: Progress,
) -> None:
    """List what was rejected on the console; raise if it is too much."""
    for entry in rejected:
        progress(f"rejected {entry.path}: {entry.reason}")
    files = len(source) + source.unreadable
    bad = files - usable
    if not usable:
        raise PreparationError(
            f"none of the {files} files in --source {preparation.source} is a usable image;"
            f" the first: {rejected[0].path}: {rejected[0].reason}"
        )
    if bad > preparation.max_rejected * files:
        raise PreparationError(
            f"{bad} of {files} files ({bad / files:.1%}) are unusable, more than --max-rejected"
            f" {preparation.max_rejected:.1%}: mend or remove those listed, or raise the limit"
        )


def _drop_classes(draft: Folder, empty: list[int], n_classes: int) -> None:
    """Renumber labels in all parts so that classes without images leave no gap."""
    if not empty:
        return
    renumbered = np.cumsum([i not in empty for i in range(n_classes)]) - 1
    for index, part in enumerate(part_files(draft)):
        table = pq.read_table(f"{draft.path}/{part}", filesystem=draft.filesystem)
        columns = table.to_pydict()
        columns["label"] = renumbered[columns["label"]].tolist()
        _write_part(draft, index, columns)


def _measure_reference(draft: Folder, progress: Progress) -> None:
    """Train the built-in extractor and take the dataset's moments, on the best machine there is."""
    node = largest_node()
    progress("training the classifier whose features FID compares")
    # One core is claimed whatever is used: beside an endpoint that holds one, a task that claimed
    # the whole machine would wait for ever.
    task = ray.remote(measure_reference).options(num_cpus=1, num_gpus=min(1, node.gpus))
    accuracy = ray.get(task.remote(draft, max(1, node.cpus)))
    progress(f"classifier: {accuracy:.1%} of held-out images right")


def measure_reference(folder: Folder, threads: int) -> float:
    """Add the `classifier` extractor and its reference to a dataset; returns its accuracy."""
    torch.set_num_threads(threads)
    dataset = Dataset.open(folder.uri)
    device = own_device()
    network, accuracy = train_classifier(dataset, device, progress=print)
    save_classifier(network, accuracy, dataset, folder)
    extractor = load_extractor("classifier", folder, device)
    Reference.measure(dataset, extractor).save(folder, "classifier")
    return accuracy
