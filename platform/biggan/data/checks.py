"""What is most likely a mistake in a source, found before the hour of work and not after.

Each finding has a name under which `--allow` lets it pass, as a warning. What can be known from
labels and a look at some images is checked first; what only all images show, once they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from biggan.data.dataset import Progress
from biggan.data.plan import Plan, Preparation, PreparationError
from biggan.data.selection import LEFT_TO_TRAIN, Copies, Selection, Tally
from biggan.data.shards import EMPTY, is_coloured
from biggan.data.sources import Check, Finding, Sample, Source

LOOKED_AT = 256
"""Images whose colours are looked at before the work begins."""
SHOWN = 20
"""Lines of one kind on the console."""
MAX_COLOURED = 0.01
"""Largest part of a grey dataset's images that may have been coloured."""


@dataclass(frozen=True)
class Colours:
    """How many of the images looked at show colour."""

    coloured: int
    looked_at: int

    @classmethod
    def look(cls, source: Source, plan: Plan) -> Colours:
        """Look at some images from all over the source; those that cannot be read do not count."""
        samples = source.read(plan.sample(LOOKED_AT))
        with ThreadPoolExecutor(16) as pool:
            seen = [found for found in pool.map(_colour_of, samples) if found is not None]
        return cls(sum(seen), len(seen))

    @property
    def all_grey(self) -> bool:
        """Whether images were seen and none is coloured."""
        return self.looked_at > 0 and self.coloured == 0


def _colour_of(sample: Sample) -> bool | None:
    try:
        return is_coloured(sample.image())
    except Exception:  # Decoders raise anything at all; it is reported when the image's turn comes.
        return None


class Checks:
    """Collects findings and tells them together; what may pass is a warning, told once."""

    def __init__(self, preparation: Preparation, progress: Progress) -> None:
        self._preparation = preparation
        self._progress = progress
        self._warned: set[Check] = set()

    def tell(self, findings: Sequence[Finding], failures: Sequence[str] = ()) -> None:
        """Warn of findings that may pass; raise `PreparationError` of all others and `failures`."""
        wrong = list(failures)
        blocked: list[Check] = []
        for finding in findings:
            if finding.check not in self._preparation.allow:
                wrong.append(finding.text)
                if finding.check not in blocked:
                    blocked.append(finding.check)
            elif finding.check not in self._warned:
                self._progress(f"warning: {finding.text}")
        self._warned |= {finding.check for finding in findings}
        if not wrong:
            return
        text = wrong[0]
        if len(wrong) > 1:
            numbered = "; ".join(f"({i}) {line}" for i, line in enumerate(wrong, start=1))
            text = f"{len(wrong)} things are wrong with --source {self._preparation.source}:"
            text += f" {numbered}"
        if blocked:
            text += f"; --allow {' '.join(blocked)} lets it pass"
        raise PreparationError(text)


def before(preparation: Preparation, source: Source, colours: Colours | None) -> list[Finding]:
    """What labels and some images' colours show."""
    counts = np.bincount(source.labels, minlength=len(source.classes))
    held_out = None
    if source.held_out is not None:
        held_out = np.bincount(source.labels[source.held_out], minlength=len(counts))
        counts = counts - held_out
    findings = list(source.findings)
    findings += _one_class(
        [source.classes[i] for i in np.flatnonzero(counts).tolist()], int(counts.sum())
    )
    findings += _few_images(preparation, source.classes, counts, held_out)
    if colours is not None and colours.looked_at:
        seen = f"{colours.coloured} of {colours.looked_at} images looked at are coloured"
        if preparation.channels == 1:
            findings += _lost_colour(seen, colours.coloured / colours.looked_at)
        elif preparation.channels == 3 and colours.all_grey:
            findings.append(
                Finding(
                    "channels",
                    f"none of {colours.looked_at} images looked at is coloured: RGB would hold the"
                    " same values three times; use --mode grey",
                )
            )
    return findings


def after(preparation: Preparation, chosen: Selection) -> list[Finding]:
    """What all images show, once they have been read and chosen from."""
    counts = np.array(chosen.counts(chosen.train))
    held_out = np.array(chosen.counts(chosen.held_out))
    findings = [
        *_one_class(chosen.classes, int(counts.sum())),
        *_few_images(preparation, chosen.classes, counts, held_out if held_out.any() else None),
    ]
    if preparation.channels == 1:
        there = chosen.images.kept
        coloured, n = int((chosen.images.coloured & there).sum()), int(there.sum())
        findings += _lost_colour(f"{coloured:,} of {n:,} images are coloured", coloured / max(n, 1))
    return findings


def _one_class(classes: Sequence[str], n: int) -> Iterator[Finding]:
    if len(classes) == 1:
        yield Finding(
            "one-class",
            f"all images are of one class, {classes[0]!r} ({n:,} of them), and there is nothing to"
            " choose by class: two or more are expected, so check the folders or the labels",
        )


def _few_images(
    preparation: Preparation,
    classes: Sequence[str],
    counts: np.ndarray,
    held_out: np.ndarray | None,
) -> Iterator[Finding]:
    """Classes that have images, and fewer than the reference needs.

    `counts` are the images to train on and to choose held-out ones from, or, with `held_out`, those
    that are left.
    """
    least = preparation.min_class_images
    if preparation.held_out and held_out is None:
        least = max(least, LEFT_TO_TRAIN + 1)
    few = np.flatnonzero((counts > 0) & (counts < least))
    if len(few):
        few = few[np.argsort(counts[few], kind="stable")]
        named = ", ".join(f"{classes[i]!r} has {counts[i]}" for i in few[:5])
        more = f" and {len(few) - 5:,} more" if len(few) > 5 else ""
        why = f"{least} of each class" + (", to hold one out" if preparation.held_out else "")
        yield Finding(
            "few-images",
            f"fewer images in a class than the reference needs ({why}): {named}{more}; add images,"
            " merge or remove classes, or lower --min-class-images",
        )
    if held_out is not None and (none := np.flatnonzero((counts > 0) & (held_out == 0))).size:
        named = ", ".join(repr(classes[i]) for i in none[:5])
        more = f" and {len(none) - 5:,} more" if len(none) > 5 else ""
        yield Finding(
            "few-images",
            f"no image is held out of {named}{more}: one of each class is needed, and none that"
            " has a copy is taken",
        )


def _lost_colour(seen: str, part: float) -> Iterator[Finding]:
    if part > MAX_COLOURED:
        yield Finding(
            "channels",
            f"{seen}, and a grey dataset would lose that ({MAX_COLOURED:.0%} may be): use --mode"
            " rgb",
        )


def unusable(preparation: Preparation, source: Source, tally: Tally) -> list[str]:
    """What there is to say if too many files are unusable; nothing if not."""
    files = len(source) + source.unreadable
    bad = tally.bad + source.unreadable
    if bad == files:
        first = (tally.rejected or list(source.rejected))[0]
        return [
            f"none of the {files:,} files in --source {preparation.source} is a usable image; the"
            f" first: {first.path}: {first.reason}"
        ]
    if bad <= preparation.max_rejected * files:
        return []
    text = (
        f"{bad} of {files} files ({bad / files:.1%}) are unusable, more than --max-rejected"
        f" {preparation.max_rejected:.1%}: mend or remove those listed, or raise the limit"
    )
    empty = sum(n for reason, n in tally.reasons.items() if reason.startswith(EMPTY))
    if empty:
        text += f"; {empty:,} are {EMPTY}, which --allow empty-images keeps"
    return [text]


def tell_copies(chosen: Selection, dropped: bool, progress: Progress) -> None:
    """Say how many images are copies of others, with some of them by name."""
    copies, source = chosen.copies, chosen.source
    if not len(copies):
        return
    line = f"{len(copies):,} images are exact copies of others"
    if len(copies) == 1:
        line = "1 image is an exact copy of another"
    if chosen.conflicting:
        line += f", {chosen.conflicting:,} of them under another label"
    if source.held_out is not None:
        sides = source.held_out[copies.items] != source.held_out[copies.firsts]
        line += f", {int(sides.sum()):,} on the other side of the source's split"
    line += ": all but the first were dropped" if dropped else "; --drop-duplicates drops them"
    progress(line if dropped else f"warning: {line}")
    for item, first in _examples(chosen, copies):
        (ref,), (same,) = source.refs(np.array([item])), source.refs(np.array([first]))
        progress(f"  {ref} is a copy of {same}")


def _examples(chosen: Selection, copies: Copies) -> list[tuple[int, int]]:
    """Five pairs, those that contradict each other first."""
    labels = chosen.source.labels
    conflict = labels[copies.items] != labels[copies.firsts]
    some = np.argsort(~conflict, kind="stable")[:5]
    return list(zip(copies.items[some].tolist(), copies.firsts[some].tolist(), strict=True))
