"""Some of a source's classes, in an order of one's own."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from biggan.data.sources.source import Sample, Source, SourceError


class Selection(Source):
    """Those items of a source whose class was asked for."""

    def __init__(self, source: Source, classes: Sequence[str]) -> None:
        """Raises `SourceError` if the source has no class of that name."""
        ids = {name: i for i, name in enumerate(source.classes)}
        for name in classes:
            if name not in ids:
                raise SourceError(f"--classes {name}: {_nearest(name, source.classes)}")
        if len(set(classes)) < len(classes):
            raise SourceError(f"--classes {' '.join(classes)}: each class once, please")
        renumbered = np.full(len(source.classes), -1, dtype=np.int32)
        renumbered[[ids[name] for name in classes]] = np.arange(len(classes))
        labels = renumbered[source.labels]
        self.source = source
        self.items = np.flatnonzero(labels >= 0)
        self.classes = list(classes)
        self.labels = labels[self.items]
        self.run_length = source.run_length
        self.rejected, self.unreadable = source.rejected, source.unreadable
        # Gaps in the source's numbers no longer matter.
        self.findings = [finding for finding in source.findings if finding.check != "gaps"]
        self.held_out = None if source.held_out is None else source.held_out[self.items]

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        return {**self.source.description, "classes": list(self.classes)}

    def read(self, items: np.ndarray) -> Iterator[Sample]:
        """The source's own samples."""
        return self.source.read(self.items[items])

    def refs(self, items: np.ndarray) -> list[str]:
        """The source's own names for them."""
        return self.source.refs(self.items[items])


def _nearest(name: str, classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:100], classes, n=1, cutoff=0.4)
    if near:
        return f"the source has no such class; did you mean {near[0]!r}?"
    shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    return f"the source has no such class; it has {shown}"
