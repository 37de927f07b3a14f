"""Which column is the image, and which the label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from biggan.data.sources.source import SourceError

# fmt: off
IMAGE_NAMES = (
    "image", "img", "images", "imgs", "picture", "photo", "pixel_values", "image_bytes",
    "img_bytes", "bytes", "jpg", "jpeg", "png", "webp", "content", "data",
)
LABEL_NAMES = (
    "label", "labels", "class", "target", "category", "fine_label", "fine_labels", "cls", "y",
    "class_id", "class_name", "label_id", "classname", "class_label", "category_id",
    "category_name", "diagnosis", "dx", "species", "breed",
)
PATH_NAMES = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "img_path",
    "image", "img", "image_file", "image_name", "image_id", "img_id", "imageid", "uri", "url",
    "id", "name",
)
# fmt: on


def features(schema: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face `datasets` notes of columns in a schema; empty if it did not write it."""
    note = (schema.metadata or {}).get(b"huggingface")
    if note is None:
        return {}
    try:
        found = json.loads(note)["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {
        name: what
        for name, what in found.items()
        if isinstance(what, dict) and name in schema.names
    }


def class_names(feature: dict[str, Any]) -> list[str]:
    """Names of the classes of a ClassLabel column; empty if it is another."""
    if feature.get("_type") != "ClassLabel":
        return []
    return [str(name) for name in feature.get("names") or []]


def image_column(schema: Any, wanted: str, where: object) -> str:
    """The column of images; raises `SourceError` if it is not there or not clear."""
    if wanted:
        return present(schema.names, wanted, "image", where)
    noted = [name for name, what in features(schema).items() if what.get("_type") == "Image"]
    candidates = noted or [field.name for field in schema if _holds_images(field.type)]
    return _one(candidates, IMAGE_NAMES, schema.names, "image", where)


def label_column(schema: Any, wanted: str, image: str, where: object) -> str:
    """The column of labels; raises `SourceError` if it is not there or not clear."""
    if wanted:
        return present(schema.names, wanted, "label", where)
    noted = [name for name, what in features(schema).items() if class_names(what)]
    candidates = noted or [
        field.name for field in schema if field.name != image and _holds_labels(field.type)
    ]
    return _one(candidates, LABEL_NAMES, schema.names, "label", where)


def has_images(schema: Any) -> bool:
    """Whether any column can hold images."""
    return any(_holds_images(field.type) for field in schema)


def present(names: Sequence[str], wanted: str, role: str, where: object) -> str:
    """The column that the user named; raises `SourceError` if there is none such."""
    if wanted not in names:
        raise SourceError(
            f"{where} has no column {wanted!r}: give --{role}-column one of {', '.join(names)}"
        )
    return wanted


def _one(
    candidates: Sequence[str],
    known: Sequence[str],
    names: Sequence[str],
    role: str,
    where: object,
) -> str:
    by_name = {name.lower(): name for name in reversed(candidates)}
    for name in known:
        if name in by_name:
            return by_name[name]
    if len(candidates) == 1:
        return candidates[0]
    raise SourceError(
        f"{where}: which column is the {role}? Give --{role}-column one of {', '.join(names)}"
    )


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_images(kind.storage_type)
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or _is_nested(kind)
    )


def number_type(kind: Any) -> np.dtype | None:
    """The type of the numbers in a column of arrays; None if it is none."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if not _is_nested(kind):
        return None
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    numbers: np.dtype = np.dtype(kind.to_pandas_dtype())
    return numbers


def _is_nested(kind: Any) -> bool:
    """Whether a type is rows of numbers, as arrays are stored."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (lists or pa.types.is_fixed_size_list(kind)):
        return False
    inner = kind.value_type
    return bool(
        pa.types.is_list(inner)
        or pa.types.is_large_list(inner)
        or pa.types.is_fixed_size_list(inner)
    )


def _holds_labels(kind: Any) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_dictionary(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_floating(kind)
    )
