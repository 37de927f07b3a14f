"""The published Inception weights: found, fetched, checked and cached.

One file stands behind every published FID. Its SHA-256 is checked wherever it comes from, because
other weights give other numbers that nobody can tell from the published ones.
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import requests

from biggan.errors import UserError
from biggan.storage import Folder, absolute, cache_folder

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
VARIABLE = "BIGGAN_INCEPTION_WEIGHTS"
MENDS = (
    "name the file with --inception-weights PATH, or use --extractor classifier, which needs none"
)
TIMEOUT = 30
"""Seconds without a byte after which a download is given up."""


class ExtractorError(UserError):
    """A feature network that cannot be had, or is not fit to judge by."""


class WeakClassifierError(ExtractorError):
    """A classifier whose features mean nothing; the images it was trained on are as they were."""

    resumable = True


@dataclass(frozen=True)
class Weights:
    """A weights file's content, and where it came from."""

    content: bytes
    sha256: str
    source: str


def inception_weights(spec: str | None = None) -> Weights:
    """The weights that `spec` names, else $BIGGAN_INCEPTION_WEIGHTS, else the published file.

    A spec is a path or URI, and is checked against the published hash. Weights of one's own say
    which they are: `PATH#sha256=HEX`, all 64 digits. What comes over HTTP is cached; the published
    file is looked for in the cache first. Raises `ExtractorError` if it is not to be had, or has
    another hash.
    """
    spec = spec or os.environ.get(VARIABLE) or URL
    source, _, expected = spec.partition("#sha256=")
    expected = expected.lower() or SHA256
    if len(expected) != 64 or set(expected) - set("0123456789abcdef"):
        raise ExtractorError(
            f"--inception-weights {spec}: write PATH#sha256=HEX with the 64 hexadecimal digits of"
            " the file's SHA-256, or PATH alone for the published file"
        )
    if not source.startswith(("http://", "https://")):
        return _check(read_file(source, MENDS), expected, source)
    cached = cache_folder() / (FILE if expected == SHA256 else f"{expected[:16]}.pth")
    if cached.is_file():
        content = cached.read_bytes()
        if hashlib.sha256(content).hexdigest() == expected:
            return Weights(content, expected, str(cached))
        print(f"{cached} is damaged, fetching it again", file=sys.stderr)
    return _download(source, expected, cached)


def read_file(source: str, mends: str) -> bytes:
    """Content of the file at a local path or a URI that storage reads.

    Raises `ExtractorError`, which ends with `mends`, if there is none.
    """
    place = Folder(absolute(source))
    try:
        return place.parent.read_bytes(place.name)
    except OSError as error:
        reason = "none is there" if isinstance(error, FileNotFoundError) else error
        raise ExtractorError(f"no file can be read at {source} ({reason}): {mends}") from None


def _check(content: bytes, expected: str, source: str) -> Weights:
    """Raise `ExtractorError` with both hashes unless they are one."""
    actual = hashlib.sha256(content).hexdigest()
    if actual == expected:
        return Weights(content, actual, source)
    what = f"the published {FILE} has" if expected == SHA256 else "you expect"
    raise ExtractorError(
        f"{source} ({len(content):,} bytes) has SHA-256 {actual}, {what} {expected}: fetch it"
        f" again from {URL}, or, if you mean these weights, write"
        f" --inception-weights '{source}#sha256={actual}'"
    )


def _download(url: str, expected: str, cached: Path) -> Weights:
    """Fetch `url` into the cache; nothing is left there unless it is whole and has the hash."""
    try:
        with _replacing(cached) as file:
            size = _fetch(url, file)
            file.seek(0)
            content = file.read()
            if size and len(content) != size:
                raise requests.ConnectionError(f"ended after {len(content):,} of {size:,} bytes")
            return _check(content, expected, url)
    except (OSError, requests.RequestException) as error:
        raise ExtractorError(
            f"the Inception weights {cached.name} are not on this machine and cannot be fetched"
            f" from {url} ({_reason(error)}): put the file at {cached}, {MENDS}"
        ) from None


def _fetch(url: str, file: BinaryIO) -> int:
    """Write what `url` serves; returns the size that was announced, 0 if none was."""
    with requests.get(url, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        size = int(response.headers.get("Content-Length", 0))
        print(f"fetching {url} ({size / 1e6:.0f} MB)", file=sys.stderr)
        done = told = 0
        for block in response.iter_content(1 << 20):
            file.write(block)
            done += len(block)
            if size and done * 4 // size > told:
                told = done * 4 // size
                print(f"  {done / 1e6:.0f} of {size / 1e6:.0f} MB", file=sys.stderr)
    return size


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes `path`'s place if the body succeeds, and is gone if it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with draft.open("x+b") as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """The innermost cause, without the addresses of objects that urllib3 prints."""
    while error.__context__ and isinstance(error.__context__, Exception):
        error = error.__context__
    return str(error) or type(error).__name__
