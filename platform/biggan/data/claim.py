"""A claim on a dataset's name, so that two preparations of it do not write at the same time.

The claim is a file beside the dataset's folder, which its owner rewrites every few seconds. An
owner that has stopped doing so is gone, whether it ended, was killed, or lost its machine; clocks
are not compared. The same on a disk and in an object store.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from biggan.errors import UserError
from biggan.storage import Folder, StorageError

BEAT = 4.0
"""Seconds between two signs of life; a claim is void after three that were missed."""


class ClaimError(UserError):
    """A name that somebody else is busy with."""


@dataclass
class Claim:
    """This process's claim on a name."""

    beside: Folder
    file: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0

    def write(self) -> None:
        """Give a sign of life."""
        self.beats += 1
        content = {"host": socket.gethostname(), "pid": os.getpid(), "token": self.token}
        self.beside.write_json(self.file, content | {"beats": self.beats})

    def read(self) -> dict[str, Any]:
        """The claim that is there; empty if there is none, or none that can be read."""
        try:
            return dict(self.beside.read_json(self.file))
        except (OSError, ValueError, StorageError):
            return {}

    def is_mine(self) -> bool:
        """Whether nobody has taken the claim over, or removed it."""
        return bool(self.read().get("token") == self.token)

    def check(self) -> None:
        """Raise `ClaimError` unless the claim still stands."""
        if not self.is_mine():
            raise ClaimError(
                f"another command has taken over {self.beside}/{self.file} from this one, which"
                " gave no sign of life: leave it to that one, or run this again when it is done"
            )


@contextmanager
def claimed(folder: Folder) -> Iterator[Claim]:
    """Hold the claim on a dataset's folder; raises `ClaimError` if somebody alive has it."""
    claim = Claim(folder.parent, f".{folder.name}.claim")
    _wait_for_silence(claim, folder)
    claim.write()
    # Of two that found it free together, the later stays.
    time.sleep(0.1 if folder.is_local else 1.0)
    if not claim.is_mine():
        raise _taken(folder, claim.read())
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT) and claim.is_mine():
            claim.write()

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield claim
    finally:
        done.set()
        heart.join()
        if claim.is_mine():
            folder.parent.delete_file(claim.file)


def _wait_for_silence(claim: Claim, folder: Folder) -> None:
    first = claim.read()
    deadline = time.monotonic() + 3 * BEAT
    while (now := claim.read()) and not _has_ended(now):
        if now != first:
            raise _taken(folder, now)
        if time.monotonic() > deadline:
            return
        time.sleep(BEAT / 8)


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        pass
    return False


def _taken(folder: Folder, owner: dict[str, Any]) -> ClaimError:
    return ClaimError(
        f"{folder} is being prepared by another command (process {owner.get('pid')} on"
        f" {owner.get('host')}): wait until it is done, or use another --name"
    )
