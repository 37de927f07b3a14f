"""From labels as they are stored to classes: numbers or names, some of them missing or absurd."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from biggan.data.dataset import Rejected
from biggan.data.sources.source import Finding, SourceError, natural

_MOSTLY = 0.5
"""Part of all folders with the names of classes from which on folders stand for classes."""
_TELLING = 0.9
"""Part of a folder's images with one label from which on the folder stands for that label."""
_LISTED = 1000
"""Rejected rows that are listed one by one; the others are counted."""


@dataclass(frozen=True)
class Labelled:
    """Rows that have a class, and which."""

    classes: list[str]
    labels: np.ndarray
    """int32 `[n]`, indices into `classes`."""
    rows: np.ndarray
    """int64 `[n]`, in ascending order."""
    rejected: list[Rejected]
    """The other rows."""
    unreadable: int
    """How many."""
    findings: list[Finding]


def classify(
    raw: Any,
    ref: Callable[[int], str],
    names: Sequence[str] = (),
    *,
    column: str = "label",
    text: bool = False,
) -> Labelled:
    """Give every row its class. `raw` is an array of pyarrow or NumPy, a label a row.

    `names` are those of labels 0, 1, ...; without any, a number is its own name. With `text`, as in
    CSV files, words that are numbers one and all are numbers. Raises `SourceError` if labels are of
    a kind that cannot say one class each, or there is none.
    """
    try:
        raw = _flat(raw, column)
        raw.validate(full=True)
    except pa.ArrowInvalid as error:
        raise SourceError(
            f"labels {column!r} cannot be read ({' '.join(str(error).split())}): copy the file"
            " again, or name another --label-column"
        ) from None
    if text:
        raw = _numbers(raw)
    reasons: dict[int, str] = {int(row): "no label" for row in np.flatnonzero(raw.is_null())}
    if pa.types.is_string(raw.type):
        classes, codes = _by_name(raw, reasons)
        findings = gaps_of_names(classes, column)
    else:
        classes, codes, findings = _by_number(raw, names, reasons, column)
    rows = np.flatnonzero(codes >= 0)
    if not len(rows):
        first = f"; the first, {ref(0)}: {reasons[0]}" if reasons else ""
        raise SourceError(f"none of {len(raw):,} labels (column {column!r}) is usable{first}")
    return Labelled(
        classes=classes,
        labels=codes[rows].astype(np.int32),
        rows=rows,
        rejected=listed([(ref(row), reason) for row, reason in _first(reasons)], len(reasons)),
        unreadable=len(reasons),
        findings=findings,
    )


def _first(reasons: dict[int, str]) -> list[tuple[int, str]]:
    return sorted(reasons.items())[:_LISTED]


def listed(first: Sequence[tuple[str, str]], total: int) -> list[Rejected]:
    """Rejected entries of the first `(ref, reason)`, and how many more there are."""
    entries = [Rejected(path=ref, reason=reason) for ref, reason in first[:_LISTED]]
    if total > len(entries):
        entries.append(Rejected(path=f"{total - len(entries):,} more", reason="not listed"))
    return entries


def _flat(raw: Any, column: str) -> Any:
    """One array of integers, floats or strings."""
    if isinstance(raw, np.ndarray):
        if raw.ndim == 2 and raw.shape[1] == 1:
            raw = raw[:, 0]
        if raw.ndim != 1:
            raise SourceError(
                f"labels {column!r} have shape {raw.shape}: several labels an image cannot say one"
                " class; make a source with one label an image"
            )
        raw = pa.array(raw)
    if isinstance(raw, pa.ChunkedArray):
        raw = pa.concat_arrays(raw.chunks) if raw.num_chunks else pa.array([], raw.type)
    if pa.types.is_dictionary(raw.type):
        raw = raw.dictionary_decode()
    kind = raw.type
    if pa.types.is_boolean(kind) or pa.types.is_unsigned_integer(kind):
        return raw.cast(pa.int64())
    if pa.types.is_null(kind):
        return raw.cast(pa.string())
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return raw.cast(pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return raw.cast(pa.string())
    if pa.types.is_decimal(kind):
        return raw.cast(pa.float64())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_string(kind):
        return raw
    raise SourceError(
        f"labels {column!r} are of type {kind}: expected one whole number or one name an image;"
        " name another --label-column"
    )


def _numbers(words: Any) -> Any:
    """Words as numbers if all are; "007" is a name."""
    words = pc.utf8_trim_whitespace(words)
    words = pc.if_else(pc.equal(words, ""), pa.scalar(None, pa.string()), words)
    numeric = pc.match_substring_regex(words, r"^-?(0|[1-9][0-9]*)(\.[0-9]*)?$")
    if words.null_count < len(words) and pc.all(numeric).as_py():
        numbers = words.cast(pa.float64())
        return numbers if len(numbers) else words
    return words


def _by_name(words: Any, reasons: dict[int, str]) -> tuple[list[str], np.ndarray]:
    words = pc.utf8_trim_whitespace(words)
    encoded = words.dictionary_encode()
    found: list[str] = encoded.dictionary.to_pylist()
    classes = sorted((name for name in found if name), key=natural)
    code_of = {name: i for i, name in enumerate(classes)}
    table = np.array([code_of.get(name, -1) for name in found] + [-1])
    codes: np.ndarray = table[pc.fill_null(encoded.indices, len(found)).to_numpy()]
    reasons.update((int(row), "no label") for row in np.flatnonzero(codes < 0))
    return classes, codes


def _by_number(
    numbers: Any, names: Sequence[str], reasons: dict[int, str], column: str
) -> tuple[list[str], np.ndarray, list[Finding]]:
    if pa.types.is_floating(numbers.type):
        values = pc.fill_null(numbers, np.nan).to_numpy(zero_copy_only=False).astype(np.float64)
        missing = np.isnan(values)
        broken = ~missing & ((values != np.floor(values)) | (np.abs(values) >= 2**53))
        ids = np.where(missing | broken, -1, values).astype(np.int64)
        reasons.update((int(row), "no label") for row in np.flatnonzero(missing))
        for row in np.flatnonzero(broken):
            reasons[int(row)] = f"label {values[row]:g} is no whole number"
    else:
        ids = pc.fill_null(numbers, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    for row in np.flatnonzero(ids < 0):
        reasons.setdefault(int(row), f"label {ids[row]} is negative: unlabelled?")
    if names:
        for row in np.flatnonzero(ids >= len(names)):
            reasons[int(row)] = f"label {ids[row]}: the class names end at {len(names) - 1}"
        ids = np.where(ids >= len(names), -1, ids)
    used = np.unique(ids[ids >= 0])
    codes = np.where(ids >= 0, np.searchsorted(used, ids), -1)
    named = unique_names(names)
    classes = [named[number] if names else str(number) for number in used.tolist()]
    return classes, codes, gaps(used, named, column)


def unique_names(names: Sequence[str]) -> list[str]:
    """Class names with the number added to those that stand there twice (ImageNet's cranes)."""
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def gaps(used: np.ndarray, names: Sequence[str] = (), column: str = "label") -> list[Finding]:
    """Whether class ids (ascending) leave out any of 0, 1, ...; they may begin at 1."""
    if not len(used):
        return []
    first = 0 if names or used[0] == 0 else 1
    end = len(names) or int(used[-1]) + 1
    missing = end - first - len(used)
    if not missing:
        return []
    absent = _absent(used, first, end)
    shown = ", ".join(f"{i} ({names[i]!r})" if names else str(i) for i in absent)
    return [
        Finding(
            "gaps",
            f"class ids {_some(used.tolist())} ({column!r}) leave out {shown}"
            + (f" and {missing - len(absent):,} more" if missing > len(absent) else "")
            + ": are images missing? --allow gaps renumbers the classes",
        )
    ]


def _absent(used: np.ndarray, first: int, end: int, limit: int = 5) -> list[int]:
    present = set(used.tolist())
    absent: list[int] = []
    for number in range(first, end):
        if number not in present:
            absent.append(number)
        if len(absent) == limit:
            break
    return absent


def _some(numbers: list[int]) -> str:
    if len(numbers) <= 8:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}"


def gaps_of_names(classes: Sequence[str], column: str = "folders") -> list[Finding]:
    """Gaps in classes named by numbers from 0 or 1; years and other numbers are names."""
    if not classes or not all(name.isascii() and name.isdecimal() for name in classes):
        return []
    numbers = np.unique([int(name[:18]) for name in classes])
    return gaps(numbers, column=column) if numbers[0] <= 1 else []


def check_folders(
    paths: Sequence[str], labels: np.ndarray, classes: Sequence[str], rows: Sequence[int]
) -> list[Finding]:
    """Whether images lie in folders of classes that are not theirs.

    Folders stand for classes if most have a class's name; or if there are as many as classes, and
    nearly all images of each have the same label, another one for each folder.
    """
    folders = [path.split("/")[-2] if "/" in path else "" for path in paths]
    meant = _meaning(folders, labels, classes)
    wrong = [
        i
        for i, (folder, label) in enumerate(zip(folders, labels.tolist(), strict=True))
        if meant.get(folder, label) != label
    ]
    if not wrong:
        return []
    i = wrong[0]
    folder, label = folders[i], classes[labels[i]]
    usual = "" if folder == classes[meant[folder]] else f" (others: {classes[meant[folder]]!r})"
    return [
        Finding(
            "labels",
            f"{len(wrong):,} of {len(paths):,} labels do not match the folder of their image, e.g."
            f" row {rows[i] + 1}: label {label!r}, folder {folder!r}{usual}; correct the table, or"
            " --allow labels to trust it",
        )
    ]


def _meaning(folders: Sequence[str], labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """The class that each folder stands for; empty if folders are no classes."""
    ids = {name.casefold(): i for i, name in enumerate(classes)}
    named = sum(folder.casefold() in ids for folder in folders)
    distinct = set(folders)
    if named > _MOSTLY * len(folders):
        return {f: ids[f.casefold()] for f in distinct if f.casefold() in ids}
    if len(distinct) != len(classes) or len(classes) < 2:
        return {}
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for folder, label in zip(folders, labels.tolist(), strict=True):
        counts[folder][label] += 1
    meant = {folder: count.most_common(1)[0][0] for folder, count in counts.items()}
    agreeing = sum(counts[folder][label] for folder, label in meant.items())
    bijective = len(set(meant.values())) == len(classes)
    return meant if bijective and agreeing >= _TELLING * len(folders) else {}
