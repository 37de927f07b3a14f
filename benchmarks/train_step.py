"""The whole training step, ours in turn with other BigGAN implementations, in one process.

A step is `num_D_steps` updates of D and one of G, with gradients, optimizers and the average of
G's weights. Images and latents are made once, so neither a data set nor Ray is needed. Peers are
imported from checkouts of theirs at run time; nothing of theirs is part of this repository:

    git clone https://github.com/ajbrock/BigGAN-PyTorch
    python benchmarks/train_step.py --peer biggan-pytorch=BigGAN-PyTorch --resolution 32 --threads 2

Prints images a second, their ratio to each peer over paired rounds, peak memory (of a fresh process
for each trainer), and the matrix arithmetic of a step as `torch.utils.flop_counter` counts it. Ours
folds resampling into convolutions, so it does less arithmetic than the textbook step: that its
count is smaller is meant.

Equal work: the same widths, batches, optimizers and averaging; orthogonal regularization is off
unless `--set loss.ortho_g=...` turns it on, since the peers' recipes do without. On a GPU the
peers' convolutions are TF32, as torch has it by default; ours are with `--set
speed.precision_g=tf32 --set speed.precision_d=tf32`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import (
    BenchmarkError,
    FlopCounter,
    choose_device,
    describe,
    in_child,
    matmul_rate,
    resident_bytes,
)
from peers import PEERS, check_peers, make, parse_peers
from trainers import OURS, WARM_UP, Trainer, Work

from biggan.config import RESOLUTIONS, RunConfig
from biggan.errors import UserError
from biggan.networks import G_WIDTHS, check_model
from biggan.training import StepInputs


@dataclass
class Result:
    """What was found out about one trainer."""

    error: str = ""
    precision: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    """Of G and D."""
    seconds: list[float] = field(default_factory=list)
    """A step, by round."""
    seconds_per_step: float = 0.0
    images_per_second: float = 0.0
    peak_memory_bytes: int = 0
    flops_per_step: int = 0
    uncounted_calls: dict[str, int] = field(default_factory=dict)
    share_of_matmul_rate: float = 0.0

    def against(self, other: Result) -> dict[str, float]:
        """Ratios of images a second, paired round by round, and of peak memory."""
        paired = [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]
        return {
            "images_per_second": statistics.median(paired),
            "lowest": min(paired),
            "highest": max(paired),
            "peak_memory": self.peak_memory_bytes / max(other.peak_memory_bytes, 1),
        }


@contextlib.contextmanager
def noted(result: Result) -> Iterator[None]:
    """Write down what goes wrong with one trainer, and go on with the others."""
    try:
        yield
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        result.error = kind + first_line
        torch.cuda.empty_cache()


def peak_memory(name: str, work: Work, peers: Mapping[str, Path]) -> int:
    """Bytes that trainer needs at most, beyond what the process holds without it.

    For a process of its own. On a CPU the growth of resident memory: weights, gradients,
    optimizers, activations and scratch; on CUDA what torch has allocated in a step after warm-up.
    """
    # A miniature first: what code takes, loaded as it is used, is no state of the trainer.
    ch = 4 if work.config.model.deep else 1
    tiny = {"model.ch_g": ch, "model.ch_d": ch, "model.attention": (), "optim.batch_size": 2,
            "optim.accumulation": 1, "optim.num_D_steps": 1}  # fmt: skip
    miniature = replace(work, config=work.config.override(tiny), n_classes=2)
    make(name, miniature, peers).run(miniature.inputs(), 1)
    gc.collect()
    inputs = work.inputs()
    before = resident_bytes(peak=False)
    trainer = make(name, work, peers)
    trainer.run(inputs, WARM_UP)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.run(inputs, 2)
    if work.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident_bytes(peak=True) - before


def count_flops(trainer: Trainer, work: Work, inputs: StepInputs, result: Result) -> None:
    """Note the floating-point operations of one step, and calls that cannot be counted."""
    if trainer.name == OURS and work.config.speed.compile != "off":
        # What torch.compile makes of a network cannot be counted; it does the same products.
        config = work.config.override({"speed.compile": "off"})
        trainer = make(OURS, replace(work, config=config), {})
    with FlopCounter() as counter:
        trainer.run(inputs, 1)
    result.flops_per_step, result.uncounted_calls = counter.flops, dict(counter.uncounted)


def in_turn(
    trainers: dict[str, Trainer],
    results: Mapping[str, Result],
    inputs: StepInputs,
    *,
    rounds: int,
    steps: int,
) -> None:
    """Time all trainers, so that other work on the machine hits all alike; one that fails leaves.

    Who begins changes from round to round.
    """
    for k in range(rounds):
        order = list(trainers)
        first = k % max(len(order), 1)
        for name in order[first:] + order[:first]:
            with noted(results[name]):
                results[name].seconds.append(trainers[name].run(inputs, steps) / steps)
            if results[name].error:
                del trainers[name]


def measure(
    work: Work, peers: Mapping[str, Path], *, rounds: int, steps: int
) -> tuple[dict[str, Result], dict[str, float]]:
    """Results by trainer, and the rate of matrix products by precision."""
    results = {name: Result() for name in (OURS, *peers)}
    for name, result in results.items():
        with noted(result):
            result.peak_memory_bytes = in_child(peak_memory, name, work, peers)
    inputs = work.inputs()
    trainers: dict[str, Trainer] = {}
    for name, result in results.items():
        if result.error:
            continue
        with noted(result):
            trainer = make(name, work, peers)
            trainer.run(inputs, WARM_UP)
            count_flops(trainer, work, inputs, result)
            result.precision = trainer.precision
            for net, network in (("G", trainer.G), ("D", trainer.D)):
                result.parameters[net] = sum(p.numel() for p in network.parameters())
            trainers[name] = trainer
    in_turn(trainers, results, inputs, rounds=rounds, steps=steps)
    done = [result for result in results.values() if result.seconds and not result.error]
    precisions = sorted({result.precision for result in done})
    rates = {name: in_child(matmul_rate, name, work.device) for name in precisions}
    for result in done:
        result.seconds_per_step = statistics.median(result.seconds)
        result.images_per_second = work.config.step_images / result.seconds_per_step
        flops_per_second = result.flops_per_step / result.seconds_per_step
        result.share_of_matmul_rate = flops_per_second / rates[result.precision]
    return results, rates


def ratios(results: Mapping[str, Result]) -> dict[str, dict[str, float]]:
    """Ours against each peer that was measured."""
    if results[OURS].error:
        return {}
    others = {name: other for name, other in results.items() if name != OURS and not other.error}
    return {name: results[OURS].against(other) for name, other in others.items()}


def print_report(results: Mapping[str, Result], rates: Mapping[str, float]) -> None:
    """The table, and ours against each peer."""
    print(f"{'':16}{'parameters G':>14}{'D':>14}{'images/s':>11}{'s/step':>9}{'peak memory':>14}"
          f"{'GFLOP/step':>12}{'of matmul rate':>16}")  # fmt: skip
    calls: Counter[str] = Counter()
    for name, result in results.items():
        if result.error:
            print(f"{name:16}  {result.error}")
            continue
        calls |= Counter(result.uncounted_calls)
        counts = result.parameters
        mebibytes, gflop = result.peak_memory_bytes / 2**20, result.flops_per_step / 1e9
        print(f"{name:16}{counts['G']:14,}{counts['D']:14,}{result.images_per_second:11.1f}"
              f"{result.seconds_per_step:9.3f}{mebibytes:10.0f} MiB{gflop:12.1f}"
              f"{result.share_of_matmul_rate:16.0%}")  # fmt: skip
    for precision, rate in rates.items():
        print(f"matrix products in {precision}: {rate / 1e12:.3g} TFLOP/s")
    for name, ratio in ratios(results).items():
        print(f"ours : {name} = {ratio['images_per_second']:.2f} in images a second"
              f" ({ratio['lowest']:.2f} to {ratio['highest']:.2f} by round),"
              f" {ratio['peak_memory']:.2f} in peak memory")  # fmt: skip
        if results[name].parameters != results[OURS].parameters:
            print(f"NOTE {name} has other parameter counts: not quite the same networks")
    missed = ", ".join(f"{name} (up to {n} calls a step)" for name, n in calls.items())
    print("FLOPs: convolutions and matrix products as run; not element-wise work, reductions,"
          f" optimizers{', nor ' + missed if missed else ''}.")  # fmt: skip


# ---------------------------------------------------------------------------- the command line


def positive(text: str) -> int:
    """A number of things, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def work_flags() -> argparse.ArgumentParser:
    """Flags that say what is measured; a parent of other parsers."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--resolution", type=int, default=32, choices=RESOLUTIONS)
    parser.add_argument("--ch", type=positive, default=16, help="width multiplier of G and D")
    parser.add_argument("--batch-size", type=positive, default=64, help="real images a D update")
    parser.add_argument("--d-steps", type=positive, default=1, help="updates of D a step")
    parser.add_argument("--n-classes", type=positive, default=10)
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0: all cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=positive, default=3, help="steps a trainer runs in turn")
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each trainer")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of our configuration by dotted name, repeatable; peers"
                        " follow where they have it (widths, attention, rates ...)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return parser


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Values by dotted name from ``NAME=VALUE``, values as in YAML."""
    for setting in settings:
        if "=" not in setting:
            raise BenchmarkError(f"--set {setting}: write NAME=VALUE, as in --set optim.lr_g=2e-4")
    return {name: yaml.safe_load(value) for name, _, value in (s.partition("=") for s in settings)}


def prepare(args: argparse.Namespace) -> Work:
    """The work that the flags describe, checked and announced; sets torch's threads."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    chunks = len(G_WIDTHS[args.resolution])
    values: dict[str, Any] = {
        "model.ch_g": args.ch,
        "model.ch_d": args.ch,
        "model.z_dim": 120 // chunks * chunks,
        "optim.batch_size": args.batch_size,
        "optim.num_D_steps": args.d_steps,
        "loss.ortho_g": 0.0,
    }
    config = RunConfig().override(values | parse_overrides(args.set))
    check_model(config.model, args.resolution)
    attention = "_".join(map(str, config.model.attention)) or "none"
    print(f"torch {torch.__version__}, {device}, {describe(device)}")
    print(f"{args.resolution} px, ch {args.ch}, batch {config.optim.batch_size},"
          f" {config.optim.num_D_steps} D steps, {args.n_classes} classes, attention"
          f" {attention}; {args.rounds} rounds of {args.steps} steps in turn")  # fmt: skip
    for setting in args.set:
        print(f"set {setting}")
    return Work(config, args.resolution, args.n_classes, device)


def write_report(path: Path, work: Work, figures: Mapping[str, Any]) -> None:
    """Figures as JSON, with what was measured and on what."""
    report = {
        "torch": torch.__version__,
        "device": describe(work.device),
        "resolution": work.resolution,
        "n_classes": work.n_classes,
        "config": work.config.flatten(),
        **figures,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Time the whole training step, ours in turn with other implementations.",
        epilog="example: python benchmarks/train_step.py --peer biggan-pytorch=~/BigGAN-PyTorch"
        " --resolution 64 --ch 16 --threads 2 --json step.json",
        parents=[work_flags()],
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH",
                        help=f"a checkout of {' or '.join(PEERS)}; repeatable")  # fmt: skip
    parser.add_argument("--peer-precision", choices=("float32", "mixed"), default="float32",
                        help="mixed: BigGAN-PyTorch's fp16, StudioGAN's autocast")  # fmt: skip
    args = parser.parse_args(argv)
    peers = parse_peers(args.peer)
    work = replace(prepare(args), peer_precision=args.peer_precision)
    check_peers(peers, work)
    results, rates = measure(work, peers, rounds=args.rounds, steps=args.steps)
    print_report(results, rates)
    if args.json:
        figures = {
            "peer_precision": work.peer_precision,
            "matmul_flops_per_second": rates,
            "trainers": {name: asdict(result) for name, result in results.items()},
            "ours_against": ratios(results),
        }
        write_report(args.json, work, figures)
    if results[OURS].error:
        raise BenchmarkError(f"our trainer was not measured: {results[OURS].error}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
