"""Who may write: claims on names, and the writer of a run.

A claim keeps two commands from working at one dataset, run or sweep at the same time. It is a file
beside the folder, which its owner rewrites every few seconds. An owner that has stopped doing so is
gone, whether it ended, was killed, or lost its machine; clocks are not compared.

A claim's owner may lose sight of a worker that goes on writing, behind a network that is cut. So
the worker that writes a run signs the run's folder as it starts, and before it writes it makes sure
that none has signed since. Both are the same on a disk and in an object store.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from biggan.errors import UserError
from biggan.storage import SUBMITTED, Folder

BEAT = 4.0
"""Seconds between two signs of life; a claim is void after three that were missed."""
WRITER = "writer.json"


class ClaimError(UserError):
    """A name that somebody else is busy with."""


@dataclass
class Claim:
    """This process's claim on a name."""

    beside: Folder
    file: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def write(self) -> None:
        """Give a sign of life."""
        self.beats += 1
        content = _myself() | {"token": self.token, "started": self.started, "beats": self.beats}
        self.beside.write_json(self.file, content)

    def read(self) -> dict[str, Any]:
        """The claim that is there; empty if there is none, or none that can be read."""
        try:
            return dict(self.beside.read_json(self.file))
        except (FileNotFoundError, ValueError):
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


def claim_on(folder: Folder, token: str = "") -> Claim:
    """A claim on a folder, not made yet; with a token, that of its owner."""
    file = f".{folder.name}.claim"
    return Claim(folder.parent, file, token) if token else Claim(folder.parent, file)


@contextmanager
def claimed(folder: Folder, doing: str) -> Iterator[Claim]:
    """Hold the claim on a folder; raises `ClaimError` if somebody alive has it.

    `doing` says what for: "prepared", "trained".
    """
    claim = claim_on(folder)
    _wait_for_silence(claim, folder, doing)
    claim.write()
    # Of two that found it free together, the later stays.
    time.sleep(0.1 if folder.is_local else 1.0)
    if not claim.is_mine():
        raise _taken(folder, doing, claim.read())
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            with suppress(OSError):  # Storage may be away for a while; so it is for all others.
                if not claim.is_mine():
                    return
                claim.write()

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield claim
    finally:
        done.set()
        heart.join()
        with suppress(OSError):  # Then it falls silent.
            if claim.is_mine():
                folder.parent.delete_file(claim.file)


def _wait_for_silence(claim: Claim, folder: Folder, doing: str) -> None:
    first = claim.read()
    deadline = time.monotonic() + 3 * BEAT
    while (now := claim.read()) and not _has_ended(now):
        if now != first:
            raise _taken(folder, doing, now)
        if time.monotonic() > deadline:
            return
        time.sleep(BEAT / 8)


def _myself() -> dict[str, Any]:
    """Who this process is: its user, machine and number, and its submitted job if it is of one."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # A container without a list of users.
        user = str(os.getuid())
    me = {"user": user, "host": socket.gethostname(), "pid": os.getpid(), "pids": _pid_namespace()}
    job = json.loads(os.environ.get(SUBMITTED) or "{}").get("metadata", {})
    return me | ({"job": job["job_submission_id"]} if "job_submission_id" in job else {})


def _pid_namespace() -> str:
    """Tells apart containers of one host name, each of which counts processes by itself."""
    here = Path("/proc/self/ns/pid")
    return str(here.readlink()) if here.is_symlink() else ""


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    if (owner.get("host"), owner.get("pids")) != (socket.gethostname(), _pid_namespace()):
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        pass
    return False


def _described(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']}, " if "job" in owner else ""
    return (
        f"{job}process {owner.get('pid')} of {owner.get('user')} on {owner.get('host')}, since"
        f" {owner.get('started')}"
    )


def _taken(folder: Folder, doing: str, owner: dict[str, Any]) -> ClaimError:
    return ClaimError(
        f"{folder} is being {doing} by another command ({_described(owner)}): wait until it is"
        " done, or use another --name"
    )


class Writer:
    """The one worker that may write a run: the last to have begun."""

    def __init__(self, run: Folder) -> None:
        """Become the run's writer; whoever was it before may write no more."""
        self.run = run
        self.token = uuid.uuid4().hex
        started = datetime.now(UTC).isoformat(timespec="seconds")
        run.write_json(WRITER, _myself() | {"token": self.token, "started": started})

    def check(self) -> None:
        """Raise `ClaimError` if another has become the writer since."""
        writer = self.run.read_json(WRITER)
        if writer.get("token") != self.token:
            raise ClaimError(
                f"{self.run} is written by another worker by now ({_described(writer)}): this one,"
                " which was taken for lost, leaves it alone"
            )
