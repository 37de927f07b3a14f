"""What integration tests share: one endpoint."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, add_imported, free_port
from ray import serve

from biggan.config import ModelConfig
from biggan.models import ModelStore
from biggan.networks import Generator


@pytest.fixture(scope="session")
def pair(storage):
    """Generators of model `pair`: of `pair@best`, and of `pair@candidate`."""
    generators = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = ModelConfig(ch_g=4, z_dim=24, attention=())
        G = Generator(config, resolution=16, channels=3, n_classes=4).eval()
        add_imported("pair", G)
        generators.append(G)
    ModelStore("pair").set_alias("best", "v1")
    ModelStore("pair").set_alias("candidate", "v2")
    return generators


@pytest.fixture(scope="session")
def wide(storage):
    """The generator of model `wide`, whose images are many bytes."""
    torch.manual_seed(2)
    config = ModelConfig(ch_g=2, z_dim=24, attention=())
    G = Generator(config, resolution=128, channels=3, n_classes=4).eval()
    add_imported("wide", G)
    return G


@pytest.fixture(scope="session")
def endpoint(cluster, tiny_model, pair, wide):
    """`python -m serving` on the shared cluster, `tiny@best` by default; gives its URL.

    A sampler holds one model at a time, and half of the requests for `pair` go to its candidate.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "serving", "--models", "tiny@best", "pair", "wide"),
        *("--canary", "pair@best", "50", "pair@candidate", "50", "--max-models", "1"),
        *("--port", str(port), "--no-auth", "--detach"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    url = f"http://127.0.0.1:{port}"
    assert f"serving tiny@v1, pair@v1, wide@v1, pair@v2 at {url}" in done.stdout
    yield url
    serve.shutdown()
