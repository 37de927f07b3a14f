"""Other BigGAN implementations as trainers: BigGAN-PyTorch and StudioGAN.

Imported from checkouts of theirs at run time; nothing of theirs is part of this repository.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from machine import BenchmarkError
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from trainers import OURS, Trainer, Work, ours

from biggan.networks import d_sides, g_sides
from biggan.training import Fakes, Reals, StepInputs


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
    config, optim = work.config, work.config.optim
    mixed = work.peer_precision == "mixed"
    if not config.model.hierarchical or config.loss.ortho_g or config.loss.ortho_d:
        raise BenchmarkError(
            "studiogan has neither plain z nor orthogonal regularization: leave model.hierarchical"
            " on, and loss.ortho_g and loss.ortho_d at 0"
        )
    with peer_modules("studiogan", root / "src") as load:
        G, D = _studiogan_networks(work, load)
        losses, misc, averaging = map(load, ("utils.losses", "utils.misc", "utils.ema"))
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


def _studiogan_networks(
    work: Work, load: Callable[[str], ModuleType]
) -> tuple[nn.Module, nn.Module]:
    """Its G and D, as wide and with attention where ours have it."""
    model = work.config.model
    networks, ops = map(load, ("models.big_resnet", "utils.ops"))
    # At 32 pixels its D is 2 of its own ch wide where the paper's table says 4.
    d_ch = model.ch_d * (2 if work.resolution == 32 else 1)
    g_places = [k + 1 for k, side in enumerate(g_sides(work.resolution)) if side in model.attention]
    sides = d_sides(work.resolution)
    d_places = [sides.index(side) + 1 for side in model.attention if side in sides]
    init = "ortho" if model.init == "orthogonal" else "N02"
    layers = SimpleNamespace(
        g_conv2d=ops.snconv2d, g_linear=ops.snlinear, g_bn=ops.ConditionalBatchNorm2d,
        g_act_fn=nn.ReLU(inplace=True),
        d_conv2d=ops.snconv2d, d_linear=ops.snlinear, d_embedding=ops.sn_embedding,
        d_act_fn=nn.ReLU(inplace=True),
    )  # fmt: skip
    options = SimpleNamespace(info_type="N/A", g_info_injection="N/A")
    shared = {"img_size": work.resolution, "apply_attn": bool(model.attention),
              "num_classes": work.n_classes, "mixed_precision": work.peer_precision == "mixed",
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
    return G, D


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
