"""The endpoint over HTTP at rising concurrency, beside the bare model and two other servers.

    python benchmarks/serve.py --model digits --images 1
    python benchmarks/serve.py --model 64px --images 4 --output docs/serving.png

In one run, on the same cores, in turn: `ours` (`python -m serving`), `litserve` (LitServe with its
batching; pip install litserve pyzmq) and `fastapi` (a plain FastAPI application). All hold the same
generator and encode with the same code. `bare` is the model without a server: the requests' images
and files made one request after the other. A request is `--images` images of a class as one PNG.

Latency is measured at the client, by `--connections` clients that each send a request as soon as
they have the answer to the one before; who is turned away waits as long as told. Weights are
random: they do not change the time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import matplotlib.pyplot as plt
import numpy as np
import torch
from machine import describe

from biggan import presets
from biggan.models import ModelCard, ModelStore, load_generator
from biggan.networks import Generator
from biggan.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `serving` is not installed.

from serving.catalogue import Model  # noqa: E402
from serving.encoding import Made, grid  # noqa: E402

PEERS = ("ours", "litserve", "fastapi")


@dataclass(frozen=True)
class Load:
    """What clients saw of a server."""

    peer: str
    connections: int
    requests_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    failures: int


def make_model(kind: str, root: str) -> None:
    """A model `bench` of random weights: `digits` as of the preset, or `64px` in colour."""
    torch.manual_seed(0)
    if kind == "digits":
        config, resolution, channels = presets.digits().model, 16, 1
    else:
        narrow = {"model.ch_g": 16}
        config, resolution, channels = presets.standard(64).override(narrow).model, 64, 3
    G = Generator(config, resolution=resolution, channels=channels, n_classes=10).eval()
    store = ModelStore("bench", root)
    now = "2026-01-01T00:00:00+00:00"
    card = ModelCard(name="bench", version="v1", created=now, code={}, licence="")
    store.add(G, card, G.sample([0]), 1)
    store.set_alias("best", "v1")


class Bare:
    """The model alone: a request's images, and the file of them."""

    def __init__(self, root: str, as_loaded: bool) -> None:
        """`as_loaded`: as `load_generator` gives it, or else made ready as a sampler makes it."""
        self.G = load_generator("bench", root=root)
        if not as_loaded:
            self.G.freeze()
            self.G.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        store = ModelStore("bench", root)
        self.model = Model.read(store.folder / "v1")

    def files(self, requests: list[dict[str, int]]) -> list[bytes]:
        """The PNG files of requests (class, seed, n), made as one batch."""
        ids = [r["class"] for r in requests for _ in range(r["n"])]
        seeds = [r["seed"] + i for r in requests for i in range(r["n"])]
        images = self.G.sample(ids, seeds)
        files, start = [], 0
        for r in requests:
            recipes = [Recipe(classes={r["class"]: 1.0}, seed=r["seed"] + i) for i in range(r["n"])]
            made = Made(self.model, recipes, images[start : start + r["n"]])
            files.append(grid(made, "png", int(np.ceil(np.sqrt(r["n"])))))
            start += r["n"]
        return files


def serve_fastapi(root: str, port: int, as_loaded: bool) -> None:
    """A plain application, as it is first written: a route that calls the model."""
    import uvicorn
    from fastapi import Body, FastAPI
    from starlette.responses import Response

    bare, app = Bare(root, as_loaded), FastAPI()

    @app.post("/v1/generate")
    def generate(body: dict[str, Any] = Body()) -> Response:  # noqa: B008
        return Response(bare.files([body])[0], media_type="image/png")

    uvicorn.run(app, port=port, log_level="error")


@contextlib.contextmanager
def server(peer: str, root: str, as_loaded: bool, options: list[str]) -> Iterator[str]:
    """A server in processes of its own, once it answers; gives the URL of its route."""
    port = 20_000 + secrets.randbelow(12_000)  # The system gives none of these to a connection.
    if peer == "ours":
        command = ["-m", "serving", "--models", "bench", "--no-auth", "--port", str(port), *options]
    elif peer == "litserve":
        command = [str(ROOT / "benchmarks/serve_litserve.py"), str(port)]
    else:
        command = [__file__, "--serve", peer, "--port", str(port)]
    if as_loaded and peer != "ours":
        command.append("--as-loaded")
    environment = os.environ | {
        "BIGGAN_STORAGE": root,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")]),
    }
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}/v1/generate"
    try:
        _wait_for(url, process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    import requests

    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"{url}: the server ended")
        with contextlib.suppress(requests.RequestException):
            if requests.post(url, json={"class": 0, "seed": 0, "n": 1}, timeout=30).ok:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{url}: no answer")


async def drive(url: str, connections: int, images: int, seconds: float) -> tuple[list[float], int]:
    """Latencies in seconds of all requests that were answered, and the number turned away."""
    latencies: list[float] = []
    failures = 0
    end = time.perf_counter() + seconds

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        nonlocal failures
        seed = number * 1_000_000
        while time.perf_counter() < end:
            body = {"class": seed % 10, "seed": seed, "n": images}
            began = time.perf_counter()
            async with session.post(url, json=body) as response:
                await response.read()
                turned_away = response.headers.get("Retry-After")
            if turned_away:
                failures += 1
                await asyncio.sleep(float(turned_away))
            else:
                response.raise_for_status()
                latencies.append(time.perf_counter() - began)
            seed += images

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(client(i, session) for i in range(connections)))
    return latencies, failures


def measure(peer: str, url: str, connections: int, images: int, seconds: float) -> Load:
    """Drive a server, after a second to warm up."""
    asyncio.run(drive(url, connections, images, 1.0))
    latencies, failures = asyncio.run(drive(url, connections, images, seconds))
    p50, p95, p99 = (1000 * np.percentile(latencies, [50, 95, 99])).tolist()
    return Load(peer, connections, len(latencies) / seconds, p50, p95, p99, failures)


def bare_rate(root: str, as_loaded: bool, images: int, seconds: float) -> tuple[float, float]:
    """Requests a second of the bare model, one after the other, and the median's milliseconds."""
    bare, times = Bare(root, as_loaded), []
    for seed in range(5):
        bare.files([{"class": 0, "seed": seed, "n": images}])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        bare.files([{"class": len(times) % 10, "seed": len(times), "n": images}])
        times.append(time.perf_counter() - began)
    return len(times) / seconds, 1000 * statistics.median(times)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("digits", "64px"), default="digits")
    parser.add_argument("--images", type=int, default=1, help="images a request")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--as-loaded",
        action="store_true",
        help="the bare model and the peers have the model as load_generator gives it,"
        " instead of made ready for sampling as ours makes it",
    )
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="for our endpoint")
    parser.add_argument("--output", type=Path, help="a picture of throughput and latency")
    parser.add_argument("--serve", choices=("fastapi",), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_fastapi(os.environ["BIGGAN_STORAGE"], args.port, args.as_loaded)
        return
    with tempfile.TemporaryDirectory() as root:
        make_model(args.model, root)
        print(f"torch {torch.__version__}, {describe(torch.device('cpu'))}", flush=True)
        compare(root, args)


def compare(root: str, args: argparse.Namespace) -> None:
    """Each server in turn, the only one that is up: at each number of connections, and again."""
    loads: list[Load] = []
    bare: list[tuple[float, float]] = []
    for _ in range(args.rounds):
        bare.append(bare_rate(root, args.as_loaded, args.images, args.seconds))
        for peer in args.peers:
            with server(peer, root, args.as_loaded, args.options) as url:
                for connections in args.connections:
                    load = measure(peer, url, connections, args.images, args.seconds)
                    loads.append(load)
                    print(json.dumps(asdict(load)), flush=True)
    report(bare, loads, args.images)
    if args.output:
        draw(bare, loads, args.output)


def medians(loads: list[Load]) -> dict[tuple[str, int], Load]:
    """The median over rounds of everything, by server and connections."""
    found = {}
    for peer, connections in dict.fromkeys((load.peer, load.connections) for load in loads):
        rounds = [v for v in loads if (v.peer, v.connections) == (peer, connections)]
        figures = [
            statistics.median(getattr(load, field) for load in rounds)
            for field in ("requests_per_second", "p50_ms", "p95_ms", "p99_ms", "failures")
        ]
        found[peer, connections] = Load(peer, connections, *figures[:4], int(figures[4]))
    return found


def report(bare: list[tuple[float, float]], loads: list[Load], images: int) -> None:
    """Print the table, and the ratios that are aimed at."""
    rate, milliseconds = (statistics.median(column) for column in zip(*bare, strict=True))
    print(f"\nbare: {rate:.1f} requests/s of {images} images, {milliseconds:.1f} ms each")
    print(
        "| server | connections | requests/s | of bare | p50 ms | p95 ms | p99 ms | turned away |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found = medians(loads)
    for load in found.values():
        print(
            f"| {load.peer} | {load.connections} | {load.requests_per_second:.1f}"
            f" | {load.requests_per_second / rate:.2f} | {load.p50_ms:.1f} | {load.p95_ms:.1f}"
            f" | {load.p99_ms:.1f} | {load.failures} |"
        )
    best = {
        peer: max(v.requests_per_second for v in found.values() if v.peer == peer)
        for peer in dict.fromkeys(load.peer for load in found.values())
    }
    for peer, value in best.items():
        print(f"saturated, {peer}: {value:.1f} requests/s, {value / rate:.2f} of bare")
    for peer in set(best) & {"litserve", "fastapi"}:
        print(f"ours : {peer} {best['ours'] / best[peer]:.2f}")
    if ("ours", 1) in found:
        print(f"one connection: p50 {found['ours', 1].p50_ms - milliseconds:+.1f} ms to the bare")


def draw(bare: list[tuple[float, float]], loads: list[Load], output: Path) -> None:
    """Throughput, and p50, p95 and p99, against connections."""
    found = medians(loads)
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    fields = ("requests_per_second", "p50_ms", "p95_ms", "p99_ms")
    names = ("requests/s", "p50, ms", "p95, ms", "p99, ms")
    for axis, field, name in zip(axes, fields, names, strict=True):
        for peer in dict.fromkeys(load.peer for load in found.values()):
            points = [(v.connections, getattr(v, field)) for v in found.values() if v.peer == peer]
            axis.plot(*zip(*points, strict=True), marker="o", label=peer)
        axis.set(xscale="log", xlabel="connections", title=name, ylim=(0, None))
        ticks = sorted({load.connections for load in found.values()})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.grid(alpha=0.3)
    axes[0].axhline(statistics.median(rate for rate, _ in bare), color="grey", ls=":", label="bare")
    axes[0].legend()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
