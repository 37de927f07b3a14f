"""WebDataset: tar shards in which files with the same name, but for its extension, are a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa

from biggan.data.sources.archives import Member, MemberSource, tar_members
from biggan.data.sources.columns import LABEL_NAMES
from biggan.data.sources.decoding import is_image_name
from biggan.data.sources.files import File, is_named, splits_of, unpacked
from biggan.data.sources.folders import describe, is_litter
from biggan.data.sources.labels import classify, listed
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.source import SourceError
from biggan.data.sources.splits import choose
from biggan.storage import Folder

_LABEL_LIMIT = 1 << 20
"""Bytes that a file with a label may have."""


def sample_key(path: str) -> tuple[str, str]:
    """A member's sample and its extension: all after the first dot of its name, in lower case."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower()


def is_webdataset(shard: File, look_at: int = 200) -> bool:
    """Whether a tar archive's files are samples with labels beside the images."""
    images, labels = set(), set()
    for member in islice(tar_members(shard), look_at):
        key, extension = sample_key(member.name)
        if extension in ("cls", "json"):
            labels.add(key)
        elif is_image_name(member.name):
            images.add(key)
    return bool(images & labels)


@dataclass
class _Samples:
    """What the shards hold, as it is found."""

    members: list[Member] = field(default_factory=list)
    archive: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


class WebDataset(MemberSource):
    """Samples of tar shards, with a label in `.cls`, or in `.json` by a key."""

    def __init__(self, shards: Sequence[File], place: Folder | str, options: SourceOptions) -> None:
        """List the shards; raises `SourceError` if one is damaged, or there are no labels."""
        splits = splits_of(shards, place)
        named = is_named(place)
        chosen, held_out = choose(splits, options.split, f"--source {place}", named=named)
        super().__init__([shards[i] for i in chosen], options.window, zipped=False)
        self.place = place
        self.options = options
        self.split = options.split if any(splits) else None
        found = _Samples()
        for number, shard in enumerate(self.archives):
            aside = held_out is not None and bool(held_out[number])
            self._list(number, shard, aside, found)
        if not found.members:
            first = "".join(f"; {ref}: {reason}" for ref, reason in found.bad[:1])
            raise SourceError(
                f"--source {place} holds no sample of an image and its label: expected NAME.jpg"
                f" (or .png, .webp, ...) and NAME.cls (or .json) side by side{first}"
            )
        labelled = classify(
            pa.array(found.labels, pa.string()),
            lambda row: self._ref(found, row),
            column=options.label_column or "cls",
            text=True,
        )
        self._keep(
            [found.members[row] for row in labelled.rows],
            np.array(found.archive)[labelled.rows],
        )
        self.classes, self.labels = labelled.classes, labelled.labels
        if held_out is not None:
            self.held_out = np.array(found.held_out)[labelled.rows]
        self.findings = labelled.findings
        self.rejected = [*listed(found.bad, len(found.bad)), *labelled.rejected]
        self.unreadable = len(found.bad) + labelled.unreadable

    def _ref(self, found: _Samples, row: int) -> str:
        name = found.members[row].name
        if len(self.archives) == 1:
            return name
        return f"{self.archives[found.archive[row]].name}/{name}"

    def _list(self, number: int, shard: File, aside: bool, found: _Samples) -> None:
        members = (m for m in tar_members(shard) if not is_litter(m.name.rpartition("/")[2]))
        for key, group in groupby(members, lambda member: sample_key(member.name)[0]):
            files = {sample_key(member.name)[1]: member for member in group}
            image = self._image(shard, key, files)
            if image is None:
                found.bad.append((f"{shard.name}/{key}", "a sample without an image"))
                continue
            label = self._label(shard, files)
            if label is None:
                found.bad.append((f"{shard.name}/{image.name}", "no label beside the image"))
                continue
            found.members.append(image)
            found.archive.append(number)
            found.labels.append(label)
            found.held_out.append(aside)

    def _image(self, shard: File, key: str, files: dict[str, Member]) -> Member | None:
        if self.options.image_column:
            return files.get(self.options.image_column.lower().lstrip("."))
        images = [extension for extension in files if is_image_name(f"x.{extension}")]
        if len(images) > 1:
            raise SourceError(
                f"{shard}: sample {key!r} has several images ({', '.join(images)}): choose one with"
                " --image-column EXTENSION"
            )
        return files[images[0]] if images else None

    def _label(self, shard: File, files: dict[str, Member]) -> str | None:
        wanted = self.options.label_column.lstrip(".")
        extension = wanted.lower() or "cls"
        if extension in files and extension != "json":
            return _text(shard, files[extension])
        if "json" not in files:
            return None
        try:
            fields = json.loads(_text(shard, files["json"]))
        except ValueError:
            return None
        names = [wanted] if wanted else LABEL_NAMES
        return next((_word(value) for value in _values(fields, names)), None)

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        return describe(
            "webdataset",
            self.place,
            split=self.split,
            window=self.window,
            image_column=self.options.image_column,
            label_column=self.options.label_column,
        )


def _text(shard: File, member: Member) -> str:
    content = unpacked(shard).read(member.offset, min(member.size, _LABEL_LIMIT))
    return content.decode("utf-8", "replace").strip()


def _values(fields: Any, names: Sequence[str]) -> Iterator[Any]:
    if isinstance(fields, dict):
        yield from (fields[name] for name in names if fields.get(name) is not None)
    elif isinstance(fields, int | str):
        yield fields


def _word(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(int(value))
    return str(value) if isinstance(value, int | float | str) else None
