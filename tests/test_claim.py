"""A name is one process's at a time; what a dead one left is taken over."""

import os
import subprocess
import sys
import time

import pytest

from biggan import claim as claims
from biggan.claim import Claim, ClaimError, Writer, claimed
from biggan.storage import Folder


def test_the_second_is_told_who_was_first(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.2)
    pets = Folder(str(tmp_path / "pets"))
    with claimed(pets, "prepared") as claim:
        second = claimed(pets, "prepared")
        with pytest.raises(
            ClaimError, match=rf"is being prepared.*process {os.getpid()} of \w+ on .*, since 20"
        ):
            second.__enter__()
        with claimed(Folder(str(tmp_path / "others")), "prepared"):  # Another name is free.
            claim.check()
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_claims_nothing(tmp_path):
    pets = Folder(str(tmp_path / "pets"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = Claim(pets.parent, ".pets.claim")
    left.write()
    content = left.read() | {"pid": dead.pid}
    pets.parent.write_json(".pets.claim", content)
    begin = time.monotonic()
    with claimed(pets, "prepared"):
        assert time.monotonic() - begin < 8  # Of a living one the silence would take 12.


def test_a_silent_one_elsewhere_is_taken_over_and_finds_out(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.1)
    pets = Folder(str(tmp_path / "pets"))
    other = Claim(pets.parent, ".pets.claim")
    pets.parent.write_json(".pets.claim", {"host": "elsewhere", "pid": 1, "token": other.token})
    with claimed(pets, "prepared"), pytest.raises(ClaimError, match="has taken over"):
        other.check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}'])
def test_a_damaged_claim_stops_nobody(tmp_path, monkeypatch, content):
    monkeypatch.setattr(claims, "BEAT", 0.1)
    (tmp_path / ".pets.claim").write_bytes(content)
    with claimed(Folder(str(tmp_path / "pets")), "prepared"):
        pass


def test_of_two_writers_the_first_may_write_no_more(tmp_path):
    run = Folder(str(tmp_path / "run"))
    first = Writer(run)
    first.check()
    second = Writer(run)
    second.check()
    with pytest.raises(ClaimError, match=rf"another worker by now \(process {os.getpid()}.* since"):
        first.check()
