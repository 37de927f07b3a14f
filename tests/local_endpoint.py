"""The endpoint in this process, without Ray: the same routes over the same samplers."""

import asyncio
import threading
import time
from contextlib import contextmanager

import torch
import uvicorn
from conftest import free_port

from biggan.config import ModelConfig
from biggan.networks import Generator
from biggan.storage import storage_root
from serving.api import create_api
from serving.catalogue import Catalogue
from serving.ledger import Ledger, Reporter
from serving.sampler import Sampler
from serving.searcher import Searcher
from serving.service import Service

CLASSES = [f"digit {i}" for i in range(10)]


def random_generator(seed, channels=1):
    torch.manual_seed(seed)
    config = ModelConfig(ch_g=8, z_dim=24, attention=())
    G = Generator(config, resolution=16, channels=channels, n_classes=10).eval()
    G.class_names = list(CLASSES)
    return G.requires_grad_(False)


def new_service(models):
    """A service of models in the store."""
    root = storage_root()
    counts = Ledger(root)
    painter = Sampler(root, Reporter(counts.record))
    catalogue = Catalogue(models, {}, root, painter.directions)
    return Service(catalogue, painter, Searcher(root), counts)


@contextmanager
def served(service, keys=None, host="127.0.0.1"):
    """Its address, while it is served over HTTP."""
    port = free_port()
    app = create_api(service, Reporter(service.counts.record), keys)
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
