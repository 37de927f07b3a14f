"""What FID costs: its last step beside `scipy.linalg.sqrtm`, and the share of each stage.

    python benchmarks/fid.py --threads 2

First the Frechet distance from given moments, of regular and of singular covariances, ours and
scipy's in turn: seconds, their ratio, the relative difference, and how far either is from what the
features themselves give without any covariance. Then a whole FID of `--num-samples` images: a
generator of `--resolution` pixels and `--ch` channels, rounding to 8 bits, Inception (with random
weights: time does not depend on them), moments, and the distance. Stages that grow with the number
of images are timed over `--measured` of them, and multiplied.

Needs neither Ray nor data, nor Inception's weights file. Variables such as OPENBLAS_CORETYPE slow
scipy down where they are set: unset them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy.linalg
import torch
from machine import BenchmarkError, choose_device, describe, synchronize
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from biggan.config import ModelConfig
from biggan.errors import UserError
from biggan.latents import sample_z
from biggan.metrics.extractors import Extractor
from biggan.metrics.frechet import Moments, frechet_distance
from biggan.metrics.inception import FEATURES, Inception
from biggan.networks import Generator
from biggan.pixels import to_uint8

T = TypeVar("T")
Array = NDArray[np.float64]
Figures = dict[str, float]
STAGES = ("generation", "rounding to 8 bits", "Inception, resize included", "moments")


def timed(function: Callable[[], T]) -> tuple[float, T]:
    synchronize()
    begin = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - begin, result


def draw_features(n: int, dim: int, seed: int) -> Array:
    """Features that are positive, correlated, and of falling weight, as Inception's are."""
    mix = np.random.default_rng(0).normal(size=(dim, dim)) / dim**0.5
    scale = np.exp(-3 * np.arange(dim) / dim)
    x = np.random.default_rng(seed).normal(size=(n, dim)) * scale @ mix + 0.1 * seed
    return np.asarray(np.abs(x))


def without_covariances(x: Array, y: Array) -> float:
    """The same distance from the centred features: tr (C1 C2)^(1/2) is a nuclear norm."""
    a, b = (np.linalg.qr((z - z.mean(0)) / (len(z) - 1) ** 0.5, "r") for z in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    gap = np.square(x.mean(0) - y.mean(0)).sum()
    return float(gap + np.square(a).sum() + np.square(b).sum() - 2 * cross)


def with_sqrtm(m1: Array, c1: Array, m2: Array, c2: Array) -> float:
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float(np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(root).real)


def compare(n: int, dim: int, rounds: int) -> Figures:
    """Ours and scipy's in turn, on the moments of two sets of `n` images."""
    x, y = draw_features(n, dim, 1), draw_features(n, dim, 2)
    moments = (x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    tensors = [torch.from_numpy(moment) for moment in moments]
    frechet_distance(*tensors)
    ours, theirs, ratios = [], [], []
    for _ in range(rounds):
        seconds, value = timed(lambda: frechet_distance(*tensors))
        seconds_scipy, value_scipy = timed(lambda: with_sqrtm(*moments))
        ours.append(seconds)
        theirs.append(seconds_scipy)
        ratios.append(seconds_scipy / seconds)
    truth = without_covariances(x, y)
    return {
        "images": n,
        "dim": dim,
        "seconds": statistics.median(ours),
        "seconds_scipy": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "difference": abs(value - value_scipy) / abs(value_scipy),
        "error": abs(value - truth) / abs(truth),
        "error_scipy": abs(value_scipy - truth) / abs(truth),
    }


def stages(args: argparse.Namespace, device: torch.device) -> Figures:
    """Seconds of each stage of a whole FID."""
    model = ModelConfig(ch_g=args.ch)
    shape = {"resolution": args.resolution, "channels": 3, "n_classes": args.n_classes}
    G = Generator(model, **shape).to(device).eval()
    network = Inception().eval().requires_grad_(False)
    network.fold()
    extractor = Extractor("inception", "random", FEATURES, "", network.to(device))
    moments = Moments(FEATURES, device)
    seconds = dict.fromkeys(STAGES, 0.0)

    def add(stage: str, function: Callable[[], Tensor]) -> Tensor:
        took, result = timed(function)
        seconds[stage] += took
        return result

    def batch(start: int) -> None:
        seeds = range(start, start + args.batch_size)
        labels = torch.arange(start, start + args.batch_size, device=device) % args.n_classes
        z = sample_z(seeds, model.z_dim).to(device)
        images = add("generation", lambda: G(z, labels))
        pixels = add("rounding to 8 bits", lambda: to_uint8(images))
        features = add("Inception, resize included", lambda: extractor(pixels).features)
        took, _ = timed(lambda: moments.update(features))
        seconds["moments"] += took

    with torch.inference_mode():
        batch(0)  # Warms up.
        seconds.update(dict.fromkeys(STAGES, 0.0))
        batches = -(-args.measured // args.batch_size)
        for i in range(1, batches + 1):
            batch(i * args.batch_size)
    seconds = {k: v * args.num_samples / (batches * args.batch_size) for k, v in seconds.items()}
    mean, covariance = moments.mean.cpu(), moments.covariance.cpu()
    # So few images have a singular covariance; that of many is regular, and takes longer.
    regular = covariance + torch.eye(FEATURES).double() * covariance.diagonal().mean()
    took, _ = timed(lambda: frechet_distance(mean, regular, 2 * mean, 2 * regular))
    return {**seconds, "Frechet distance": took}


def print_comparison(rows: dict[str, Figures]) -> None:
    print("| covariances | ours | sqrtm | sqrtm : ours | apart, relative | ours from truth |"
          " sqrtm from truth |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name}, {row['images']} images | {row['seconds']:.2f} s"
              f" | {row['seconds_scipy']:.2f} s | {row['ratio']:.1f} (least {row['ratio_min']:.1f})"
              f" | {row['difference']:.1e} | {row['error']:.1e}"
              f" | {row['error_scipy']:.1e} |")  # fmt: skip


def print_stages(seconds: Figures, args: argparse.Namespace) -> None:
    whole = sum(seconds.values())
    print(f"\nFID of {args.num_samples:,} samples at {args.resolution} px, ch {args.ch}:"
          f" {whole:.0f} s, from {args.measured} measured in batches of {args.batch_size}",
          end="\n\n")  # fmt: skip
    print("| stage | seconds | share |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} | {value / whole:.2%} |")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What FID costs, stage by stage, and its last step beside scipy's sqrtm.",
        epilog="example: python benchmarks/fid.py --threads 2 --resolution 128 --ch 96",
    )
    parser.add_argument("--num-samples", type=int, default=50_000, help="images of the FID")
    parser.add_argument("--measured", type=int, default=256, help="images that are timed")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--resolution", type=int, default=32, help="pixels of the generator")
    parser.add_argument("--ch", type=int, default=64, help="channel multiplier of the generator")
    parser.add_argument("--n-classes", type=int, default=10)
    parser.add_argument("--dim", type=int, default=FEATURES, help="features beside sqrtm")
    parser.add_argument("--rounds", type=int, default=3, help="of ours and sqrtm in turn")
    parser.add_argument("--threads", type=int, default=0, help="on the CPU; 0: all cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="of the network; the distance itself is the CPU's")  # fmt: skip
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args(argv)
    for name in ("num_samples", "measured", "batch_size", "dim", "rounds"):
        if getattr(args, name) < 1:
            raise BenchmarkError(f"--{name.replace('_', '-')} must be 1 or more")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, scipy {scipy.__version__}, {describe(device)}")
    few, many = max(2, args.dim * 500 // FEATURES), 2 * args.dim + 2
    with threadpool_limits(args.threads or None):
        rows = {
            "regular": compare(many, args.dim, args.rounds),
            "singular": compare(few, args.dim, args.rounds),
        }
        print_comparison(rows)
        seconds = stages(args, device)
    print_stages(seconds, args)
    if args.json:
        figures = {"frechet": rows, "stages": seconds, "device": str(device)}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
