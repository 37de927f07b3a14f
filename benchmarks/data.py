"""What data cost: prepared beside a plain loop of Pillow, in memory as they grow, read in training.

    python benchmarks/data.py prepare
    python benchmarks/data.py memory
    python benchmarks/data.py read --dataset digits

`prepare` writes photos of 256x256 pixels as JPEG, and brings them to 128x128 as PNG in Parquet: by
a single-threaded loop of Pillow on one core, and by our shards on Ray Data on one and on two, in
turn. Both have the same cores to themselves, Ray with all its own processes. Starting Ray and its
workers does not count. Prints images a second and the ratio by round; the claim is at least 0.90
of the loop on one core, and 1.8 times on two. Processor time an image is printed beside it, since
it is not moved by what else runs on the machine.

`memory` prepares 10,000, 100,000 and 1,000,000 images of 8x8 pixels that are made up as they are
read, and samples what each process holds: private memory, without what it shares with others (the
object store and libraries). Its columns are this process, the largest worker that writes shards,
all of those, the one that trains the classifier and measures the reference, and Ray's own.

`read` is `reading.py`'s.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import reading
from machine import BenchmarkError
from PIL import Image, ImageOps

from biggan.data import preparation
from biggan.data.plan import Plan, Preparation
from biggan.data.selection import Tally
from biggan.data.sources import Sample, Source, open_source
from biggan.errors import UserError
from biggan.storage import Folder

SIDE, RESOLUTION, CLASSES = 256, 128, 10
DISTINCT = 1000
ROWS = 1024
"""Images of a Parquet file that the loop writes; as many as of a shard."""
LOOP, OURS = "loop", "ours"


def photo(generator: np.random.Generator) -> Image.Image:
    """Noise of several wavelengths, which compresses as photos do."""
    pixels = np.zeros((SIDE, SIDE, 3), np.float32)
    for side, amplitude in ((4, 60), (16, 30), (64, 12), (256, 6)):
        few = generator.normal(size=(3, side, side)).astype(np.float32)
        for channel in range(3):
            wide = Image.fromarray(few[channel]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            pixels[:, :, channel] += amplitude * np.asarray(wide)
    return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))


def write_photos(root: Path, n: int) -> None:
    """So many JPEG files in class folders, of which `DISTINCT` are not links to others."""
    generator = np.random.default_rng(0)
    for i in range(CLASSES):
        (root / f"class{i}").mkdir(parents=True)
    paths = [root / f"class{i % CLASSES}" / f"{i:06d}.jpg" for i in range(n)]
    for path in paths[:DISTINCT]:
        photo(generator).save(path, quality=90)
    for i, path in enumerate(paths[DISTINCT:]):
        path.hardlink_to(paths[i % DISTINCT])


def plain_loop(source: Path, out: Path) -> None:
    """What one would write by hand: open, convert, resize, encode, collect, write."""
    rows: dict[str, list[Any]] = {"image": [], "label": [], "source": []}
    files = sorted(source.rglob("*.jpg"))
    for i, path in enumerate(files, start=1):
        with Image.open(path) as image:
            small = ImageOps.fit(
                image.convert("RGB"), (RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS
            )
        file = io.BytesIO()
        small.save(file, "PNG")
        rows["image"].append(file.getvalue())
        rows["label"].append(int(path.parent.name.removeprefix("class")))
        rows["source"].append(str(path))
        if i % ROWS == 0 or i == len(files):
            pq.write_table(pa.table(rows), out / f"{i:06d}.parquet", compression="NONE")
            rows = {key: [] for key in rows}


def our_shards(source: Path, out: Path, cores: int) -> tuple[float, float]:
    """Wall seconds and processor seconds of preparing the same, without the reference."""
    ray.init(num_cpus=cores, include_dashboard=False, logging_level="ERROR")
    choices = Preparation(str(source), RESOLUTION, channels=3)
    opened = open_source(str(source))
    plan = Plan(len(opened), opened.run_length, RESOLUTION**2 * 3)

    lines: list[str] = []

    def write(name: str, dealt: Plan) -> None:
        work = preparation.Work(choices, opened, dealt, Folder(str(out / name)))
        preparation._write_shards(work, Tally(len(opened)), lines.append)

    for name in ("first", "second"):  # Starts workers, on every core.
        write(name, Plan(2 * cores, 1, 1 << 26))
    begin, before = time.monotonic(), processor_seconds()
    write("measured", plan)
    return time.monotonic() - begin, processor_seconds() - before


def processor_seconds() -> float:
    """Of this process and all below it."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:  # It has just ended.
            continue
        total += times.user + times.system
    return total


def prepare_once(task: dict[str, Any]) -> dict[str, float]:
    """One measurement, on the cores that the task names."""
    os.sched_setaffinity(0, task["cores"])
    source, out = Path(task["source"]), Path(task["out"])
    if task["what"] == LOOP:
        begin, before = time.monotonic(), time.process_time()
        plain_loop(source, out)
        wall, busy = time.monotonic() - begin, time.process_time() - before
    else:
        wall, busy = our_shards(source, out, len(task["cores"]))
    return {"wall": wall, "processor": busy}


class Numbers(Source):
    """Pictures of 8x8 pixels that are made up as they are read."""

    def __init__(self, n: int) -> None:
        self.classes = [str(i) for i in range(CLASSES)]
        self.labels = (np.arange(n) % CLASSES).astype(np.int32)

    @property
    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of the source."""
        return {"kind": "numbers"}

    def read(self, items: np.ndarray) -> Iterator[Sample]:
        """Random pixels, brighter by class."""
        for item in items.tolist():
            yield Sample(str(item), partial(_made_up, item))


def _made_up(item: int) -> np.ndarray:
    noise = np.random.Generator(np.random.Philox(item)).integers(0, 128, (8, 8), dtype=np.uint8)
    return noise + np.uint8(12 * (item % CLASSES))


class MemoryWatch:
    """Samples the private memory of this process and those below it."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        seen: dict[int, str] = {}  # Once idle, a process still holds what it needed at work.
        while not self._done.wait(0.2):
            now: dict[str, int] = {"driver": private_bytes(me), "workers": 0, "Ray itself": 0}
            for process in me.children(recursive=True):
                try:
                    command, held = " ".join(process.cmdline()), private_bytes(process)
                except psutil.Error:
                    continue
                if "measure_reference" in command:
                    seen[process.pid] = "reference"
                elif "Map(" in command:
                    seen.setdefault(process.pid, "worker")
                if seen.get(process.pid) == "reference":
                    now["reference"] = held
                elif seen.get(process.pid) == "worker":
                    now["workers"] += held
                    now["one worker"] = max(now.get("one worker", 0), held)
                else:
                    now["Ray itself"] += held
            for name, held in now.items():
                self.peaks[name] = max(self.peaks.get(name, 0), held)


def private_bytes(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def memory_once(task: dict[str, Any]) -> dict[str, float]:
    """Prepare so many images; the peaks, and images a second."""
    ray.init(num_cpus=task["workers"], include_dashboard=False, logging_level="ERROR")
    source = Numbers(task["images"])
    preparation.open_source = lambda *_: source
    begin = time.monotonic()
    with MemoryWatch() as watch:
        preparation.prepare(Preparation("numbers", 8, channels=1), "numbers", task["out"])
    return {**watch.peaks, "seconds": time.monotonic() - begin}


def in_child(task: dict[str, Any]) -> dict[str, float]:
    """Run a task in a process of its own, with a folder that is gone after it."""
    with tempfile.TemporaryDirectory() as out:
        equal = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        process = subprocess.run(
            [sys.executable, __file__, "--task", json.dumps(task | {"out": out})],
            env=os.environ | equal,
            capture_output=True,
            text=True,
        )
    if process.returncode:
        raise BenchmarkError(f"{task} did not finish:\n{process.stdout}{process.stderr}")
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return result


def compare_preparation(args: argparse.Namespace) -> dict[str, Any]:
    """Images a second of the loop and of ours, in turn."""
    cores = sorted(os.sched_getaffinity(0))
    ways = [(LOOP, cores[:1]), (OURS, cores[:1])] + ([(OURS, cores[:2])] if cores[1:] else [])
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "photos"
        write_photos(source, args.images)
        for k in range(args.rounds):
            found = {}
            for what, on in ways if k % 2 else ways[::-1]:
                task = {"what": what, "cores": on, "source": str(source)}
                found[f"{what} on {len(on)}"] = in_child(task)
            rounds.append(found)
            print(f"round {k + 1}: " + ", ".join(
                f"{name}: {args.images / it['wall']:.0f} images/s,"
                f" {it['processor'] / args.images * 1000:.2f} ms of processor an image"
                for name, it in sorted(found.items())), flush=True)  # fmt: skip
    for name in sorted(rounds[0]):
        ratios = [it["loop on 1"]["wall"] / it[name]["wall"] for it in rounds]
        busy = [it["loop on 1"]["processor"] / it[name]["processor"] for it in rounds]
        print(f"{name}: {statistics.median(ratios):.2f} times the loop's images/s"
              f" ({min(ratios):.2f} to {max(ratios):.2f}); {statistics.median(busy):.2f} times its"
              " images by processor time")  # fmt: skip
    return {"images": args.images, "rounds": rounds}


def compare_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory as the number of images grows."""
    names = ["driver", "one worker", "workers", "reference", "Ray itself"]
    print(f"{'images':>10}" + "".join(f"{name:>14}" for name in names) + f"{'seconds':>10}")
    found = {}
    for n in args.images:
        peaks = found[n] = in_child({"images": n, "workers": args.workers})
        cells = "".join(f"{peaks.get(name, 0) / 2**20:>10.0f} MiB" for name in names)
        print(f"{n:>10,}{cells}{peaks['seconds']:>10.0f}", flush=True)
    return {"peaks": found}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What data cost: to prepare, in memory, to read in training.",
        epilog="example: python benchmarks/data.py prepare --images 8000 --rounds 5",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    verbs = parser.add_subparsers(required=True, metavar="prepare|memory|read")
    verb = verbs.add_parser("prepare", help="images a second beside a plain loop of Pillow")
    verb.add_argument("--images", type=int, default=16384, help="photos to prepare")
    verb.add_argument("--rounds", type=int, default=3)
    verb.set_defaults(measure=compare_preparation)
    verb = verbs.add_parser("memory", help="peak memory as the number of images grows")
    verb.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    verb.add_argument("--workers", type=int, default=2, help="shards at a time")
    verb.set_defaults(measure=compare_memory)
    verb = verbs.add_parser("read", help="reading beside the training step that consumes it")
    reading.add_arguments(verb)
    verb.set_defaults(measure=reading.measure)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    figures = args.measure(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--task"]:
            job = json.loads(sys.argv[2])
            print(json.dumps(prepare_once(job) if "what" in job else memory_once(job)))
            sys.stdout.flush()
            os._exit(0)  # Without Ray's shutdown, which takes its time.
        else:
            main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
