"""How training scales over workers: measured on this machine, and modelled for 8 to 512 GPUs.

    python benchmarks/scaling.py measure --workers 2 --threads 1 --resolution 32 --ch 16
    python benchmarks/scaling.py model --preset imagenet128 --machine p5.48xlarge --plot scaling.png

`measure` times the whole step, equally many images a worker, side by side in one run: one process
alone, all at once without a word between them, and all together (`torch.distributed`: gloo, or NCCL
where each has a GPU). It fits the seconds of an all-reduce to its bytes, and says what the model
would have foretold from the one alone.

`model` is of the paper's batch, shared out (strong scaling). Counted exactly, by running the real
step at the real batch on tensors without data: floating-point operations, kernels, every reduction
of batch norm, and when in the backward each gradient is ready. So much is replayed on two lines of
time, computation and network: gradients travel in buckets beside the backward, batch norm waits
for its own reductions, and both for what was sent before. Assumed, and named in the heading: the
share of peak that a GPU sustains (unless `--step-seconds`, measured with `train_step.py`, says
otherwise), the links, and prices: list prices, check yours.

An all-reduce of B bytes over n takes 2 (n - 1) alpha + 2 (n - 1) / n B / bandwidth in a ring, which
moves the fewest bytes (Patarasuk & Yuan 2009). Between nodes, where latency counts, the cheapest of
it and two trees (Thakur et al. 2005): ceil(log2 n) (alpha + B / bandwidth) by recursive doubling,
for little to send; and the ring's bytes in 2 ceil(log2 n) messages by halving, then doubling.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from machine import BenchmarkError, FlopCounter, describe, synchronize
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from train_step import positive, prepare, work_flags
from trainers import WARM_UP, Work

from biggan import presets
from biggan.config import RunConfig
from biggan.errors import UserError
from biggan.parallel import CPU, Workers
from biggan.training import TrainState, TrainStep, build

MIB = 2**20
BUCKETS = (1 * MIB, 25 * MIB)
"""Bytes at which DistributedDataParallel sends a bucket of gradients: the first, and the others."""


# ------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class Link:
    """What carries messages between two neighbours."""

    alpha: float
    """Seconds before the first byte."""
    bandwidth: float
    """Bytes a second, one way."""


def ring(n_bytes: float, ranks: int, link: Link) -> float:
    """Seconds of an all-reduce in a ring (Patarasuk & Yuan 2009): the fewest bytes moved."""
    return 2 * (ranks - 1) * (link.alpha + n_bytes / ranks / link.bandwidth)


def doubling(n_bytes: float, ranks: int, link: Link) -> float:
    """Seconds by recursive doubling (Thakur et al. 2005, section 4.5): the fewest messages."""
    return math.ceil(math.log2(ranks)) * (link.alpha + n_bytes / link.bandwidth)


def halving(n_bytes: float, ranks: int, link: Link) -> float:
    """Seconds by recursive halving, then doubling (same place): the ring's bytes, fewer messages.

    NCCL's double binary trees cost about as much.
    """
    rounds = math.ceil(math.log2(ranks))
    return 2 * (rounds * link.alpha + (ranks - 1) / ranks * n_bytes / link.bandwidth)


@dataclass(frozen=True)
class Machine:
    """A node of a cluster: GPUs, what joins them, and what an hour of it costs."""

    gpus: int
    peak: Mapping[str, float]
    """FLOP a second of a GPU's matrix products by precision, dense, from its data sheet."""
    memory_bandwidth: float
    """Bytes a second of a GPU."""
    inside: Link
    network: float
    """Gb/s of the whole node."""
    dollars: float
    """An hour, on demand, list price."""


# Latencies: NVIDIA/nccl src/graph/tuning.cc, hwLat, ring of the simple protocol.
NVLINK, PCIE, NETWORK = 3.4e-6, 5.7e-6, 9.6e-6
MACHINES = {
    "p5.48xlarge": Machine(8, {"bfloat16": 989e12, "tf32": 495e12}, 3.35e12,
                           Link(NVLINK, 450e9), 3200, 55.04),  # 8 H100
    "p4d.24xlarge": Machine(8, {"bfloat16": 312e12, "tf32": 156e12}, 1.555e12,
                            Link(NVLINK, 300e9), 400, 21.96),  # 8 A100 of 40 GB
    "g6e.12xlarge": Machine(4, {"bfloat16": 362e12, "tf32": 183e12}, 0.864e12,
                            Link(PCIE, 32e9), 100, 10.49),  # 4 L40S
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Machines, and how much of what their data sheets say is reached."""

    machine: Machine
    network: float
    """Gb/s of a node."""
    link_share: float = 0.8

    def all_reduce(self, n_bytes: float, gpus: int) -> float:
        """Seconds over so many GPUs: in a node, between nodes, in a node again.

        Between nodes each GPU of a node carries its part, so that together they have the node's
        network for the whole. The ring in a node is the two halves of one.
        """
        inside = self.machine.inside
        inside = replace(inside, bandwidth=self._reached(inside.bandwidth))
        nodes = math.ceil(gpus / self.machine.gpus)
        seconds = ring(n_bytes, min(gpus, self.machine.gpus), inside)
        if nodes > 1:
            between = Link(NETWORK, self._reached(self.network * 1e9 / 8))
            seconds += min(way(n_bytes, nodes, between) for way in (ring, doubling, halving))
        return seconds

    def _reached(self, bandwidth: float) -> float:
        return bandwidth * self.link_share


# --------------------------------------------------------------------- what one worker's step does

SYNC, GRADIENT, UPDATE = "sync", "gradient", "update"


@dataclass(frozen=True)
class Event:
    """Something about the network that happens in a step."""

    kind: str
    """SYNC: a reduction that computation waits for. GRADIENT: one is ready to be sent. UPDATE: the
    optimizer waits for all that was sent."""
    flops: int
    """Done in the step by then."""
    n_bytes: int = 0


@dataclass(frozen=True)
class Trace:
    """All that one worker does in a step."""

    events: tuple[Event, ...]
    flops: int
    kernels: int
    """Operators that run something, rather than look at it differently."""
    fixed_bytes: int
    """Memory traffic of what does not shrink with the batch: optimizers and average of the weights,
    and power iterations of the spectral norms."""
    images: int
    """Real ones."""

    def total(self, kind: str) -> tuple[int, int]:
        """How many events of a kind, and their bytes."""
        sizes = [event.n_bytes for event in self.events if event.kind == kind]
        return len(sizes), sum(sizes)


class _Counter(FlopCounter):
    """Also counts kernels, and bytes of matrices that a vector is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.read_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "aten" and not func.is_view:
            self.kernels += 1
        if func._overloadpacket.__name__ == "mv":
            self.read_bytes += args[0].numel() * args[0].element_size()
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Sending(nn.Module):
    """In the place of DistributedDataParallel: notes each gradient as it is ready to be sent."""

    def __init__(self, network: nn.Module, ready: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.network = network
        self.sends = True

        def hook(parameter: Tensor) -> None:
            if self.sends:
                ready(parameter)

        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(hook)

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.network(*inputs)
        return out

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.sends = False
        yield
        self.sends = True


def trace(config: RunConfig, resolution: int, n_classes: int, workers: int) -> Trace:
    """What each of so many workers does, by running the real step without data.

    `config` has one worker's share of the batch. Its networks are never filled: any will do.
    """
    counter, events = _Counter(), []

    def note(kind: str, tensor: Tensor | None = None) -> None:
        n_bytes = tensor.numel() * tensor.element_size() if tensor is not None else 0
        events.append(Event(kind, counter.flops, n_bytes))

    class Place(Workers):
        def wrap(self, network: nn.Module) -> nn.Module:
            return _Sending(network, lambda p: note(GRADIENT, p)) if self.size > 1 else network

    class Step(TrainStep):
        def _step(self, *args: Any) -> None:
            note(UPDATE)
            super()._step(*args)

        def _average(self) -> None:
            """Left out: copies of tensors without data do not mix. Its traffic is added below."""

    def reduce(tensor: Tensor) -> None:
        note(SYNC, tensor)

    work = Work(config, resolution, n_classes, CPU)
    shape = {"resolution": resolution, "channels": 3, "n_classes": n_classes}
    with (
        warnings.catch_warnings(),
        FakeTensorMode(),
        # Torch refuses to move parameters without data, even to where they are.
        mock.patch.object(nn.Module, "to", lambda module, *_args, **_kwargs: module),
        mock.patch("biggan.layers._world_size", return_value=workers),
        mock.patch("torch.distributed.all_reduce", reduce),
    ):
        warnings.simplefilter("ignore")
        state = build(config, **shape, device=CPU)
        step, inputs = Step(config, state, Place(0, workers, CPU)), work.inputs()
        with counter:
            step(inputs)
    fixed = counter.read_bytes + _update_bytes(state, config)
    images = config.step_images
    return Trace(tuple(events), counter.flops, counter.kernels, fixed, images)


def _update_bytes(state: TrainState, config: RunConfig) -> int:
    """Traffic of Adam (4 numbers read, 3 written a weight) and of the average (2 and 1)."""
    G, D = (sum(p.numel() for p in net.parameters()) for net in (state.G, state.D))
    return 4 * (7 * (G + config.optim.num_D_steps * D) + 3 * G)


# --------------------------------------------------------------------------------- the replay


@dataclass(frozen=True)
class Way:
    """How workers talk: what can be changed about it."""

    overlap: bool = True
    """Gradients travel while the backward goes on."""
    own_group: bool = False
    """Batch norm's reductions do not queue behind gradients: a process group of their own."""
    gradient_bytes: float = 1.0
    """Part of the gradients' bytes that is sent: 0.5 for bfloat16."""
    norm_group: int = 0
    """GPUs that share the moments of batch norm; 0: all."""


AS_IT_IS = Way()


def play(
    trace: Trace,
    compute: float,
    reduce: Callable[[float], float],
    way: Way = AS_IT_IS,
    reduce_norm: Callable[[float], float] | None = None,
) -> float:
    """Seconds of a step whose computation alone takes `compute`, with all-reduces of that cost.

    Computation is spread over the step as its floating-point operations are.
    """
    now, done = 0.0, 0
    free = {SYNC: 0.0, GRADIENT: 0.0}
    waiting, cap = 0.0, iter(BUCKETS)
    limit = next(cap)

    def send(kind: str, seconds: float) -> None:
        lane = kind if way.own_group else SYNC
        free[lane] = max(now, free[lane]) + seconds

    for event in trace.events:
        now += compute * (event.flops - done) / trace.flops
        done = event.flops
        if event.kind == SYNC:
            send(SYNC, (reduce_norm or reduce)(event.n_bytes))
            now = free[SYNC]
            continue
        waiting += event.n_bytes
        if waiting and (waiting >= limit or event.kind == UPDATE):
            send(GRADIENT, reduce(waiting * way.gradient_bytes))
            waiting, limit = 0.0, next(cap, limit)
        if event.kind == UPDATE:
            cap = iter(BUCKETS)
            limit = next(cap)
        if event.kind == UPDATE or not way.overlap:
            now = max(now, *free.values())
    return now + compute * (trace.flops - done) / trace.flops


# ---------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Assumptions:
    """What the model takes for granted."""

    cluster: Cluster
    precision: str
    fraction: Sequence[tuple[float, float]]
    """Share of peak that a GPU sustains, by images in a micro-batch; between, interpolated."""
    kernel_seconds: float
    """The host's, to start one kernel."""
    storage: float
    """Gb/s at which a node reads images."""

    def compute(self, trace: Trace, micro_batch: float) -> float:
        """Seconds of a step's computation on one GPU: its own, or the host's to start it."""
        fraction = float(np.interp(micro_batch, *zip(*self.fraction, strict=True)))
        machine = self.cluster.machine
        own = trace.flops / (fraction * machine.peak[self.precision])
        return max(
            own + trace.fixed_bytes / machine.memory_bandwidth, trace.kernels * self.kernel_seconds
        )


@dataclass(frozen=True)
class Row:
    """A number of GPUs, and what comes of it."""

    gpus: int
    batch: int
    """Real images a GPU in each update of D."""
    accumulation: int
    compute: float
    exposed: float
    """Seconds that computation waits for the network, or for images."""
    step: float
    images_per_second: float
    efficiency: float
    host_bound: bool
    """Whether starting kernels takes longer than running them."""
    hours: float
    dollars: float
    dollars_spot: float


class Model:
    """A preset's training on a kind of cluster."""

    def __init__(self, config: RunConfig, resolution: int, n_classes: int, micro_batch: int):
        self.config = config
        self.resolution, self.n_classes = resolution, n_classes
        self.micro_batch = micro_batch
        self._traces: dict[tuple[int, int, int], Trace] = {}

    @property
    def steps(self) -> float:
        """Of the whole run."""
        return self.config.total_kimg * 1000 / self.config.step_images

    def trace(self, gpus: int, batch: int) -> Trace:
        """One worker's step at `batch` images; in micro-batches no larger than fit."""
        accumulation = math.ceil(batch / self.micro_batch)
        if (key := (gpus, batch, accumulation)) not in self._traces:
            share = {"optim.batch_size": batch, "optim.accumulation": accumulation}
            self._traces[key] = trace(
                self.config.override(share), self.resolution, self.n_classes, gpus
            )
        return self._traces[key]

    def alone(self, given: Assumptions) -> float:
        """Images a second of one GPU that has nobody to wait for, at its largest micro-batch."""
        work = self.trace(1, self.micro_batch)
        return work.images / given.compute(work, self.micro_batch)

    def row(
        self,
        gpus: int,
        given: Assumptions,
        spot: float,
        way: Way = AS_IT_IS,
        batch_size: int = 0,
    ) -> Row:
        """What so many GPUs make of it; hours and dollars of the run's images."""
        cluster, machine = given.cluster, given.cluster.machine
        batch = max((batch_size or self.config.optim.batch_size) // gpus, 1)
        work = self.trace(gpus, batch)
        accumulation = math.ceil(batch / self.micro_batch)
        compute = given.compute(work, batch / accumulation)
        step = play(
            work,
            compute,
            lambda n_bytes: cluster.all_reduce(n_bytes, gpus),
            way,
            lambda n_bytes: cluster.all_reduce(n_bytes, min(way.norm_group or gpus, gpus)),
        )
        here = min(gpus, machine.gpus)
        stored = 3 * self.resolution**2 * work.images * here
        step = max(step, stored / (given.storage * 1e9 / 8))
        rate = gpus * work.images / step
        hours = self.config.total_kimg * 1000 / rate / 3600
        dollars = hours * math.ceil(gpus / machine.gpus) * machine.dollars
        return Row(
            gpus,
            batch,
            accumulation,
            compute,
            step - compute,
            step,
            rate,
            rate / (gpus * self.alone(given)),
            compute <= work.kernels * given.kernel_seconds,
            hours,
            dollars,
            dollars * spot,
        )


def fraction_of(seconds: float, trace: Trace, given: Assumptions) -> float:
    """The share of peak that a GPU sustains whose step was measured."""
    own = seconds - trace.fixed_bytes / given.cluster.machine.memory_bandwidth
    if own <= 0:
        raise BenchmarkError(f"{seconds:g} s a step: less than its weights take to read and write")
    return trace.flops / own / given.cluster.machine.peak[given.precision]


# ------------------------------------------------------------------------------ the measurement


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Alpha and seconds a byte of all-reduces, by least squares of relative errors."""
    weight = 1 / np.asarray(seconds)
    columns = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], 1) * weight[:, None]
    alpha, beta = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0]
    return float(alpha), float(beta)


SIZES = [2**k for k in range(9, 25, 3)]
"""Bytes of the all-reduces that are timed."""


def _worker(
    work: Work, rank: int, size: int, threads: int, meeting: str, commands: Connection
) -> None:
    """A process that steps, or reduces, when it is told to."""
    torch.set_num_threads(threads)
    if work.device.type == "cuda":
        work = replace(work, device=torch.device("cuda", rank))
        torch.cuda.set_device(rank)
    if size > 1:
        backend = "nccl" if work.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{meeting}", rank=rank, world_size=size
        )
    shape = {"resolution": work.resolution, "channels": 3, "n_classes": work.n_classes}
    state = build(work.config, **shape, device=work.device)
    step, inputs = TrainStep(work.config, state, Workers.current(work.device)), work.inputs()

    def reduce(n_bytes: int) -> float:
        tensor = torch.zeros(max(n_bytes // 4, 1), device=work.device)
        times = []
        for _ in range(12):
            synchronize()
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            synchronize()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[2:])

    def run(steps: int) -> float:
        if size > 1:
            dist.barrier()
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            torch.stack(list(step(inputs).values())).tolist()
        return (time.perf_counter() - begin) / steps

    run(WARM_UP)
    commands.send(0.0)
    while (command := commands.recv()) is not None:
        what, n = command
        commands.send(run(n) if what == "step" else reduce(n))
    if size > 1:
        dist.destroy_process_group()


class Team:
    """Processes that are told what to do, all at the same time."""

    def __init__(self, work: Work, count: int, threads: int, grouped: bool, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            place = (rank, count) if grouped else (rank, 1)
            args = (work, *place, threads, f"{folder}/meeting", theirs)
            self.pipes.append(ours)
            self.processes.append(context.Process(target=_worker, args=args))
            self.processes[-1].start()
            theirs.close()
        self._answers(self.pipes)

    def tell(self, what: str, n: int, first: int = 0) -> float:
        """The longest that any took; only the first so many are told, or all."""
        told = self.pipes[: first or None]
        for pipe in told:
            pipe.send((what, n))
        return max(self._answers(told))

    def _answers(self, pipes: Sequence[Connection]) -> list[float]:
        try:
            return [pipe.recv() for pipe in pipes]
        except EOFError:
            raise BenchmarkError("a worker ended before its time: see above") from None

    def close(self) -> None:
        """Send them home."""
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except BrokenPipeError:
                continue
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()


def measure(work: Work, workers: int, *, threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of a step by round in the three ways, and of all-reduces by bytes."""
    seconds: dict[str, list[float]] = {"alone": [], "at once": [], "together": []}
    teams = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for grouped in (False, True):
                teams.append(Team(work, workers, threads, grouped, folder))
            single, group = teams
            reduced = {size: [] for size in SIZES}
            for k in range(rounds):
                order = list(seconds)
                for way in order[k % 3 :] + order[: k % 3]:
                    team = group if way == "together" else single
                    seconds[way].append(team.tell("step", steps, 1 if way == "alone" else 0))
                for size, times in reduced.items():
                    times.append(group.tell("reduce", size))
        finally:
            for team in teams:
                team.close()
    return {
        "seconds": seconds,
        "all_reduce": {size: statistics.median(times) for size, times in reduced.items()},
    }


def say_traffic(found: Trace) -> None:
    """What a worker's step sends."""
    norms, gradients = found.total(SYNC), found.total(GRADIENT)
    print(f"counted, a step: {norms[0]} reductions of batch norm, {norms[1]:,} bytes; gradients of"
          f" {gradients[0]} tensors, {gradients[1]:,} bytes")  # fmt: skip


def report(figures: dict[str, Any], work: Work, workers: int) -> dict[str, Any]:
    """Print what was measured beside what the model says; both.

    Gradients are not taken to travel beside the backward: a CPU worker's core does both. The
    quickest rounds are those that other work on the machine disturbed least.
    """
    seconds = figures["seconds"]
    alpha, beta = fit(list(figures["all_reduce"]), list(figures["all_reduce"].values()))
    alone, at_once, together = (statistics.median(seconds[way]) for way in seconds)
    paired = {
        name: [a / b for a, b in zip(seconds[first], seconds[second], strict=True)]
        for name, first, second in (
            ("efficiency", "alone", "together"),
            ("sharing the machine", "alone", "at once"),
            ("talking", "at once", "together"),
        )
    }
    found = trace(work.config, work.resolution, work.n_classes, workers)
    images = found.images
    rates = (images / alone, workers * images / at_once, workers * images / together)
    print("1 worker {:.1f} images/s, at once {:.1f}, together {:.1f}".format(*rates))
    for name, ratios in paired.items():
        print(f"{name}: {statistics.median(ratios):.3f}"
              f" ({min(ratios):.3f} to {max(ratios):.3f} by round)")  # fmt: skip
    print(f"all-reduce of B bytes: {alpha * 1e6:.0f} us + B / {1 / beta / 1e9:.2f} GB/s")
    say_traffic(found)
    predicted = {}
    for which, of in (("median", statistics.median), ("quickest", min)):
        real = of(seconds["together"])
        for way in ("alone", "at once"):
            without = of(seconds[way])
            model = play(found, without, lambda b: alpha + beta * b, Way(overlap=False))
            predicted[f"{which}, {way}"] = model / real
            print(f"{which} rounds: model from {way} {model:.3f} s, measured together {real:.3f}:"
                  f" {model / real:.2f}; {way} : together {without / real:.2f}")  # fmt: skip
    return figures | {
        "images_per_second": [images / alone, workers * images / together],
        "ratios": paired,
        "alpha": alpha,
        "bytes_per_second": 1 / beta,
        "predicted_to_measured": predicted,
    }


# ---------------------------------------------------------------------------- the command line

NETWORKS = (100, 400, 800, 1600, 3200)
LEAST_EFFICIENCY = 0.75
RESOLUTIONS = {"imagenet64": 64, "imagenet128": 128, "imagenet128_deep": 128, "imagenet256": 256}


def at_batch(text: str) -> tuple[int, float]:
    """``32=0.41``, for argparse."""
    batch, _, seconds = text.partition("=")
    if not (batch.isdigit() and int(batch) and float(seconds or 0) > 0):
        raise argparse.ArgumentTypeError(f"{text}: write IMAGES=SECONDS, as in 32=0.41")
    return int(batch), float(seconds)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How training scales over workers: measured here, or modelled for clusters.",
        epilog="example: python benchmarks/scaling.py measure --workers 2 --threads 1\n"
        "         python benchmarks/scaling.py model --step-seconds 32=0.41 --plot scaling.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="weak scaling on this machine, and the model"
                                    " beside it", parents=[work_flags()])  # fmt: skip
    measuring.add_argument("--workers", type=positive, default=2,
                           help="processes, of --threads threads or a GPU each; --batch-size is"
                           " each one's")  # fmt: skip
    modelling = commands.add_parser("model", help="hours and dollars at 8 to 512 GPUs")
    modelling.add_argument("--preset", default="imagenet128", choices=sorted(RESOLUTIONS))
    modelling.add_argument("--gpus", type=positive, nargs="+",
                           default=[8, 16, 32, 64, 128, 256, 512])  # fmt: skip
    modelling.add_argument("--machine", default="p5.48xlarge", choices=sorted(MACHINES),
                           help="a node: its GPUs, links and price")  # fmt: skip
    modelling.add_argument("--network", type=float, metavar="GBIT",
                           help="Gb/s between nodes; by default the machine's")  # fmt: skip
    modelling.add_argument("--precision", default="bfloat16", choices=("bfloat16", "tf32"))
    modelling.add_argument("--fraction", type=float, default=0.25,
                           help="ASSUMED share of peak that a step sustains")  # fmt: skip
    modelling.add_argument("--step-seconds", type=at_batch, action="append", default=[],
                           metavar="IMAGES=SECONDS",
                           help="measured with train_step.py on one GPU, in this preset's widths,"
                           " D steps and precision: seconds a step at a batch of so many images;"
                           " repeatable; in the place of --fraction")  # fmt: skip
    modelling.add_argument("--micro-batch", type=positive, default=128,
                           help="ASSUMED largest that fits in a GPU; larger batches"
                           " accumulate")  # fmt: skip
    modelling.add_argument("--kernel-microseconds", type=float, default=5.0,
                           help="ASSUMED time of the host to start a kernel; 0: CUDA"
                           " graphs")  # fmt: skip
    modelling.add_argument("--storage", type=float, default=25.0, metavar="GBIT",
                           help="ASSUMED Gb/s at which a node reads images")  # fmt: skip
    modelling.add_argument("--dollars", type=float,
                           help="a node's hour on demand; by default the list price: check"
                           " yours")  # fmt: skip
    modelling.add_argument("--spot", type=float, default=0.4,
                           help="ASSUMED price of spot, as a part of on demand")  # fmt: skip
    modelling.add_argument("--n-classes", type=positive, default=1000)
    modelling.add_argument("--plot", type=Path, metavar="FILE", help="draw it there too")
    modelling.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return parser.parse_args(argv)


def assume(args: argparse.Namespace, model: Model) -> Assumptions:
    """What the flags say, with the sustained share from measurements if there are any."""
    machine = MACHINES[args.machine]
    if args.dollars is not None:
        machine = replace(machine, dollars=args.dollars)
    given = Assumptions(
        Cluster(machine, args.network or machine.network),
        args.precision,
        [(1, args.fraction)],
        args.kernel_microseconds * 1e-6,
        args.storage,
    )
    measured = [
        (batch, fraction_of(seconds, model.trace(1, batch), given))
        for batch, seconds in sorted(args.step_seconds)
    ]
    return replace(given, fraction=measured) if measured else given


def heading(args: argparse.Namespace, given: Assumptions, model: Model) -> None:
    config, machine = model.config, given.cluster.machine
    one = model.trace(2, model.micro_batch)
    images = model.micro_batch
    print(f"{args.preset}, batch {config.optim.batch_size}, {config.optim.num_D_steps} D steps,"
          f" {model.steps:,.0f} steps; {args.machine}: {machine.gpus} GPUs,"
          f" {given.cluster.network:g} Gb/s between nodes, {args.precision}")  # fmt: skip
    print(f"counted, a worker's step at {images} images: {one.flops / 1e12:.2f} TFLOP,"
          f" {one.kernels:,} kernels")  # fmt: skip
    say_traffic(one)
    shares = ", ".join(f"{share:.1%} at {batch:g} images" for batch, share in given.fraction)
    if args.step_seconds:
        print(f"MEASURED: a GPU sustains {shares} of its peak")
    else:
        print(f"ASSUMED, not measured: a GPU sustains {args.fraction:.0%} of its peak,"
              f" {machine.peak[args.precision] / 1e12:g} TFLOP/s")  # fmt: skip
    print(f"ASSUMED: {model.micro_batch} images fit in a GPU; {args.kernel_microseconds:g} us to"
          f" start a kernel; {given.cluster.link_share:.0%} of a link's rate; {args.storage:g} Gb/s"
          f" a node from storage; list price ${machine.dollars:g} a node and hour, spot"
          f" {args.spot:.0%} of it: check yours")  # fmt: skip


def print_rows(rows: Sequence[Row]) -> None:
    print(f"\n{'GPUs':>5}{'images a GPU':>14}{'compute':>10}{'waiting':>10}{'step':>10}"
          f"{'images/s':>10}{'efficiency':>12}{'hours':>8}{'on demand':>12}"
          f"{'spot':>11}")  # fmt: skip
    for row in rows:
        share = f"{row.batch}" if row.accumulation == 1 else f"{row.batch} in {row.accumulation}"
        mark = "h" if row.host_bound else " "
        compute, exposed, step = (1e3 * s for s in (row.compute, row.exposed, row.step))
        dollars, spot = (f"${price:,.0f}" for price in (row.dollars, row.dollars_spot))
        print(f"{row.gpus:5}{share:>14}{compute:7.1f} ms{mark}{exposed:6.1f} ms{step:7.1f} ms"
              f"{row.images_per_second:10,.0f}{row.efficiency:12.0%}{row.hours:8.1f}"
              f"{dollars:>12}{spot:>11}")  # fmt: skip
    if any(row.host_bound for row in rows):
        print("h: the host starts kernels more slowly than the GPU runs them")
    fine = [row for row in rows if row.efficiency >= LEAST_EFFICIENCY]
    if len(fine) < len(rows):
        least = min((row.batch for row in fine), default=0)
        print(f"efficiency is under {LEAST_EFFICIENCY:.0%} below {least} images a GPU" if fine
              else f"efficiency is under {LEAST_EFFICIENCY:.0%} throughout")  # fmt: skip


def levers(model: Model, given: Assumptions, gpus: int, spot: float) -> dict[str, Row]:
    """The same number of GPUs with one thing changed."""
    cluster = given.cluster
    free = replace(given, kernel_seconds=0.0)
    here = cluster.machine.gpus

    def row(given: Assumptions = given, **settings: Any) -> Row:
        return model.row(gpus, given, spot, **settings)

    return {
        "as it is": row(),
        "no overlap of gradients and backward": row(way=Way(overlap=False)),
        "batch norm in a process group of its own": row(way=Way(own_group=True)),
        "batch norm over a node's GPUs only": row(way=Way(norm_group=here)),
        "gradients sent as bfloat16": row(way=Way(gradient_bytes=0.5)),
        "nodes of twice the GPUs and network": row(
            replace(
                given,
                cluster=replace(
                    cluster,
                    network=2 * cluster.network,
                    machine=replace(
                        cluster.machine, gpus=2 * here, dollars=2 * cluster.machine.dollars
                    ),
                ),
            )
        ),
        "kernels started for nothing (CUDA graphs)": row(free),
        "twice the batch": row(batch_size=2 * model.config.optim.batch_size),
        "four times the batch": row(batch_size=4 * model.config.optim.batch_size),
    }


def plot(path: Path, by_network: Mapping[float, Sequence[Row]], title: str) -> None:
    """Efficiency and hours over GPUs, a line a network."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for network, rows in by_network.items():
        gpus = [row.gpus for row in rows]
        left.plot(gpus, [row.efficiency for row in rows], marker="o", label=f"{network:g} Gb/s")
        right.plot(gpus, [row.hours for row in rows], marker="o")
    first = next(iter(by_network.values()))
    longest = max(rows[0].hours for rows in by_network.values())
    right.plot([row.gpus for row in first], [longest * first[0].gpus / row.gpus for row in first],
               color="0.6", ls="--", label="in proportion")  # fmt: skip
    left.axhline(LEAST_EFFICIENCY, color="0.7", lw=1)
    left.set(ylabel="images a second, of GPUs x one alone", ylim=(0, 1.05))
    right.set(ylabel="hours to the end", yscale="log")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="GPUs")
        axes.set_xticks([row.gpus for row in first], [f"{row.gpus}" for row in first], minor=False)
        axes.minorticks_off()
    left.legend(title="between nodes")
    right.legend()
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(path)


def run_model(args: argparse.Namespace) -> None:
    model = Model(
        presets.get(args.preset).override(
            {"speed.precision_g": args.precision, "speed.precision_d": args.precision}
        ),
        RESOLUTIONS[args.preset],
        args.n_classes,
        args.micro_batch,
    )
    given = assume(args, model)
    heading(args, given, model)
    rows = [model.row(gpus, given, args.spot) for gpus in args.gpus]
    print_rows(rows)
    by_network = {
        network: [
            model.row(
                gpus, replace(given, cluster=replace(given.cluster, network=network)), args.spot
            )
            for gpus in args.gpus
        ]
        for network in NETWORKS
    }
    print("\nefficiency" + "".join(f"{gpus:>7}" for gpus in args.gpus) + "  GPUs")
    for network, line in by_network.items():
        print(f"{network:5} Gb/s" + "".join(f"{row.efficiency:7.0%}" for row in line))
    most = max(args.gpus)
    changed = levers(model, given, most, args.spot)
    print(f"\n{f'at {most} GPUs, with one thing changed':42}{'waiting':>9}{'step':>12}"
          f"{'efficiency':>12}")  # fmt: skip
    for name, row in changed.items():
        print(f"{name:42}{row.exposed * 1e3:6.1f} ms{row.step * 1e3:9.1f} ms"
              f"{row.efficiency:12.0%}")  # fmt: skip
    if args.plot:
        title = f"{args.preset} on {args.machine}: a model, its compute " + (
            "measured" if args.step_seconds else f"ASSUMED {args.fraction:.0%} of peak"
        )
        plot(args.plot, by_network, title)
    if args.json:
        figures = {
            "assumptions": asdict(given),
            "rows": [asdict(row) for row in rows],
            "efficiency": {str(n): [r.efficiency for r in line] for n, line in by_network.items()},
            "levers": {name: asdict(row) for name, row in changed.items()},
        }
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def run_measure(args: argparse.Namespace) -> None:
    work = prepare(args)
    gpus = torch.cuda.device_count() if work.device.type == "cuda" else args.workers
    if gpus < args.workers:
        raise BenchmarkError(f"--workers {args.workers}: this machine has {gpus} GPUs")
    threads = args.threads or 1
    print(f"{args.workers} workers of {threads} threads or a GPU each, on {describe(work.device)}")
    figures = measure(work, args.workers, threads=threads, rounds=args.rounds, steps=args.steps)
    figures = report(figures, work, args.workers)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    try:
        args = parse(sys.argv[1:])
        (run_model if args.command == "model" else run_measure)(args)
    except UserError as error:
        sys.exit(f"error: {error}")
