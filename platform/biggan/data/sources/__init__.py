"""Where images come from: what a dataset is prepared from."""

from __future__ import annotations

from pathlib import Path

from biggan.data.sources.digits import DigitsSource
from biggan.data.sources.folders import ClassFolders
from biggan.data.sources.source import Check, Finding, Sample, Source, SourceError
from biggan.storage import Folder

__all__ = ["Check", "Finding", "Sample", "Source", "SourceError", "open_source"]


def open_source(spec: str) -> Source:
    """The source that `spec` names.

    That is `digits`, or a folder (path or URI) with one sub-folder of images a class. Raises
    `SourceError` if there is nothing usable.
    """
    if spec == "digits":
        return DigitsSource()
    return ClassFolders(Folder(spec if "://" in spec else str(Path(spec).expanduser().resolve())))
