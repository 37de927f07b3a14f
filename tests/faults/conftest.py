"""Nodes on this machine, a dataset, and a run that nothing disturbed."""

import os

import pytest
from faults.disturbed import train
from faults.machines import Machines

from biggan.storage import locate


@pytest.fixture(scope="session")
def machines(tmp_path_factory):
    """A head and two nodes with room for one worker each."""
    os.environ["BIGGAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    machines = Machines(tmp_path_factory.mktemp("m"))
    try:
        machines.start_head()
        machines.start_node("a")
        machines.start_node("b")
        yield machines
    finally:
        machines.close()


@pytest.fixture(scope="session")
def prepared(machines, storage):
    """The digits, prepared on the machines."""
    source = ["--source", "digits", "--resolution", "16"]
    machines.begin("prepare", "--name", "digits", *source).wait()


@pytest.fixture(scope="session")
def undisturbed(machines, prepared):
    """A run of two workers that nothing befell."""
    train(machines, "undisturbed").wait()
    return locate("runs", "undisturbed")
