"""Where images come from: what a dataset is prepared from.

`open_source` finds out what lies at a path. Each kind of source has a module; those that keep
their images alike share one: files (`folders`), members of archives (`archives`), rows of tables
(`rows`), large arrays (`arrays`).
"""

from __future__ import annotations

from biggan.data.sources.opening import open_source
from biggan.data.sources.options import SourceOptions
from biggan.data.sources.source import Check, Finding, Sample, Source, SourceError

__all__ = [
    "Check",
    "Finding",
    "Sample",
    "Source",
    "SourceError",
    "SourceOptions",
    "open_source",
]
