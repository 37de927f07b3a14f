"""What an image costs a sampler on a CPU, by the images of a batch, step by step.

    python benchmarks/forward.py --resolution 64 --ch 16 --images 1 4 7 13 26

Milliseconds an image, medians over rounds, channels-last, random weights, no Ray:

folded    one thread, spectral norms folded into the weights, and no more
frozen    one thread, `Generator.freeze`: kernels of up-convolutions made ahead, too
kept      and with freed memory kept (`biggan.memory.keep_freed_memory`)
apart     two threads, each with a batch of its own, as a sampler has them
shared    two threads that compute one batch together
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from machine import describe

from biggan import presets
from biggan.memory import keep_freed_memory
from biggan.networks import Generator

POOLS = [ThreadPoolExecutor(1, f"thread {i}") for i in range(2)]


def generator(resolution: int, ch: int, frozen: bool) -> Generator:
    """A generator of random weights, as a sampler holds it."""
    torch.manual_seed(0)
    config = presets.standard(resolution).override({"model.ch_g": ch}).model
    G = Generator(config, resolution=resolution, channels=3, n_classes=10)
    G.eval().requires_grad_(False)
    (G.freeze if frozen else G.fold_spectral_norms)()
    return G.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@torch.inference_mode()
def seconds(G: Generator, images: int, threads: int, rounds: int) -> list[float]:
    """What forwards of so many images take, in the calling thread, the first not counted."""
    torch.set_num_threads(threads)
    z, y = torch.randn(images, G.z_dim), G.embed(torch.eye(10)[torch.arange(images) % 10])
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        G.draw(z, y, None)
        times.append(time.perf_counter() - begin)
    return times[1:]


def cost(G: Generator, images: int, rounds: int, *, pools: int = 1, threads: int = 1) -> float:
    """Milliseconds an image, of `pools` threads at once that each compute with `threads`."""
    running = [pool.submit(seconds, G, images, threads, rounds) for pool in POOLS[:pools]]
    return 1000 * statistics.median(t for run in running for t in run.result()) / images / pools


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--ch", type=int, default=16)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4, 7, 13, 26])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {describe(torch.device('cpu'))}", flush=True)
    # Where one is shared later: OpenMP keeps workers for every thread that ever shared a batch, and
    # with more of them than cores they sleep at barriers.
    folded, frozen = (
        POOLS[0].submit(generator, args.resolution, args.ch, ready).result()
        for ready in (False, True)
    )
    rows: dict[int, list[float]] = {}
    for n in args.images:
        rows[n] = [cost(G, n, args.rounds) for G in (folded, frozen)]
    keep_freed_memory()  # Cannot be taken back.
    for n in args.images:
        rows[n] += [cost(frozen, n, args.rounds), cost(frozen, n, args.rounds, pools=2)]
    for n in args.images:  # Last: the worker that shares would be in the way of the others.
        rows[n].append(cost(frozen, n, args.rounds, threads=2))
    print("| images | folded | frozen | kept | apart | shared |\n|---|---|---|---|---|---|")
    for n, columns in rows.items():
        print(f"| {n} | " + " | ".join(f"{value:.2f}" for value in columns) + " |")


if __name__ == "__main__":
    main()
