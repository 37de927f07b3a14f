"""Training when storage is full, refuses or does not answer: the state is kept."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from faults.disturbed import assert_same_end, newest, resumed_at, train, wait_for_step
from faults.flaky import FlakyS3

from biggan.storage import Folder

SECONDS = 60


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk of its own needs root: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room on a disk; gives the file that takes it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


def test_a_full_disk_stops_a_run_with_its_state_kept(machines, undisturbed, small_disk, storage):
    run = Folder(str(small_disk / "run"))
    dataset = ["--dataset", str(storage / "datasets" / "digits")]
    patience = {"BIGGAN_STORAGE_PATIENCE": "5"}
    command = train(machines, run.uri, *dataset, **patience)
    wait_for_step(run, 100)
    filler = fill(small_disk)
    said = command.wait(status=2)
    assert "No space left on device" in said
    [kept] = re.findall(r"The run's state at ([\d.]+) kimg is kept in ", said)
    whole = newest(run)
    filler.unlink()
    said = train(machines, run.uri, *dataset, **patience).wait()
    assert f"resuming at {float(kept):g} of" in said
    assert float(kept) * 1000 / 32 > whole
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("state", ["refuses", "stalls"])
def test_training_waits_for_storage(machines, undisturbed, storage, tmp_path, state):
    s3 = FlakyS3(tmp_path / "moto.log")
    try:
        run = Folder(s3.folder(f"runs/{state}"))
        os.environ.update(AWS_ACCESS_KEY_ID="tests", AWS_SECRET_ACCESS_KEY="tests")
        command = train(machines, run.uri, "--dataset", str(storage / "datasets" / "digits"))
        before = wait_for_step(run, 100)
        s3.state = state
        time.sleep(SECONDS)
        s3.state = "open"
        said = command.wait()
        # Where Ray's own file is the first to be refused, workers are begun anew.
        assert all(step >= before for step in resumed_at(said))
        assert_same_end(run, undisturbed)
    finally:
        s3.close()
