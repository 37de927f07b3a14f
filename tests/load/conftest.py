"""Endpoints of random models on the shared cluster."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, add_imported, free_port
from load.clients import Reference
from ray import serve

from biggan.config import ModelConfig
from biggan.networks import Generator


def imported(name, resolution, ch):
    """What a random model `name@best` makes of the seeds that clients ask for."""
    torch.manual_seed(0)
    config = ModelConfig(ch_g=ch, z_dim=24, attention=())
    G = Generator(config, resolution=resolution, channels=3, n_classes=4).eval()
    add_imported(name, G)
    return Reference(G)


@pytest.fixture(scope="session")
def reference(storage):
    """A small model, `loaded@best`."""
    return imported("loaded", resolution=32, ch=32)


@pytest.fixture(scope="session")
def slow(storage):
    """A model that has work for several samplers, `slow@best`."""
    return imported("slow", resolution=128, ch=24)


@pytest.fixture(scope="session")
def deploy(cluster, reference):
    """Runs `python -m serving` with the options given to it, and again; gives the URL."""
    port = free_port()

    def run(*options, model="loaded@best", auth=("--no-auth",)):
        command = [
            *(sys.executable, "-m", "serving", "--models", model, "--port", str(port)),
            *("--cpus-per-replica", "0.5", *auth, "--detach", *options),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return f"http://127.0.0.1:{port}"

    yield run
    serve.shutdown()
