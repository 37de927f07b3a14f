"""What a source is, found out by looking at it."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Sequence
from itertools import islice

from biggan.data.dataset import DESCRIPTION
from biggan.data.sources import hdf5, huggingface, idx
from biggan.data.sources.archives import tar_members
from biggan.data.sources.cifar import is_cifar
from biggan.data.sources.columns import has_images
from biggan.data.sources.decoding import is_image_name
from biggan.data.sources.dicom import MAGIC as DICOM_MAGIC
from biggan.data.sources.files import DAMAGE, File, decompressed
from biggan.data.sources.folders import entries
from biggan.data.sources.label_table import SUFFIXES
from biggan.data.sources.options import Kind
from biggan.data.sources.parquet import open_footer
from biggan.data.sources.source import SourceError, natural
from biggan.data.sources.splits import split_named
from biggan.data.sources.webdataset import is_webdataset
from biggan.storage import Folder, absolute

_TAR = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BY_SUFFIX: dict[str, Kind] = {
    ".zip": "zip",
    ".npz": "npz",
    ".parquet": "parquet",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".arrow": "huggingface",
    **dict.fromkeys(_TAR, "tar"),
}


def expand(spec: str) -> list[str]:
    """The paths or URIs that a pattern such as `train-{000..012}.tar` or `*.tar` names.

    Raises `SourceError` if there is none.
    """
    written = [absolute(each) for each in _braces(spec)]
    found: list[str] = []
    for each in written:
        if "*" not in each:
            found.append(each)
            continue
        folder, pattern = Folder(each).parent, Folder(each).name
        if "*" in folder.uri:
            raise SourceError(f"--source {spec}: only the last part of a path may hold a '*'")
        names = fnmatch.filter(folder.children(), pattern)
        found += [(folder / name).uri for name in sorted(names, key=natural)]
    if not found:
        raise SourceError(f"--source {spec} names no file that is there")
    return found


def is_pattern(spec: str) -> bool:
    """Whether a source is named by a pattern: an existing path is not one."""
    return bool(re.search(r"\*|\{.*(,|\.\.).*\}", spec)) and not Folder(absolute(spec)).exists()


def _braces(spec: str) -> list[str]:
    """`a{1..3}` is a1, a2, a3; `{01..10}` keeps its zeros; `{x,y}` is x, y."""
    choices = []
    for i, part in enumerate(re.split(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", spec)):
        if i % 2 == 0:
            choices.append([part])
        elif numbers := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = numbers.groups()
            choices.append([f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(parts) for parts in itertools.product(*choices)]


def detect(place: Folder) -> tuple[Kind, Folder]:
    """What lies at a path or URI, and where exactly; raises `SourceError` if that is unclear."""
    if place.is_folder():
        return _detect_folder(place)
    return _detect_file(File.find(place)), place


def _detect_folder(place: Folder) -> tuple[Kind, Folder]:
    files, folders = entries(place)
    for inner in _downloads(folders):  # They have the archives they came in beside them.
        if (place / inner).is_folder():
            kind = _kind_of(place / inner, *entries(place / inner))
            if kind in ("cifar", "idx"):
                return kind, place / inner
    kind = _kind_of(place, files, folders)
    if kind:
        return kind, place
    if "data" in folders:  # As in the repositories of Hugging Face.
        kind = _kind_of(place / "data", *entries(place / "data"))
        if kind == "parquet":
            return kind, place / "data"
    for name in filter(split_named, folders):
        kind = _kind_of(place / name, *entries(place / name))
        if kind in ("parquet", "webdataset"):
            return kind, place
    return ("dicom" if _holds_dicom(place) else "folders"), place


def _downloads(folders: Sequence[str]) -> list[str]:
    """Folders in which torchvision puts the sets that it downloads."""
    cifar = [name for name in folders if name in ("cifar-10-batches-py", "cifar-100-python")]
    return cifar + [f"{name}/raw" for name in folders if name.endswith("MNIST")]


def _kind_of(place: Folder, files: Sequence[str], folders: Sequence[str]) -> Kind | None:
    """What a folder is by the names in it; None if these say nothing."""
    parquet = [name for name in files if name.endswith(".parquet")]
    if DESCRIPTION in files and any(name.startswith("part-") for name in parquet):
        return "prepared"
    if huggingface.is_huggingface([*files, *folders]):
        return "huggingface"
    if is_cifar(files):
        return "cifar"
    if idx.images_files(files):
        return "idx"
    if any(map(is_image_name, files)):
        return None
    if any(name.endswith(_TAR) for name in files):
        return "webdataset"
    if parquet and has_images(_schema(File.find(place / parquet[0]))):
        return "parquet"
    return None


def _schema(file: File) -> object:
    return open_footer(file).schema.to_arrow_schema()


def _holds_dicom(place: Folder, depth: int = 3) -> bool:
    """Whether the first image of a folder, or of its first sub-folders, is DICOM."""
    files, folders = entries(place)
    for name in files:
        if name.lower().endswith((".dcm", ".dicom")):
            return True
        if is_image_name(name):
            return False
        if "." not in name or name.replace(".", "").isdecimal():  # Often named by identifier.
            file = File.find(place / name)
            return file.size > 132 and file.read(128, 4) == DICOM_MAGIC
    return depth > 0 and any(_holds_dicom(place / name, depth - 1) for name in folders[:3])


def _detect_file(file: File) -> Kind:
    if not file.size:
        raise SourceError(f"--source {file} is empty: copy it again")
    head = file.read(0, min(file.size, 512))
    kind = _by_content(file, head)
    if kind:
        return kind
    name = file.name.lower()
    for suffix, kind in _BY_SUFFIX.items():
        if name.endswith(suffix):
            return kind
    if name.endswith((*SUFFIXES, ".txt")):
        return "table"
    one = is_image_name(name) or head[128:132] == DICOM_MAGIC
    raise SourceError(
        f"--source {file} is a file: expected a folder with one sub-folder a class, an archive"
        f" (.zip, .tar), .parquet, .npz, .hdf5, IDX, or a .csv of paths and labels; this is"
        f" {'one image' if one else 'none of them'}"
    )


def _by_content(file: File, head: bytes) -> Kind | None:
    if head[:4] == b"PK\5\6":  # An archive of nothing.
        return "zip"
    if head[:4] == b"PK\3\4":
        length = int.from_bytes(head[26:28], "little")
        return "npz" if head[30 : 30 + length].endswith(b".npy") else "zip"
    if head[:4] == b"PAR1":
        return "parquet" if has_images(_schema(file)) else "table"
    if head[:8] == hdf5.MAGIC:
        return "hdf5"
    if idx.is_idx(head) or (file.compression and idx.begins_as_idx(file)):
        return "idx"
    if head[257:262] == b"ustar" or (file.compression and _begins_as_tar(file)):
        return _tar_kind(file)
    if head[:4] == b"\xff\xff\xff\xff":
        return "huggingface"
    return None


def _begins_as_tar(file: File) -> bool:
    try:
        with decompressed(file) as content:
            return content.read(262)[257:] == b"ustar"
    except DAMAGE:
        return False


def _tar_kind(file: File) -> Kind:
    if is_cifar([member.name.rpartition("/")[2] for member in islice(tar_members(file), 20)]):
        return "cifar"
    return "webdataset" if is_webdataset(file) else "tar"


def table_among(place: Folder) -> tuple[File, bool] | None:
    """The one table in a folder, and whether nothing else there could say what the classes are."""
    files, folders = entries(place)
    tables = [name for name in files if name.lower().endswith((*SUFFIXES, ".parquet"))]
    if len(tables) != 1:
        return None
    if folders and all(map(split_named, folders)):
        alone = not entries(place / folders[0])[1]
    else:
        alone = len(folders) <= 1
    return File.find(place / tables[0]), alone
