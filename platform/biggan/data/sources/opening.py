"""Opening a source by what the user wrote."""

from __future__ import annotations

from collections.abc import Collection
from typing import get_args

from biggan.data.sources.archives import ArchiveFolders
from biggan.data.sources.cifar import CifarSource
from biggan.data.sources.detection import detect, expand, is_pattern, table_among
from biggan.data.sources.dicom import require_pydicom
from biggan.data.sources.digits import DigitsSource
from biggan.data.sources.files import File, damage_told
from biggan.data.sources.folders import ClassFolders, list_folder
from biggan.data.sources.hdf5 import Hdf5Source
from biggan.data.sources.huggingface import HuggingFaceSource
from biggan.data.sources.idx import IdxSource
from biggan.data.sources.npz import NpzSource
from biggan.data.sources.options import DEFAULTS, Kind, SourceOptions, Split
from biggan.data.sources.parquet import ParquetSource, PreparedSource
from biggan.data.sources.selection import Selection
from biggan.data.sources.source import Source, SourceError, natural
from biggan.data.sources.table import TableSource
from biggan.data.sources.webdataset import WebDataset
from biggan.storage import Folder, StorageError, absolute

_COLUMNS = {"image_column", "label_column"}
_USED: dict[str, set[str]] = {
    "folders": {"labels", "split", "window"},
    "zip": {"split", "window"},
    "tar": {"split", "window"},
    "webdataset": {"split", "window"} | _COLUMNS,
    "parquet": {"split", "window"} | _COLUMNS,
    "huggingface": {"split", "window"} | _COLUMNS,
    "cifar": {"split", "label_column"},
    "idx": {"split"},
    "npz": {"split"} | _COLUMNS,
    "dicom": {"labels", "split", "window"},
    "hdf5": _COLUMNS,
    "table": {"split", "window"} | _COLUMNS,
    "digits": set(),
    "prepared": {"split"},
}
"""Options that each kind listens to, beside `kind` and `classes`."""
_SHARDS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_source(spec: str, options: SourceOptions = DEFAULTS) -> Source:
    """The source that `spec` names: `digits`, or a path, a URI or a pattern of them.

    What lies there is found out by looking at it, unless `options` say. Raises `SourceError` if
    there is nothing usable.
    """
    _check(options)
    # What no reader of one kind expects: no permission, no network, damage of an odd sort.
    with damage_told(f"--source {spec} cannot be read", "look at it with another program"):
        try:
            source = _open(spec, options)
        except StorageError as error:
            raise SourceError(str(error)) from None
    return Selection(source, options.classes) if options.classes else source


def _check(options: SourceOptions) -> None:
    for flag, value, allowed in (
        ("kind", options.kind, get_args(Kind)),
        ("split", options.split, get_args(Split)),
    ):
        if value not in allowed:
            raise SourceError(f"--{flag} {value}: must be one of {', '.join(allowed)}")
    if options.window and not options.window[1] > 0:
        level, width = options.window
        raise SourceError(f"--window {level:g} {width:g}: the width must be more than 0")


def _open(spec: str, options: SourceOptions) -> Source:
    if spec == "digits" and options.kind in ("auto", "digits"):
        return _open_kind("digits", Folder(spec), options)
    if is_pattern(spec):
        return _open_pattern(spec, options)
    place = Folder(absolute(spec))
    if not place.exists():
        raise SourceError(f"--source {place} does not exist")
    if options.kind == "auto":
        return _open_kind(*detect(place), options)
    return _open_kind(options.kind, place, options)


def _open_kind(kind: Kind, place: Folder, options: SourceOptions) -> Source:
    table = _table(kind, place, options)
    _check_used("table" if table else kind, options, also=["labels"] if table else [])
    if table:
        return table
    match kind:
        case "digits":
            return DigitsSource()
        case "folders" | "dicom":
            return _open_folders(kind, place, options)
        case "zip" | "tar":
            return ArchiveFolders(File.find(place), options, zipped=kind == "zip")
        case "webdataset":
            return WebDataset(_files(place, _SHARDS), place, options)
        case "parquet":
            return ParquetSource(_files(place, (".parquet",)), place, options)
        case "huggingface":
            return HuggingFaceSource(place, options)
        case "cifar":
            return CifarSource(place, options)
        case "idx":
            return IdxSource(place, options)
        case "npz":
            return NpzSource(File.find(place), options)
        case "hdf5":
            return Hdf5Source(File.find(place), options)
        case "prepared":
            return PreparedSource(place, options)
    raise SourceError(f"--source {place} is a folder without a table: give the table's own path")


def _table(kind: Kind, place: Folder, options: SourceOptions) -> TableSource | None:
    """The source as a table describes it; None if there is no table."""
    if kind == "dicom":
        require_pydicom()
    if kind == "table" and not place.is_folder():
        return TableSource(File.find(place), options)
    if kind not in ("folders", "dicom", "table") or not place.is_folder():
        return None
    if options.labels:
        labels = File.find(Folder(absolute(options.labels)))
        return TableSource(labels, options, place, kind)
    among = None if options.kind == "folders" else table_among(place)
    if among is None:
        return None
    table, alone = among
    if alone:
        return TableSource(table, options, place, kind)
    try:
        source = TableSource(table, options, place, kind)
    except SourceError:  # A table of something else.
        return None
    return source if source.telling else None


def _open_folders(kind: Kind, place: Folder, options: SourceOptions) -> ClassFolders:
    try:
        source = ClassFolders(place, options)
    except SourceError as error:
        if place.is_folder():
            raise SourceError(f"{error}; or give a table of paths and labels by --labels") from None
        raise
    source.kind = kind
    return source


def _open_pattern(spec: str, options: SourceOptions) -> Source:
    files = [File.find(Folder(uri)) for uri in expand(spec)]
    place = absolute(spec)
    kind = options.kind
    if kind == "auto":
        kind = detect(files[0].folder)[0]
        kind = "webdataset" if kind == "tar" else kind
    _check_used(kind, options)
    if kind == "webdataset":
        return WebDataset(files, place, options)
    if kind == "parquet":
        return ParquetSource(files, place, options)
    raise SourceError(
        f"--source {spec}: a pattern may name WebDataset shards or Parquet files, not {kind}"
    )


def _files(place: Folder, suffixes: tuple[str, ...]) -> list[File]:
    """The file itself, or those of a folder with such names, wherever in it."""
    if not place.is_folder():
        return [File.find(place)]
    paths = [path for path in list_folder(place).files if path.endswith(suffixes)]
    if not paths:
        raise SourceError(f"--source {place} holds no file named *{' or *'.join(suffixes)}")
    return [File.find(place / path) for path in sorted(paths, key=natural)]


def _check_used(kind: str, options: SourceOptions, also: Collection[str] = ()) -> None:
    """Raises `SourceError` if an option was given that says nothing about such a source."""
    for name, value in vars(options).items():
        given = value != getattr(DEFAULTS, name) and name not in ("kind", "classes")
        if given and name not in (*_USED[kind], *also):
            flag = name.replace("_", "-")
            raise SourceError(f"--{flag} {value} says nothing about a source of kind {kind}")
