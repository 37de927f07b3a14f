"""What each setting of `SpeedConfig` does to the training step, against the default.

One setting at a time, in turn with the configuration that the flags describe, in one process:

    python benchmarks/options.py --resolution 32 --ch 16 --batch-size 64 --threads 2
    python benchmarks/options.py --only compile recompute --resolution 128 --ch 96

Prints a table in Markdown: medians over paired rounds of the ratio in images a second, and of peak
memory, each setting's taken in a fresh process (as `train_step.py` does). Above 1 is faster, or
takes more memory. `keep_memory` is a setting of the process, so each of its turns, with it and
without, is a process of its own. On a CPU the peak with `compile` is the compiler's own.
`auto_accumulate` changes no step that fits in memory, and `compile=max-autotune` takes too long to
compile: neither is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from machine import BenchmarkError, choose_device, in_child, new_process, resident_bytes
from peers import make
from train_step import Result, in_turn, noted, peak_memory, prepare, work_flags, write_report
from trainers import OURS, WARM_UP, Trainer, Work

from biggan.config import SpeedConfig
from biggan.errors import UserError
from biggan.training import StepInputs

Setting = Mapping[str, Any]
"""Fields of `SpeedConfig`, and what they are set to."""
NOT_MEASURED = {"auto_accumulate"}


def settings(cuda: bool) -> Iterator[Setting]:
    """All there is to measure on a GPU or on a CPU."""
    yield {"channels_last": False}
    yield {"fused_optimizer": False}
    yield {"reuse_fakes": True}
    yield {"recompute": True}
    yield {"compile": "default"}
    for half in ("bfloat16", "float16") if cuda else ("bfloat16",):
        yield {"precision_g": half}
        yield {"precision_d": half}
        yield {"precision_g": half, "precision_d": half}
    if cuda:
        yield {"precision_g": "tf32", "precision_d": "tf32"}
        yield {"compile": "reduce-overhead"}
    else:
        yield {"keep_memory": False}


def chosen(only: Iterable[str], cuda: bool) -> list[Setting]:
    """The settings of the fields named, or all; raises `BenchmarkError` for an unknown name."""
    names = set(only)
    known = set(SpeedConfig.model_fields) - NOT_MEASURED
    if names - known:
        raise BenchmarkError(
            f"--only {' '.join(sorted(names - known))}: not a setting that is measured; those are"
            f" {', '.join(sorted(known))}"
        )
    return [setting for setting in settings(cuda) if not names or names & set(setting)]


def label(setting: Setting) -> str:
    """A setting as one writes it."""
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def with_setting(work: Work, setting: Setting) -> Work:
    """The same work so set; raises `ConfigError` if that does not go with the rest."""
    values = {f"speed.{name}": value for name, value in setting.items()}
    return replace(work, config=work.config.override(values))


def compare(
    work: Work, setting: Setting, default: Trainer, inputs: StepInputs, peak: int, **turns: int
) -> tuple[Result, Result]:
    """The default, whose peak memory is known, and one setting, timed in turn."""
    base, result = Result(peak_memory_bytes=peak), Result()
    with noted(result):
        changed = with_setting(work, setting)
        result.peak_memory_bytes = in_child(peak_memory, OURS, changed, {})
        trainer = make(OURS, changed, {})
        trainer.run(inputs, WARM_UP)
        trainers = {"default": default, "changed": trainer}
        in_turn(trainers, {"default": base, "changed": result}, inputs, **turns)
    torch.compiler.reset()
    return base, result


def compare_malloc(
    work: Work, setting: Setting, *, rounds: int, steps: int
) -> tuple[Result, Result]:
    """The same for what is set once a process: each turn is a fresh one, with malloc as it is."""
    base, result = Result(), Result()
    with noted(result):
        pair = [(work, base), (with_setting(work, setting), result)]
        for k in range(rounds):
            for one, found in pair if k % 2 else reversed(pair):
                with new_process() as child:
                    seconds, peak = child.submit(turn_of_a_process, one, steps).result()
                found.seconds.append(seconds)
                found.peak_memory_bytes = max(found.peak_memory_bytes, peak)
    return base, result


def turn_of_a_process(work: Work, steps: int) -> tuple[float, int]:
    """Seconds a step, and peak memory with what code takes."""
    set_malloc(work)
    before = resident_bytes(peak=False)
    inputs, trainer = work.inputs(), make(OURS, work, {})
    trainer.run(inputs, WARM_UP)
    seconds = trainer.run(inputs, steps) / steps
    return seconds, resident_bytes(peak=True) - before


def set_malloc(work: Work) -> None:
    """Keep freed memory or not, as `TrainingLoop` does."""
    if work.config.speed.keep_memory and work.device.type == "cpu":
        from biggan.memory import keep_freed_memory  # Needs pyarrow, and a bare GPU machine not.

        keep_freed_memory()


def row(name: str, base: Result, result: Result) -> str:
    """A row of the table."""
    if error := result.error or base.error:
        return f"| {name} | {error} | | |"
    ratio = result.against(base)
    return (
        f"| {name} | {ratio['images_per_second']:.2f} | {ratio['lowest']:.2f} to"
        f" {ratio['highest']:.2f} | {ratio['peak_memory']:.2f} |"
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description="What each setting of SpeedConfig does to the training step.",
        epilog="example: python benchmarks/options.py --resolution 32 --threads 2 --only recompute",
        parents=[work_flags()],
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME",
                        help="fields of SpeedConfig to measure; by default all")  # fmt: skip
    args = parser.parse_args(argv)
    turns = {"rounds": args.rounds, "steps": args.steps}
    cuda = choose_device(args.device).type == "cuda"
    wanted = chosen(args.only, cuda)
    work = prepare(args)
    set_malloc(work)
    inputs = work.inputs()
    peak = in_child(peak_memory, OURS, work, {})
    default = make(OURS, work, {})
    default.run(inputs, WARM_UP)
    print("\n| setting | images/s : default | by round | peak memory : default |")
    print("|---|---|---|---|")
    figures = {}
    for setting in wanted:
        if "keep_memory" in setting:
            base, result = compare_malloc(work, setting, **turns)
        else:
            base, result = compare(work, setting, default, inputs, peak, **turns)
        print(row(label(setting), base, result), flush=True)
        figures[label(setting)] = {
            "error": result.error or base.error,
            "seconds": result.seconds,
            "seconds_of_default": base.seconds,
            "peak_memory_bytes": result.peak_memory_bytes,
            "peak_memory_bytes_of_default": base.peak_memory_bytes,
        }
    if args.json:
        write_report(args.json, work, {"settings": figures})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
