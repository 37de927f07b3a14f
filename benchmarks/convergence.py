r"""FID by images seen, our trainer and another implementation's on the same data set.

Both train with the same widths, batches, learning rates and number of D updates, on the same real
images in the same order; FID is taken by one evaluator, with one extractor, on the averaged
generators. The peer's networks, training function and average are its own, imported at run time
from a checkout (see `peers.py`); it draws labels for its fakes evenly, as its code does.

BigGAN-PyTorch knows RGB images of 32 to 256 pixels, so first

    python jobs/prepare.py --source digits --name digits32 --resolution 32 --mode rgb \
      --allow channels
    git clone https://github.com/ajbrock/BigGAN-PyTorch
    python benchmarks/convergence.py --peer biggan-pytorch=BigGAN-PyTorch --dataset digits32

Cost: with the defaults, 3 seeds of 20 kimg for each, about half an hour on 2 CPU cores. Writes
`convergence.png` and `convergence.json`. No Ray is started.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from machine import BenchmarkError, choose_device
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peers import check_peers, make, parse_peers
from torch import Tensor, nn
from train_step import parse_overrides
from trainers import OURS, Trainer, Work

from biggan import presets
from biggan.config import RunConfig
from biggan.data.batches import Batches
from biggan.data.dataset import Dataset, DatasetInfo
from biggan.errors import UserError
from biggan.latents import sample_z
from biggan.metrics.extractors import load_extractor
from biggan.metrics.fid import Evaluator
from biggan.networks import Generator
from biggan.parallel import Workers
from biggan.storage import locate
from biggan.training import Fakes, StepInputs


@dataclass(frozen=True)
class Curve:
    """FID of one run as it went."""

    trainer: str
    seed: int
    kimg: list[float]
    fid: list[float]
    seconds: float
    """Of training alone."""
    diverged_at_kimg: float | None = None


class AsGenerator(nn.Module):
    """A peer's averaged generator with what the evaluator asks of ours."""

    tables = None

    def __init__(self, name: str, G: nn.Module, z_dim: int) -> None:
        super().__init__()
        self.name, self.G, self.z_dim = name, G, z_dim

    def latents(self, seeds: Sequence[int], truncation: float | None) -> Tensor:
        """The latents that ours would be asked with."""
        return sample_z(seeds, self.z_dim, truncation)

    def forward(self, z: Tensor, labels: Tensor, _truncation: float | None = None) -> Tensor:
        """Images in [-1, 1], by the moments that batch norm kept in training."""
        self.G.eval()
        if self.name == "biggan-pytorch":  # Its G takes embedded classes.
            embed = cast(nn.Module, self.G.shared)
            return cast(Tensor, self.G(z, embed(labels)))
        return cast(Tensor, self.G(z, labels, eval=True))


def evenly_labelled(inputs: StepInputs, n_classes: int, generator: torch.Generator) -> StepInputs:
    """The same step with fakes of classes drawn evenly, not in the data set's proportions."""

    def evenly(fakes: Fakes) -> Fakes:
        drawn = torch.randint(n_classes, fakes.labels.shape, generator=generator)
        return Fakes(fakes.z, drawn.to(fakes.labels.device))

    return StepInputs(
        d=[[(pair[0], evenly(pair[1])) for pair in part] for part in inputs.d],
        g=[evenly(fakes) for fakes in inputs.g],
    )


def train(
    trainer: Trainer,
    work: Work,
    dataset: Dataset,
    fid: Callable[[Generator], float],
    every_kimg: float,
) -> Curve:
    """Train for `config.total_kimg`, with an FID every `every_kimg` and at the end."""
    config = work.config
    batches = Batches(config, dataset, Workers(0, 1, work.device))
    generator = torch.Generator().manual_seed(config.seed)
    G = trainer.G_ema
    if trainer.name != OURS:
        G = AsGenerator(trainer.name, G, config.model.z_dim)
    evaluated = cast(Generator, G)
    kimg: list[float] = []
    fids: list[float] = []
    seconds, due = 0.0, every_kimg
    for step in range(math.ceil(config.total_kimg * 1000 / config.step_images)):
        inputs = batches.inputs(step)
        if trainer.name != OURS:
            inputs = evenly_labelled(inputs, work.n_classes, generator)
        seconds += trainer.run(inputs, 1)
        seen = (step + 1) * config.step_images / 1000
        if seen < min(due, config.total_kimg):
            continue
        due += every_kimg
        if not all(bool(p.isfinite().all()) for p in trainer.G_ema.parameters()):
            return Curve(trainer.name, config.seed, kimg, fids, seconds, diverged_at_kimg=seen)
        kimg.append(seen)
        fids.append(fid(evaluated))
        print(f"{trainer.name:16} seed {config.seed} {seen:8.1f} kimg  FID {fids[-1]:8.2f}"
              f"  {seen * 1000 / seconds:7.0f} images/s", flush=True)  # fmt: skip
    return Curve(trainer.name, config.seed, kimg, fids, seconds)


def by_kimg(curves: Sequence[Curve], trainer: str) -> dict[float, list[float]]:
    """FIDs of all seeds of a trainer at each number of images."""
    found: dict[float, list[float]] = {}
    for curve in curves:
        if curve.trainer == trainer:
            for kimg, fid in zip(curve.kimg, curve.fid, strict=True):
                found.setdefault(kimg, []).append(fid)
    return found


def print_table(curves: Sequence[Curve], trainers: Sequence[str], label: str) -> None:
    """Mean FID over seeds, with the range, a row each number of images."""
    print(f"\n{label}: mean over seeds (lowest to highest)")
    print(f"{'kimg':>8}" + "".join(f"{name:>32}" for name in trainers))
    tables = {name: by_kimg(curves, name) for name in trainers}
    for kimg in sorted({kimg for table in tables.values() for kimg in table}):
        cells = []
        for table in tables.values():
            fids = table.get(kimg)
            cell = "diverged"
            if fids:
                cell = f"{statistics.mean(fids):.2f} ({min(fids):.2f} to {max(fids):.2f})"
            cells.append(f"{cell:>32}")
        print(f"{kimg:8.1f}" + "".join(cells))
    for curve in curves:
        if curve.diverged_at_kimg is not None:
            print(f"{curve.trainer}, seed {curve.seed}: diverged by {curve.diverged_at_kimg} kimg")


def plot(curves: Sequence[Curve], trainers: Sequence[str], label: str, title: str) -> Figure:
    """Mean curves with the range over seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in trainers:
        table = by_kimg(curves, name)
        kimg = sorted(table)
        (line,) = axes.plot(kimg, [statistics.mean(table[k]) for k in kimg], marker="o", label=name)
        low, high = ([extreme(table[k]) for k in kimg] for extreme in (min, max))
        axes.fill_between(kimg, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="real images shown to D (thousands)", title=title, yscale="log")
    axes.set_ylabel(label.replace(" (", "\n("))
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(title="mean, and range over seeds")
    return figure


def check_dataset(info: DatasetInfo, name: str, peers: Mapping[str, Path]) -> None:
    """Raise `BenchmarkError` unless the peers can train on it; says how to prepare what fits."""
    source = info.source.get("source", "SOURCE")
    mend = (
        f"prepare it anew: python jobs/prepare.py --source {source} --name {Path(name).name}-rgb32"
        " --resolution 32 --mode rgb --allow channels"
    )
    if peers and info.channels != 3:
        raise BenchmarkError(
            f"dataset {name} has {info.channels} channel(s), and {' and '.join(peers)} only knows"
            f" RGB: {mend}"
        )
    if peers and info.resolution < 32:
        raise BenchmarkError(
            f"dataset {name} has {info.resolution} pixels, and {' and '.join(peers)} begins at 32:"
            f" {mend}"
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="FID by images seen: our trainer and another implementation's.",
        epilog="example: python benchmarks/convergence.py --peer biggan-pytorch=~/BigGAN-PyTorch"
        " --dataset digits32 --kimg 20 --seeds 3",
    )
    parser.add_argument("--peer", action="append", required=True, metavar="NAME=PATH",
                        help="a checkout: biggan-pytorch or studiogan; repeatable")  # fmt: skip
    parser.add_argument("--dataset", required=True,
                        help="a prepared data set, RGB and of 32 pixels or more")  # fmt: skip
    parser.add_argument("--storage", help="storage root, path or URI; by default $BIGGAN_STORAGE,"
                        " else ./storage")  # fmt: skip
    parser.add_argument("--kimg", type=float, default=20, help="thousand real images a run")
    parser.add_argument("--every-kimg", type=float, default=4, help="between two FIDs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trainer")
    parser.add_argument("--num-samples", type=int, default=2000, help="generated images an FID")
    parser.add_argument("--preset", default="laptop", help="recipe that both follow")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of the recipe by dotted name; repeatable")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0: all cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path(),
                        help="folder for convergence.png and convergence.json")  # fmt: skip
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.kimg <= 0 or args.every_kimg <= 0 or args.num_samples < 2:
        parser.error("--seeds, --kimg, --every-kimg and --num-samples must be positive")
    return args


def configuration(args: argparse.Namespace) -> RunConfig:
    """The recipe of the flags, less what only ours has."""
    values: dict[str, Any] = {
        "dataset": args.dataset,
        "total_kimg": args.kimg,
        "loss.ortho_g": 0.0,
        **parse_overrides(args.set),
    }
    return presets.get(args.preset).override(values)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    peers = parse_peers(args.peer)
    base = configuration(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    info = DatasetInfo.read(locate("datasets", args.dataset, args.storage))
    check_dataset(info, args.dataset, peers)
    check_peers(peers, Work(base, info.resolution, len(info.classes), device))
    dataset = Dataset.open(args.dataset, args.storage)
    extractor = load_extractor(base.eval.extractor, dataset.folder, device)
    evaluator, workers = Evaluator(dataset, extractor), Workers(0, 1, device)

    def fid(G: Generator) -> float:
        return evaluator.fid(G, workers, num_samples=args.num_samples).value

    trainers = [OURS, *peers]
    curves = []
    begin = time.monotonic()
    for seed in range(args.seeds):
        work = Work(base.override({"seed": seed}), info.resolution, len(info.classes), device)
        for name in trainers:
            curves.append(train(make(name, work, peers), work, dataset, fid, args.every_kimg))
    label = (
        f"FID ({extractor.name} features, {args.num_samples} samples against"
        f" {evaluator.reference.count} images)"
    )
    print_table(curves, trainers, label)
    print(f"{time.monotonic() - begin:.0f} s in all")
    title = f"{args.dataset}, {info.resolution} px, {args.preset} recipe, {args.seeds} seeds"
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "convergence.png").open("wb") as picture:
        FigureCanvasAgg(plot(curves, trainers, label, title)).print_png(picture)
    report = {
        "dataset": args.dataset,
        "dataset_fingerprint": info.fingerprint,
        "extractor": extractor.name,
        "extractor_fingerprint": extractor.fingerprint,
        "num_samples": args.num_samples,
        "torch": torch.__version__,
        "device": str(device),
        "config": base.flatten(),
        "curves": [asdict(curve) for curve in curves],
    }
    (args.out / "convergence.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {args.out / 'convergence.png'} and {args.out / 'convergence.json'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
