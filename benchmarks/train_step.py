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
import copy
import gc
import importlib
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

try:
    import biggan  # noqa: F401
except ModuleNotFoundError:  # Not installed: a checkout alone will do.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from biggan.config import RESOLUTIONS, RunConfig
from biggan.errors import UserError
from biggan.networks import G_WIDTHS, check_model, d_sides, g_sides
from biggan.training import Fakes, Reals, StepInputs, TrainStep, build

OURS = "ours"
WARM_UP = 2
"""Steps of a trainer before anything is measured: optimizers have state, kernels are chosen."""


class BenchmarkError(UserError):
    """What was asked for cannot be measured: says what, and the mend."""


@dataclass(frozen=True)
class Work:
    """What each trainer is asked to do."""

    config: RunConfig
    resolution: int
    n_classes: int
    device: torch.device
    peer_precision: str = "float32"

    @property
    def micro_batch(self) -> int:
        """Images that go through a network at a time."""
        return self.config.optim.batch_size // self.config.optim.accumulation

    @property
    def torch_precision(self) -> str:
        """What torch computes float32 convolutions in unless told otherwise."""
        return "tf32" if self.device.type == "cuda" else "float32"


@dataclass(frozen=True)
class Trainer:
    """One implementation, ready to train."""

    name: str
    G: nn.Module
    D: nn.Module
    G_ema: nn.Module
    step: Callable[[StepInputs], object]
    precision: str
    """Of its convolutions: float32, tf32, bfloat16 or float16."""
    cudnn_benchmark: bool
    """Whether it lets cuDNN try out kernels, as the peers do; ours has it deterministic instead."""

    def run(self, inputs: StepInputs, steps: int) -> float:
        """Seconds that `steps` steps take."""
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.backends.cudnn.deterministic = not self.cudnn_benchmark
        # Our `TrainStep` sets these for the process. The peers leave them as torch has them.
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32" and self.name == OURS
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step(inputs)
        synchronize()
        return time.perf_counter() - begin


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_inputs(work: Work) -> StepInputs:
    """Noise for images, and latents: what one step consumes."""
    generator = torch.Generator().manual_seed(0)
    n, optim, shape = work.micro_batch, work.config.optim, (3, work.resolution, work.resolution)

    def labels() -> Tensor:
        return torch.randint(work.n_classes, (n,), generator=generator).to(work.device)

    def reals() -> Reals:
        images = torch.rand((n, *shape), generator=generator) * 2 - 1
        return Reals(images.to(work.device), labels())

    def fakes() -> Fakes:
        z = torch.randn((n, work.config.model.z_dim), generator=generator)
        return Fakes(z.to(work.device), labels())

    micro_batches = range(optim.accumulation)
    return StepInputs(
        d=[[(reals(), fakes()) for _ in micro_batches] for _ in range(optim.num_D_steps)],
        g=[fakes() for _ in micro_batches],
    )


# ---------------------------------------------------------------------------------- the trainers


def ours(work: Work) -> Trainer:
    """The trainer of this repository."""
    shape = {"resolution": work.resolution, "channels": 3, "n_classes": work.n_classes}
    state = build(work.config, **shape, device=work.device)
    train_step = TrainStep(work.config, state)

    def step(inputs: StepInputs) -> list[float]:
        # The training loop looks at every step's losses, as both peers do.
        losses: list[float] = torch.stack(list(train_step(inputs).values())).tolist()
        return losses

    precision = work.config.speed.precision_d  # D is most of the work.
    return Trainer(OURS, state.G, state.D, state.G_ema, step, precision, cudnn_benchmark=False)


def biggan_pytorch(work: Work, root: Path) -> Trainer:
    """ajbrock/BigGAN-PyTorch: its networks, its training function, its average of the weights."""
    model, loss, optim = work.config.model, work.config.loss, work.config.optim
    half = work.peer_precision == "mixed"
    attention = "_".join(map(str, model.attention)) or "0"
    init = "ortho" if model.init == "orthogonal" else "N02"
    with peer_modules("biggan-pytorch", root) as load:
        networks, train_fns, utils = map(load, ("BigGAN", "train_fns", "utils"))
        # As its launch scripts: activations in place, but not in its recipe for CIFAR.
        activation = utils.activation_dict["relu" if work.resolution == 32 else "inplace_relu"]
        settings = {
            "resolution": work.resolution, "n_classes": work.n_classes,
            "G_ch": model.ch_g, "D_ch": model.ch_d, "dim_z": model.z_dim,
            "G_shared": True, "shared_dim": model.shared_dim, "hier": model.hierarchical,
            "G_attn": attention, "D_attn": attention, "G_init": init, "D_init": init,
            "G_activation": activation, "D_activation": activation,
            "num_G_SVs": 1, "num_D_SVs": 1, "cross_replica": False,
            "SN_eps": model.sn_eps, "BN_eps": model.bn_eps, "adam_eps": optim.eps,
            "G_lr": optim.lr_g, "G_B1": optim.beta1, "G_B2": optim.beta2,
            "D_lr": optim.lr_d, "D_B1": optim.beta1, "D_B2": optim.beta2,
            "G_fp16": half, "G_mixed_precision": half, "D_fp16": half, "D_mixed_precision": half,
            "batch_size": work.micro_batch, "num_D_steps": optim.num_D_steps,
            "num_D_accumulations": optim.accumulation, "num_G_accumulations": optim.accumulation,
            # Its gradient is half that of the penalty as the paper writes it, and as ours is.
            "G_ortho": 2 * loss.ortho_g, "D_ortho": 2 * loss.ortho_d,
            "split_D": False, "toggle_grads": True, "ema": True,
        }  # fmt: skip
        G = networks.Generator(**settings).to(work.device)
        D = networks.Discriminator(**settings).to(work.device)
        G_ema = networks.Generator(**settings, skip_init=True, no_optim=True).to(work.device)
        start = round(work.config.ema.start_kimg * 1000 / work.config.step_images)
        ema = utils.ema(G, G_ema, work.config.ema.decay, start)
        if half:
            G, D, G_ema = G.half(), D.half(), G_ema.half()
    # With orthogonal regularization it prints a line at every step.
    vars(train_fns)["print"] = lambda *_: None

    # Its latents and labels are tensors on "cuda" that draw themselves anew when `sample_` is
    # called. These are tensors on our device that take the next of the step's inputs.
    dtype = torch.float16 if half else torch.float32
    pending: dict[str, Iterator[Tensor]] = {}
    z_ = torch.zeros(work.micro_batch, model.z_dim, device=work.device, dtype=dtype)
    y_ = torch.zeros(work.micro_batch, device=work.device, dtype=torch.int64)
    vars(z_)["sample_"] = lambda: z_.copy_(next(pending["z"]))
    vars(y_)["sample_"] = lambda: y_.copy_(next(pending["labels"]))
    counter = {"itr": 0}
    train = train_fns.GAN_training_function(
        G, D, networks.G_D(G, D), z_, y_, ema, counter, settings
    )

    def step(inputs: StepInputs) -> object:
        reals, fakes = _in_order(inputs)
        pending["z"] = (fake.z for fake in fakes)
        pending["labels"] = (fake.labels for fake in fakes)
        counter["itr"] += 1
        G.train()
        D.train()
        images = _cat([real.images for real in reals]).to(dtype)
        return train(images, _cat([real.labels for real in reals]))

    precision = "float16" if half else work.torch_precision
    return Trainer("biggan-pytorch", G, D, G_ema, step, precision, cudnn_benchmark=True)


def studiogan(work: Work, root: Path) -> Trainer:
    """POSTECH-CVLab/PyTorch-StudioGAN: its networks, losses and average, stepped as its worker.

    The worker itself wants wandb and a dozen other packages, so its D and G steps are written out
    here, less everything that its BigGAN recipe turns off. On one GPU it wraps the networks in
    DataParallel; here they are bare, which spares it that cost.
    """
    config, model, optim = work.config, work.config.model, work.config.optim
    mixed = work.peer_precision == "mixed"
    if not model.hierarchical or config.loss.ortho_g or config.loss.ortho_d:
        raise BenchmarkError(
            "studiogan has neither plain z nor orthogonal regularization: leave model.hierarchical"
            " on, and loss.ortho_g and loss.ortho_d at 0"
        )
    # At 32 pixels its D is 2 of its own ch wide where the paper's table says 4.
    d_ch = model.ch_d * (2 if work.resolution == 32 else 1)
    g_places = [k + 1 for k, side in enumerate(g_sides(work.resolution)) if side in model.attention]
    sides = d_sides(work.resolution)
    d_places = [sides.index(side) + 1 for side in model.attention if side in sides]
    init = "ortho" if model.init == "orthogonal" else "N02"
    with peer_modules("studiogan", root / "src") as load:
        networks, ops, losses, misc, averaging = map(
            load, ("models.big_resnet", "utils.ops", "utils.losses", "utils.misc", "utils.ema")
        )
        layers = SimpleNamespace(
            g_conv2d=ops.snconv2d, g_linear=ops.snlinear, g_bn=ops.ConditionalBatchNorm2d,
            g_act_fn=nn.ReLU(inplace=True),
            d_conv2d=ops.snconv2d, d_linear=ops.snlinear, d_embedding=ops.sn_embedding,
            d_act_fn=nn.ReLU(inplace=True),
        )  # fmt: skip
        options = SimpleNamespace(info_type="N/A", g_info_injection="N/A")
        shared = {"img_size": work.resolution, "apply_attn": bool(model.attention),
                  "num_classes": work.n_classes, "mixed_precision": mixed,
                  "MODULES": layers, "MODEL": options}  # fmt: skip
        G = networks.Generator(
            z_dim=model.z_dim, g_shared_dim=model.shared_dim, g_conv_dim=model.ch_g,
            attn_g_loc=g_places, g_cond_mtd="cBN", g_init=init, g_depth="N/A", **shared,
        ).to(work.device)  # fmt: skip
        D = networks.Discriminator(
            d_conv_dim=d_ch, apply_d_sn=True, attn_d_loc=d_places, d_cond_mtd="PD",
            aux_cls_type="W/O", d_embed_dim="N/A", normalize_d_embed=False, d_init=init,
            d_depth="N/A", **shared,
        ).to(work.device)  # fmt: skip
        G_ema = copy.deepcopy(G)
        start = round(config.ema.start_kimg * 1000 / config.step_images)
        ema = averaging.Ema(source=G, target=G_ema, decay=config.ema.decay, start_iter=start)
    betas = (optim.beta1, optim.beta2)
    optim_G = torch.optim.Adam(G.parameters(), lr=optim.lr_g, betas=betas, eps=optim.eps)
    optim_D = torch.optim.Adam(D.parameters(), lr=optim.lr_d, betas=betas, eps=optim.eps)
    scaler = torch.amp.GradScaler("cuda", enabled=mixed)
    counter = {"step": 0}

    def autocast() -> contextlib.AbstractContextManager[object]:
        return torch.autocast("cuda", enabled=mixed) if mixed else contextlib.nullcontext()

    def begin(trained: nn.Module, other: nn.Module) -> None:
        misc.make_GAN_trainable(G, G_ema, D)
        misc.toggle_grad(model=other, grad=False, num_freeze_layers=-1, is_stylegan=False)
        misc.toggle_grad(model=trained, grad=True, num_freeze_layers=-1, is_stylegan=False)

    def update(optimizer: torch.optim.Adam, micro_batches: Iterable[Callable[[], Tensor]]) -> float:
        optimizer.zero_grad()
        for loss_of in micro_batches:
            with autocast():
                loss = loss_of() / optim.accumulation
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    def loss_d(reals: Reals, fakes: Fakes) -> Tensor:
        generated = G(fakes.z, fakes.labels)
        real = D(reals.images, reals.labels)["adv_output"]
        fake = D(generated, fakes.labels, adc_fake=False)["adv_output"]
        loss: Tensor = losses.d_hinge(real, fake, DDP=False)
        return loss

    def loss_g(fakes: Fakes) -> Tensor:
        logits = D(G(fakes.z, fakes.labels), fakes.labels)["adv_output"]
        loss: Tensor = losses.g_hinge(logits, DDP=False)
        return loss

    def step(inputs: StepInputs) -> object:
        begin(D, G)
        G.apply(misc.untrack_bn_statistics)
        for micro_batches in inputs.d:
            d = update(optim_D, (partial(loss_d, *pair[:2]) for pair in micro_batches))
        begin(G, D)
        G.apply(misc.track_bn_statistics)
        g = update(optim_G, (partial(loss_g, fakes) for fakes in inputs.g))
        ema.update(counter["step"])
        counter["step"] += 1
        return d, g

    precision = "float16" if mixed else work.torch_precision
    return Trainer("studiogan", G, D, G_ema, step, precision, cudnn_benchmark=True)


def _in_order(inputs: StepInputs) -> tuple[list[Reals], list[Fakes]]:
    """Real and generated micro-batches in the order that a step uses them."""
    pairs = [pair for micro_batches in inputs.d for pair in micro_batches]
    return [pair[0] for pair in pairs], [*(pair[1] for pair in pairs), *inputs.g]


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@dataclass(frozen=True)
class Peer:
    """Another implementation, and what it can do."""

    make: Callable[[Work, Path], Trainer]
    marker: str
    """A file that a checkout has."""
    url: str
    resolutions: tuple[int, ...]


PEERS = {
    "biggan-pytorch": Peer(
        biggan_pytorch,
        "BigGAN.py",
        "https://github.com/ajbrock/BigGAN-PyTorch",
        (32, 64, 128, 256),
    ),
    "studiogan": Peer(
        studiogan,
        "src/models/big_resnet.py",
        "https://github.com/POSTECH-CVLab/PyTorch-StudioGAN",
        (32, 64, 128, 256, 512),
    ),
}


def parse_peers(values: Sequence[str]) -> dict[str, Path]:
    """Peers by name from ``NAME=PATH``; raises `BenchmarkError` for a bad name or path."""
    peers = {}
    for value in values:
        name, _, path = value.partition("=")
        if name not in PEERS:
            raise BenchmarkError(f"peer {name!r} is not known; known: {', '.join(PEERS)}")
        root = Path(path).expanduser().resolve()
        if not path or not (root / PEERS[name].marker).is_file():
            raise BenchmarkError(
                f"--peer {value}: no checkout there, {PEERS[name].marker} is missing; make one with"
                f" `git clone {PEERS[name].url} {path or name}`"
            )
        peers[name] = root
    return peers


def check_peers(peers: Iterable[str], work: Work) -> None:
    """Raise `BenchmarkError` unless all of `peers` can do the work."""
    for name in peers:
        if work.resolution not in PEERS[name].resolutions:
            raise BenchmarkError(
                f"{name} has no networks for {work.resolution} pixels: choose among"
                f" {PEERS[name].resolutions}"
            )
        if work.config.loss.name != "hinge":
            raise BenchmarkError(f"{name} is run with the hinge loss: leave loss.name at hinge")
    if work.peer_precision == "mixed" and work.device.type != "cuda":
        raise BenchmarkError("--peer-precision mixed: the peers have it on CUDA alone")


def make(name: str, work: Work, peers: Mapping[str, Path]) -> Trainer:
    """The trainer of that name; weights depend on the configuration's seed."""
    torch.manual_seed(work.config.seed)
    if name == OURS:
        return ours(work)
    with contextlib.redirect_stdout(io.StringIO()):  # They print their architecture.
        return PEERS[name].make(work, peers[name])


# -------------------------------------------------------------------------- importing the peers

IDLE_PACKAGES = {
    "h5py", "matplotlib", "pkg_resources", "scipy", "seaborn", "torchvision", "tqdm", "wandb",
}  # fmt: skip
"""What peers import at the top of their files for work other than a training step."""


class _StandIn(ModuleType):
    """Takes the place of a package that is imported but not used; has any class one asks for."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


class _StandIns(MetaPathFinder, Loader):
    """Finds a `_StandIn` for idle packages; comes last, so only for those not installed."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in IDLE_PACKAGES:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _StandIn(spec.name)
        if spec.name == "pkg_resources":  # The one that is called, to compare torch's version.
            vars(module)["parse_version"] = TorchVersion
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to execute."""


@contextlib.contextmanager
def peer_modules(peer: str, root: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Import a peer's modules by their bare names, and leave no trace for the next one.

    Both peers have a `utils`, a `losses`, a `layers`: while this lasts those names mean the files
    in `root`, and afterwards what they meant before. The modules themselves live on in their users.
    """
    names = {path.stem for path in root.iterdir() if path.suffix == ".py" or path.is_dir()}

    def take_out() -> dict[str, ModuleType]:
        found = [n for n, module in sys.modules.items()
                 if n.partition(".")[0] in names or isinstance(module, _StandIn)]  # fmt: skip
        return {name: sys.modules.pop(name) for name in found}

    aside = take_out()
    finder = _StandIns()
    sys.path.insert(0, str(root))
    sys.meta_path.append(finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield importlib.import_module
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            f"{peer} needs the package {error.name}, which is not installed: pip install"
            f" {error.name}"
        ) from error
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(str(root))
        take_out()
        sys.modules.update(aside)


# ------------------------------------------------------------------------------- what is measured


class _FlopCounter(TorchDispatchMode):
    """Adds up FLOPs by the formulas of `torch.utils.flop_counter`, and notes what has none.

    Its own `FlopCounterMode` also follows modules, by hooks that a network run without gradient
    but with trained weights does not always survive.
    """

    PRODUCTS = frozenset({"mv", "addmv", "dot", "vdot", "addr", "linear", "mkldnn_convolution"})

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif func.namespace not in ("aten", "prims", "profiler") or (
            packet.__name__ in self.PRODUCTS
        ):
            self.uncounted[packet.__name__] += 1
        return out


def count_flops(trainer: Trainer, inputs: StepInputs) -> tuple[int, dict[str, int]]:
    """Floating-point operations of one step, and how often operators ran that it cannot count."""
    with _FlopCounter() as counter:
        trainer.run(inputs, 1)
    return int(counter.flops), dict(counter.uncounted)


def matmul_rate(precision: str, device: torch.device) -> float:
    """FLOP a second that large matrix products of this precision sustain."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = a @ b
    rates = []
    for _ in range(5):
        synchronize()
        begin, products = time.perf_counter(), 0
        while time.perf_counter() - begin < 0.4:
            for _ in range(10 if device.type == "cuda" else 1):
                torch.mm(a, b, out=out)
                products += 1
            synchronize()
        rates.append(2 * n**3 * products / (time.perf_counter() - begin))
    return statistics.median(rates)


def resident_bytes(peak: bool) -> int:
    """Memory of this process in RAM now, or the most there ever was."""
    status = Path("/proc/self/status")
    if status.exists():
        _, _, rest = status.read_text().partition("VmHWM:" if peak else "VmRSS:")
        return int(rest.split()[0]) * 1024
    # Elsewhere only the peak is known. (On Linux this one would begin at the parent's peak.)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(name: str, work: Work, peers: Mapping[str, Path]) -> int:
    """Bytes that trainer needs at most, beyond what the process holds without it.

    For a process of its own. On a CPU the growth of resident memory: weights, gradients,
    optimizers, activations and scratch; on CUDA what torch has allocated in a step after warm-up.
    """
    # A miniature first: what code takes, loaded as it is used, is no state of the trainer.
    miniature = _miniature(work)
    make(name, miniature, peers).run(random_inputs(miniature), 1)
    gc.collect()
    inputs = random_inputs(work)
    before = resident_bytes(peak=False)
    trainer = make(name, work, peers)
    trainer.run(inputs, WARM_UP)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.run(inputs, 2)
        return torch.cuda.max_memory_allocated()
    trainer.run(inputs, 2)
    return resident_bytes(peak=True) - before


def _miniature(work: Work) -> Work:
    changes = {"model.ch_g": 1, "model.ch_d": 1, "model.attention": (), "optim.batch_size": 2,
               "optim.accumulation": 1, "optim.num_D_steps": 1}  # fmt: skip
    return replace(work, config=work.config.override(changes), n_classes=2)


def in_child(argv: Sequence[str], what: str) -> dict[str, Any]:
    """Run this script again to measure `what` in a fresh process; its answer, or an `error`."""
    # One arena, and large blocks straight from and back to the system: the peak is then what was
    # alive at once, not what malloc kept for later.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--measure", what]
    child = subprocess.run(command, env=os.environ | malloc, capture_output=True, text=True)
    if child.returncode == -9:
        return {"error": "out of memory: the system killed it"}
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        return {"error": (child.stderr.strip().splitlines() or ["failed without a word"])[-1]}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


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


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on CUDA or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


@contextlib.contextmanager
def noted(result: Result) -> Iterator[None]:
    """Write down what goes wrong with one trainer, and go on with the others."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        kind = "out of memory" if out_of_memory(error) else type(error).__name__
        result.error = f"{kind}: {first_line}"
        torch.cuda.empty_cache()


def measure(
    work: Work, peers: Mapping[str, Path], argv: Sequence[str], *, rounds: int, steps: int
) -> tuple[dict[str, Result], dict[str, float]]:
    """Results by trainer, and the rate of matrix products by precision."""
    results = {name: Result() for name in (OURS, *peers)}
    for name, result in results.items():
        answer = in_child(argv, f"memory:{name}")
        result.error = answer.get("error", "")
        result.peak_memory_bytes = answer.get("value", 0)
    inputs = random_inputs(work)
    trainers: dict[str, Trainer] = {}
    for name, result in results.items():
        if result.error:
            continue
        with noted(result):
            trainer = make(name, work, peers)
            trainer.run(inputs, WARM_UP)
            # What torch.compile makes of a network cannot be counted; it does the same products.
            eager = trainer
            if name == OURS and work.config.speed.compile != "off":
                config = work.config.override({"speed.compile": "off"})
                eager = ours(replace(work, config=config))
            result.flops_per_step, result.uncounted_calls = count_flops(eager, inputs)
            del eager
            result.precision = trainer.precision
            result.parameters = {
                net: sum(p.numel() for p in network.parameters())
                for net, network in (("G", trainer.G), ("D", trainer.D))
            }
            trainers[name] = trainer
    for k in range(rounds):
        # In turn, so that other work on the machine hits all alike; and who begins changes.
        order = list(trainers)
        for name in order[k % len(order) :] + order[: k % len(order)] if order else []:
            with noted(results[name]):
                results[name].seconds.append(trainers[name].run(inputs, steps) / steps)
        for name in [name for name in trainers if results[name].error]:
            del trainers[name]
    del trainers
    rates = {}
    for precision in {result.precision for result in results.values() if result.precision}:
        rates[precision] = in_child(argv, f"matmul:{precision}").get("value", 0.0)
    for result in results.values():
        if result.seconds and not result.error:
            result.seconds_per_step = statistics.median(result.seconds)
            result.images_per_second = work.config.step_images / result.seconds_per_step
            if rate := rates[result.precision]:
                done = result.flops_per_step / result.seconds_per_step
                result.share_of_matmul_rate = done / rate
    return results, rates


def ratios(results: Mapping[str, Result]) -> dict[str, dict[str, float]]:
    """Ours against each peer, images a second and peak memory; speeds paired round by round."""
    mine = results[OURS]
    found = {}
    for name, peer in results.items():
        if name == OURS or peer.error or mine.error:
            continue
        paired = [b / a for a, b in zip(mine.seconds, peer.seconds, strict=True)]
        memory = mine.peak_memory_bytes / max(peer.peak_memory_bytes, 1)
        found[name] = {
            "images_per_second": statistics.median(paired),
            "lowest": min(paired),
            "highest": max(paired),
            "peak_memory": memory,
        }
    return found


# ------------------------------------------------------------------------------------ the report


def print_report(results: Mapping[str, Result], rates: Mapping[str, float]) -> None:
    """The table, and ours against each peer."""
    print(f"{'':16}{'parameters G':>14}{'D':>14}{'images/s':>11}{'s/step':>9}{'peak memory':>14}"
          f"{'GFLOP/step':>12}{'of matmul rate':>16}")  # fmt: skip
    for name, result in results.items():
        if result.error:
            print(f"{name:16}  {result.error}")
            continue
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
    calls: Counter[str] = Counter()
    for result in results.values():
        calls |= Counter(result.uncounted_calls)
    missed = ", ".join(f"{name} (up to {n} calls a step)" for name, n in calls.items())
    print("FLOPs: convolutions and matrix products as run; not element-wise work, reductions,"
          f" optimizers{', nor ' + missed if missed else ''}.")  # fmt: skip


def configuration(args: argparse.Namespace) -> RunConfig:
    """The run that the flags describe."""
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
    return config


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Values by dotted name from ``NAME=VALUE``, values as in YAML."""
    for setting in settings:
        if "=" not in setting:
            raise BenchmarkError(f"--set {setting}: write NAME=VALUE, as in --set optim.lr_g=2e-4")
    return {name: yaml.safe_load(value) for name, _, value in (s.partition("=") for s in settings)}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time the whole training step, ours in turn with other implementations.",
        epilog="example: python benchmarks/train_step.py --peer biggan-pytorch=~/BigGAN-PyTorch"
        " --resolution 64 --ch 16 --threads 2 --json step.json",
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH",
                        help=f"a checkout of {' or '.join(PEERS)}; repeatable")  # fmt: skip
    parser.add_argument("--resolution", type=int, default=32, choices=RESOLUTIONS)
    parser.add_argument("--ch", type=int, default=16, help="width multiplier of G and D")
    parser.add_argument("--batch-size", type=int, default=64, help="real images an update of D")
    parser.add_argument("--d-steps", type=int, default=1, help="updates of D a step")
    parser.add_argument("--n-classes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0: all cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, default=3, help="steps a trainer runs in its turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each trainer")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of our configuration by dotted name, repeatable; peers"
                        " follow where they have it (widths, attention, rates ...)")  # fmt: skip
    parser.add_argument("--peer-precision", choices=("float32", "mixed"), default="float32",
                        help="mixed: BigGAN-PyTorch's fp16, StudioGAN's autocast")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # What a child process is to do.
    args = parser.parse_args(argv)
    for name in ("ch", "batch_size", "d_steps", "n_classes", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    return args


def prepare(args: argparse.Namespace) -> tuple[Work, dict[str, Path]]:
    """The work that the flags describe, checked, and the peers."""
    if args.threads:
        torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise BenchmarkError("--device cuda: torch finds no GPU; use --device cpu")
    device = torch.device("cuda" if cuda and args.device != "cpu" else "cpu")
    peers = parse_peers(args.peer)
    config = configuration(args)
    work = Work(config, args.resolution, args.n_classes, device, args.peer_precision)
    check_peers(peers, work)
    return work, peers


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    work, peers = prepare(args)
    if args.measure:
        kind, _, what = args.measure.partition(":")
        try:
            value = (
                peak_memory(what, work, peers)
                if kind == "memory"
                else matmul_rate(what, work.device)
            )
            print(json.dumps({"value": value}))
        except Exception as error:
            if not out_of_memory(error):
                raise
            print(json.dumps({"error": f"out of memory: {str(error).splitlines()[0]}"}))
        return
    device = torch.cuda.get_device_name() if work.device.type == "cuda" else (
        f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    )  # fmt: skip
    attention = "_".join(map(str, work.config.model.attention)) or "none"
    print(f"torch {torch.__version__}, {work.device}, {device}")
    print(f"{args.resolution} px, ch {args.ch}, batch {work.config.optim.batch_size},"
          f" {work.config.optim.num_D_steps} D steps, {args.n_classes} classes, attention"
          f" {attention}; {args.rounds} rounds of {args.steps} steps in turn")  # fmt: skip
    for setting in args.set:
        print(f"set {setting}")
    results, rates = measure(work, peers, argv, rounds=args.rounds, steps=args.steps)
    print_report(results, rates)
    if args.json:
        report = {
            "torch": torch.__version__,
            "device": device,
            "resolution": work.resolution,
            "n_classes": work.n_classes,
            "config": work.config.flatten(),
            "peer_precision": work.peer_precision,
            "matmul_flops_per_second": rates,
            "trainers": {name: asdict(result) for name, result in results.items()},
            "ours_against": ratios(results),
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if results[OURS].error:
        raise BenchmarkError(f"our trainer was not measured: {results[OURS].error}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
