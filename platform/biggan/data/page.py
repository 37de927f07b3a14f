"""A dataset's description as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

import numpy as np
from PIL import Image

from biggan.data.dataset import DatasetInfo
from biggan.data.describe import Description, Examples, chart_rows
from biggan.pixels import to_pil

THUMBNAIL = 96
"""Largest side of an example in pixels; smaller images are enlarged, pixels left square."""
REJECTS_SHOWN = 200

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5d6670; --paper: #ffffff;
  --line: #dde1e6; --train: #2f6fde; --held: #e08a1e; --warn: #fff4dc; --warn-line: #e0a83a }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa4af; --paper: #15181c;
  --line: #30363d; --train: #6ea0ff; --held: #f0a64a; --warn: #2e2715; --warn-line: #8f6c22 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; margin: 0 0 .2rem }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem }
.lead, .note { color: var(--soft); margin: 0 0 1rem }
.warning { background: var(--warn); border-left: 4px solid var(--warn-line); margin: .6rem 0;
  padding: .5rem .8rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-top: 1px solid var(--line); overflow-wrap: anywhere }
tr:first-child > * { border-top: 0 }
th { font-weight: 500; color: var(--soft); min-width: 9rem }
.number { text-align: right; white-space: nowrap; min-width: 4rem }
.chart { overflow-x: auto; margin: 0 0 1.2rem }
svg { display: block; width: 100%; min-width: 38rem; height: auto }
svg .note { fill: var(--soft) }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif }
.train { fill: var(--train) } .held { fill: var(--held) }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em }
.key.train { background: var(--train); margin-left: 0 } .key.held { background: var(--held) }
.examples { display: grid; grid-template-columns: minmax(5rem, 11rem) 1fr; gap: .5rem 1rem;
  align-items: center; margin: 0 }
.examples dt { overflow-wrap: anywhere } .examples small { color: var(--soft); display: block }
.examples dd { display: grid; grid-template-columns: repeat(8, 1fr); gap: 4px; margin: 0 }
.examples img { display: block; width: 100%; max-width: 96px; aspect-ratio: 1 }
@media (max-width: 40rem) { .examples { grid-template-columns: 1fr } }
"""


def as_page(description: Description) -> str:
    """The whole page."""
    info = description.info
    title = f"Dataset {escape(description.name)}"
    lead = f"{info.n_images:,} images in {len(info.classes):,} classes"
    if info.held_out:
        lead += f", and {sum(info.held_out):,} held out"
    sections = [
        f"<h1>{title}</h1>\n<p class='lead'>{lead}</p>",
        *(f"<p class='warning'>{escape(line)}</p>" for line in description.warnings()),
        _rows(description.facts()),
        f"<h2>Images by class</h2>\n{_chart(info)}",
        f"<h2>Examples</h2>\n{_examples(description)}",
        _rejects(description),
    ]
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    lines = (
        f"<tr><th scope='row'>{escape(key)}</th><td>{escape(value)}</td></tr>"
        for key, value in rows
    )
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _chart(info: DatasetInfo) -> str:
    rows, between = chart_rows(info)
    note = ""
    if between:
        note = (
            f"<p class='note'>Every class, by size; below it the {len(rows) // 2} largest and the"
            f" {len(rows) // 2} smallest.</p>\n{_profile(info)}\n"
        )
    if any(info.held_out):
        note += (
            "<p class='note'><span class='key train'></span>to train on"
            "<span class='key held'></span>held out</p>\n"
        )
    return note + _bars(info, rows, between)


def _bars(info: DatasetInfo, rows: list[int], between: int) -> str:
    """Horizontal bars, one a class, with its name before and its count behind.

    `between` classes are left out in the middle.
    """
    held_out = info.held_out or [0] * len(info.classes)
    most = max(info.counts[i] + held_out[i] for i in rows)
    name_width, bar_width, height = 210, 560, 24
    lines = []
    if between:
        y = len(rows) // 2 * height + 16
        lines.append(f"<text class='note' x='{name_width}' y='{y}'>{between:,} between</text>")
    for row, i in enumerate(rows):
        train, held = info.counts[i], held_out[i]
        y = (row + (between > 0 and row >= len(rows) // 2)) * height
        first, second = (max(bar_width * n / most, 0) for n in (train, held))
        value = f"{train:,}" + (f" + {held:,}" if held else "")
        lines.append(
            f"<g><title>{escape(info.classes[i])}: {value}</title>"
            f"<text x='{name_width - 8}' y='{y + 16}' text-anchor='end'>"
            f"{escape(_shortened(info.classes[i]))}</text>"
            f"<rect class='train' x='{name_width}' y='{y + 4}' width='{first:.1f}' height='16'/>"
            f"<rect class='held' x='{name_width + first:.1f}' y='{y + 4}' width='{second:.1f}'"
            " height='16'/>"
            f"<text x='{name_width + first + second + 6:.1f}' y='{y + 16}'>{value}</text></g>"
        )
    size = f"0 0 {name_width + bar_width + 120} {(len(rows) + (between > 0)) * height}"
    bars = "\n".join(lines)
    return (
        f"<div class='chart'><svg viewBox='{size}' role='img' aria-label='Images by class'>\n"
        f"{bars}\n</svg></div>"
    )


def _profile(info: DatasetInfo) -> str:
    """All classes as one outline, the largest first."""
    counts = np.sort(info.counts)[::-1].tolist()
    width, height = 890, 120
    step = width / len(counts)
    points = [f"0,{height}"]
    for i, count in enumerate(counts):
        y = height - height * count / counts[0]
        points += [f"{i * step:.1f},{y:.1f}", f"{(i + 1) * step:.1f},{y:.1f}"]
    points.append(f"{width},{height}")
    label = f"{len(counts):,} classes by size, from {counts[0]:,} images to {counts[-1]:,}"
    return (
        f"<div class='chart'><svg viewBox='0 0 {width} {height}' role='img' aria-label='{label}'>"
        f"<title>{label}</title><polygon class='train' points='{' '.join(points)}'/></svg></div>"
    )


def _shortened(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _examples(description: Description) -> str:
    info = description.info
    note = ""
    if len(description.examples) < len(info.classes):
        note = (
            f"<p class='note'>{len(description.examples)} of {len(info.classes):,} classes, from"
            " all over the list.</p>\n"
        )
    rows = "\n".join(_example_row(info, some) for some in description.examples)
    return f"{note}<dl class='examples'>\n{rows}\n</dl>"


def _example_row(info: DatasetInfo, some: Examples) -> str:
    name = escape(info.classes[some.class_id])
    images = "".join(
        f"<img src='{_data_uri(image)}' alt='{name}' title='{escape(ref)}'>"
        for image, ref in zip(some.images, some.refs, strict=True)
    )
    count = f"<small>{info.counts[some.class_id]:,} images</small>"
    return f"<dt>{name}{count}</dt><dd>{images}</dd>"


def _data_uri(image: np.ndarray) -> str:
    picture = to_pil(image)
    if picture.width > THUMBNAIL:
        picture = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    elif picture.width <= THUMBNAIL // 2:
        scale = THUMBNAIL // picture.width
        picture = picture.resize((picture.width * scale,) * 2, Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _rejects(description: Description) -> str:
    rejected, reasons = description.info.rejected, description.reasons()
    if not rejected:
        return ""
    text = "<h2>Left out</h2>\n"
    if reasons:
        text += "<table>\n"
        for reason, count in reasons:
            text += f"<tr><td class='number'>{count:,}</td><td>{escape(reason)}</td></tr>\n"
        text += "</table>\n"
    total = max(len(rejected), sum(count for _, count in reasons))
    shown = rejected[:REJECTS_SHOWN]
    note = f"the first {len(shown):,} of {total:,}" if total > len(shown) else f"all {total:,}"
    rows = _rows((entry.path, entry.reason) for entry in shown)
    return f"{text}<details><summary>{note}, by name</summary>\n{rows}\n</details>"
