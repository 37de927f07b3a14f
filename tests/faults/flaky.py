"""An S3 API on loopback that can be made to refuse, or not to answer."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from conftest import free_port


class FlakyS3:
    """moto's server, behind a gate of our own."""

    def __init__(self, log: Path) -> None:
        self.state: Literal["open", "refuses", "stalls"] = "open"
        self._behind, self.port = free_port(), free_port()
        self._server = subprocess.Popen(
            [
                Path(sys.executable).with_name("moto_server"),
                "-H",
                "127.0.0.1",
                "-p",
                str(self._behind),
            ],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()
        self._create("biggan")

    def folder(self, path: str) -> str:
        """The URI of a folder in its bucket."""
        endpoint = quote(f"http://127.0.0.1:{self.port}", safe="")
        return f"s3://biggan/{path}?endpoint_override={endpoint}&region=us-east-1"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._server.kill()
        self._server.wait()

    def _create(self, bucket: str) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self._behind}/{bucket}", method="PUT")
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request).close()
                return
            time.sleep(0.3)
        raise AssertionError("moto's server did not start")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._pass, "127.0.0.1", self.port))
        self._loop.run_forever()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", self._behind)
        await asyncio.gather(self._copy(reader, outer), self._copy(inner, writer))

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                while self.state == "stalls":
                    await asyncio.sleep(0.1)
                if self.state == "refuses":
                    break
                sink.write(data)
                await sink.drain()
        sink.close()
