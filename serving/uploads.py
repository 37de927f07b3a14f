"""Images that strangers upload: checked, and decoded in processes that may die (`decoding`)."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Literal

import numpy as np

from biggan.provenance import SIGNATURE, Verdict
from biggan.recipe import Origin
from serving.decoding import ANSWER, READY, REQUEST, UNDECODABLE, comparison
from serving.problems import ProblemError
from serving.schemas import MAX_UPLOAD_BYTES, FieldProblem

START_SECONDS = 60
"""For a decoding process to start; 0.2 s on an idle machine."""
BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


class Decoder:
    """Turns uploaded files into pixels, in processes that start when they are needed.

    It belongs to the event loop that it is first used in.
    """

    def __init__(
        self, processes: int = 2, max_pending: int = 16, timeout_seconds: float = 20
    ) -> None:
        """`max_pending` images are waited for at most, those being decoded among them."""
        self._max_pending, self._timeout_seconds = max_pending, timeout_seconds
        self._pending = 0
        self._turns = asyncio.Semaphore(processes)
        self._idle: list[Process] = []

    async def decode(
        self,
        data: bytes,
        *,
        mode: Literal["L", "RGB"],
        side: int | None = None,
        field: str = "image",
    ) -> np.ndarray:
        """The first frame of a PNG, JPEG, WebP or GIF file as uint8 `[H, W, C]`.

        With a `side` it is treated as preparation treats a dataset's images, and `[side, side, C]`;
        with None its pixels are left where they are, EXIF notwithstanding (`decoding.decode`).
        Raises `ProblemError` that names `field`: 413 for too long a file, 415 for another format,
        422 for one that cannot be decoded within the limits, 503 if too many wait.
        """
        if len(data) > MAX_UPLOAD_BYTES:
            raise _too_long(len(data), field)
        if not SIGNATURE.match(data):
            limit = "must be a PNG, JPEG, WebP or GIF file by its content; save it as one of them"
            raise _problem(415, len(data), field, limit)
        height, width, content = await self._in_turn(
            data, 1 if mode == "L" else 3, side or 0, field
        )
        if not height:
            raise _problem(422, len(data), field, content.decode())
        # A copy may be written to, as torch wants it.
        return np.frombuffer(content, np.uint8).reshape(height, width, -1).copy()

    async def compare(
        self, origin: Origin, data: bytes, remade: np.ndarray, field: str = "image"
    ) -> Verdict | None:
        """The verdict on a file with an origin (`biggan.provenance.compare`).

        `remade` are the origin's images made again, uint8 `[N, H, W, C]`. With N = 0 only the size
        is looked at, and None means that it fits. Raises `ProblemError` as `decode` does.
        """
        content = comparison(origin, data, remade)
        _, _, text = await self._in_turn(content, 0, 0, field)
        if text and not text.startswith(b"{"):
            raise _problem(422, len(data), field, text.decode())
        return Verdict.model_validate_json(text) if text else None

    async def _in_turn(
        self, data: bytes, channels: int, side: int, field: str
    ) -> tuple[int, int, bytes]:
        if self._pending >= self._max_pending:
            raise ProblemError(
                503, "too many images are being decoded; try again", headers={"Retry-After": "1"}
            )
        self._pending += 1
        try:
            async with self._turns:
                return await self._ask(data, channels, side)
        except TimeoutError:
            limit = f"could not be decoded in {self._timeout_seconds:g} seconds; scale it down"
            raise _problem(422, len(data), field, limit) from None
        except (EOFError, ConnectionError):
            raise _problem(422, len(data), field, UNDECODABLE) from None
        finally:
            self._pending -= 1

    async def aclose(self) -> None:
        """End the processes; not while images are waited for."""
        for process in self._idle:
            _kill(process)
            await process.wait()
        self._idle.clear()

    async def _ask(self, data: bytes, channels: int, side: int) -> tuple[int, int, bytes]:
        """The answer of an idle process, or of a new one if there is none or it is found dead."""
        request = REQUEST.pack(len(data), channels, side) + data
        if self._idle:
            with suppress(EOFError, ConnectionError):
                return await self._answer(self._idle.pop(), request)
        return await self._answer(await _start(), request)

    async def _answer(self, process: Process, request: bytes) -> tuple[int, int, bytes]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._timeout_seconds):
                process.stdin.write(request)
                await process.stdin.drain()
                header = await process.stdout.readexactly(ANSWER.size)
                length, height, width = ANSWER.unpack(header)
                content = await process.stdout.readexactly(length)
        except BaseException:  # Above all a client that left: its answer must reach nobody else.
            _kill(process)
            raise
        self._idle.append(process)
        return height, width, content


async def _start() -> Process:
    """A decoding process that is ready for requests."""
    # Nothing else of this process's environment, such as credentials, is a decoder's business. BLAS
    # would start threads, and a process that forks should have none.
    passed = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    environment = passed | {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "OPENBLAS_NUM_THREADS": "1",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-W", "ignore", "-m", "serving.decoding"),
        stdin=PIPE,
        stdout=PIPE,
        env=environment,
        start_new_session=True,  # A group of its own, to be killed together with its fork.
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            await process.stdout.readexactly(len(READY))
    except (EOFError, TimeoutError):
        _kill(process)
        raise RuntimeError("a decoding process did not start; standard error says why") from None
    except BaseException:
        _kill(process)
        raise
    return process


def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def decode_base64(text: str, field: str) -> bytes:
    """The file that a JSON field holds in base64, bare or as a `data:image/...;base64,` URL.

    Raises `ProblemError` that names `field`: 413 for too long a file, found before it is decoded,
    422 for text that is no base64.
    """
    url = DATA_URL.match(text)
    payload = text[url.end() :] if url else text
    length = len(payload) // 4 * 3
    if length > MAX_UPLOAD_BYTES + 2:  # The last two may be padding; `Decoder` looks again.
        raise _too_long(length, field)
    # Python's own decoder, even when told to be strict, lets some padding pass.
    if len(payload) % 4 or not BASE64.fullmatch(payload):
        limit = (
            "must be base64 of A-Z, a-z, 0-9, + and /, padded with =, without line breaks, or a"
            " data:image/...;base64, URL of it"
        )
        raise _problem(422, len(text), field, limit, unit="characters")
    return base64.b64decode(payload)


def _too_long(length: int, field: str) -> ProblemError:
    limit = (
        f"must have at most {MAX_UPLOAD_BYTES:,} bytes; scale it down, or save it as JPEG or WebP"
    )
    return _problem(413, length, field, limit)


def _problem(status: int, length: int, field: str, limit: str, unit: str = "bytes") -> ProblemError:
    value = f"{length:,} {unit}"
    wrong = FieldProblem(field=field, value=value, limit=limit)
    return ProblemError(status, f"{field} = {value}: {limit}", [wrong])
