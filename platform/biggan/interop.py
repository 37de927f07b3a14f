"""Weights in the format of ajbrock/BigGAN-PyTorch, BigGAN and BigGAN-deep, read and written.

What a network is like is read off its weights. A file that does not fit is refused with the first
key or shape that is wrong (`WeightsError`). `biggan.interop_hf` reads another format,
`biggan.exchange` moves whole files between either and the model store.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from biggan.config import ModelConfig, explain
from biggan.errors import UserError
from biggan.layers import SelfAttention, spectral_norms
from biggan.models import (
    DiscriminatorConfig,
    GeneratorConfig,
    blank_discriminator,
    blank_generator,
)
from biggan.networks import D_WIDTHS, G_WIDTHS, Discriminator, Generator, d_sides, g_sides

State = Mapping[str, Tensor]

# Resolutions that BigGAN-PyTorch has networks for, plain and deep.
_G_RESOLUTIONS = {False: (32, 64, 128, 256, 512), True: (32, 64, 128, 256)}
_D_RESOLUTIONS = (32, 64, 128, 256)
BN_EPS = 1e-5
"""Of BigGAN-PyTorch: its default, and what all of its training scripts set."""


class WeightsError(UserError):
    """Weights that do not fit: names the first key or shape that is wrong."""


class Weights:
    """The tensors of a file, each to be taken once."""

    def __init__(self, state: State) -> None:
        self._left = dict(state)

    def shape(self, key: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with so many dimensions."""
        if key not in self._left:
            raise WeightsError(f"{key} is missing")
        shape = tuple(self._left[key].shape)
        if len(shape) != dims:
            raise WeightsError(f"{key} has shape {list(shape)}: expected {dims} dimensions")
        return shape

    def take(self, key: str, shape: Sequence[int]) -> Tensor:
        """A tensor, as float32."""
        if key not in self._left:
            raise WeightsError(f"{key} is missing: expected it with shape {list(shape)}")
        tensor = self._left.pop(key)
        if tuple(tensor.shape) != tuple(shape):
            raise WeightsError(
                f"{key} has shape {list(tensor.shape)}: expected {list(shape)}, from the shapes of"
                " other weights"
            )
        return tensor.detach().float()

    def drop(self, key: str) -> None:
        """Pass over a tensor, which need not be there."""
        self._left.pop(key, None)

    def end(self) -> None:
        """Raise `WeightsError` if anything has not been taken."""
        for key, tensor in self._left.items():
            raise WeightsError(
                f"{key}, of shape {list(tensor.shape)}, has no place in the network that the other"
                " weights make up"
            )


_NAMES = [
    (re.compile(pattern), theirs)
    for pattern, theirs in (
        (r"^bn_out\.", "output_layer.0."),
        (r"^conv_out\.", "output_layer.2."),
        (r"^stem\.", "input_conv."),
        (r"\.norm\.running_", ".stored_"),
        (r"\.u$", ".u0"),
    )
]


def _bp_name(key: str, pairs: bool) -> str:
    """What BigGAN-PyTorch calls an entry of our state.

    Its networks are lists of lists: of a block and perhaps attention; with `pairs`, in the deep
    discriminator, of a stage's two blocks and perhaps attention.
    """
    for pattern, theirs in _NAMES:
        key = pattern.sub(theirs, key)
    if found := re.fullmatch(r"(blocks|attention)\.(\d+)\.(.+)", key):
        outer, inner = divmod(int(found[2]), 1 + pairs)
        return f"blocks.{outer}.{inner + (found[1] == 'attention')}.{found[3]}"
    return key


def is_discriminator(state: State) -> bool:
    """Whether BigGAN-PyTorch's weights are those of a discriminator."""
    return "embed.weight" in state and "output_layer.2.weight" not in state


def read_generator(state: State, bn_eps: float = BN_EPS) -> Generator:
    """BigGAN-PyTorch's generator; raises `WeightsError` on the first key that does not fit.

    `bn_eps` is that of the conditional batch norms, which weights do not tell.
    """
    state = _default_norms(state)
    weights = Weights(state)
    if is_discriminator(state):
        raise WeightsError("output_layer.2.weight is missing: these are a discriminator's weights")
    deep = "blocks.0.0.conv4.weight" in state
    resolution = _resolution(
        state, {len(g_sides(side)) * (1 + deep): side for side in _G_RESOLUTIONS[deep]}
    )
    ch = _width(weights, "blocks.0.0.conv1.weight", 1, G_WIDTHS[resolution][0])
    chunk = weights.shape("linear.weight", 2)[1]
    rows, columns = weights.shape("blocks.0.0.bn1.gain.weight", 2)
    # The normalized layers of a shared embedding, or tables, which are not normalized.
    if shared := "blocks.0.0.bn1.gain.u0" in state or "shared.weight" in state:
        n_classes, shared_dim = weights.shape("shared.weight", 2)
        hierarchical = columns != shared_dim
        z_dim = chunk * len(G_WIDTHS[resolution]) if hierarchical else chunk
        if deep:
            z_dim = columns - shared_dim
        elif hierarchical and columns != shared_dim + chunk:
            raise WeightsError(
                f"blocks.0.0.bn1.gain.weight has shape {[rows, columns]}: expected"
                f" {[rows, shared_dim]} or, with hierarchical latents, {[rows, shared_dim + chunk]}"
            )
    else:  # The table of a class embedding, a row a class.
        n_classes, shared_dim, hierarchical, z_dim = rows, chunk, False, chunk
    model = model_config(
        architecture="biggan-deep" if deep else "biggan",
        ch_g=ch,
        ch_d=ch,
        z_dim=z_dim,
        shared_dim=shared_dim,
        shared=shared,
        hierarchical=hierarchical,
        attention=_attention(
            state, [side for side in g_sides(resolution) for _ in range(1 + deep)]
        ),
        bn_eps=bn_eps,
    )
    config = GeneratorConfig(
        model=model,
        resolution=resolution,
        channels=weights.shape("output_layer.2.weight", 4)[0],
        class_names=[str(i) for i in range(n_classes)],
    )
    G = blank_generator(config)
    _fill(G, weights)
    return G.eval()


def read_discriminator(state: State) -> Discriminator:
    """BigGAN-PyTorch's discriminator; raises `WeightsError` on the first key that does not fit."""
    weights = Weights(state)
    if "output_layer.2.weight" in state:
        raise WeightsError("embed.weight is missing: these are a generator's weights")
    deep = "blocks.0.0.conv4.weight" in state
    resolution = _resolution(state, {len(d_sides(side, deep)): side for side in _D_RESOLUTIONS})
    first = "input_conv.weight" if deep else "blocks.0.0.conv1.weight"
    ch = _width(weights, first, 0, D_WIDTHS[resolution][0])
    model = model_config(
        architecture="biggan-deep" if deep else "biggan",
        ch_g=ch,
        ch_d=ch,
        hierarchical=False,
        attention=_attention(state, d_sides(resolution, deep)),
    )
    config = DiscriminatorConfig(
        model=model,
        resolution=resolution,
        channels=weights.shape(first, 4)[1],
        n_classes=weights.shape("embed.weight", 2)[0],
    )
    D = blank_discriminator(config)
    _fill(D, weights)
    return D.eval()


def write_generator(G: Generator) -> dict[str, Tensor]:
    """G in BigGAN-PyTorch's format, without truncation tables, for which that has no place.

    Raises `UserError` if it has no such network.
    """
    if G.conv_out.u is None:
        raise _no_place("spectral norms that are folded into the weights")
    _check_exportable(G, _G_RESOLUTIONS[G.config.deep])
    return _write(G)


def write_discriminator(D: Discriminator) -> dict[str, Tensor]:
    """D in BigGAN-PyTorch's format; raises `UserError` if that has no such network."""
    _check_exportable(D, _D_RESOLUTIONS)
    # There, attention follows every stage at a side, and at 32 pixels all of them count as 16.
    sides = d_sides(D.resolution, D.config.deep)
    theirs = [16] * len(sides) if D.resolution == 32 else sides
    for side in {*D.config.attention} & {*sides}:
        if theirs.count(side) != 1:
            raise _no_place(f"attention at {side} in a discriminator of {D.resolution} pixels")
    return _write(D)


def original_flags(G: Generator) -> str:
    """The flags with which BigGAN-PyTorch builds a network for what `write_generator` gives."""
    config = G.config
    flags = [
        f"--model {'BigGANdeep' if config.deep else 'BigGAN'}",
        f"--G_ch {config.ch_g} --dim_z {config.z_dim} --shared_dim {config.shared_dim}",
        f"--G_attn {'_'.join(map(str, config.attention)) or 0}",
        f"--BN_eps {config.bn_eps:g} --SN_eps {config.sn_eps:g}",
        "--G_shared" if config.shared else "",
        "--hier" if config.hierarchical or config.deep else "",
    ]
    return " ".join(filter(None, flags))


def _default_norms(state: State) -> dict[str, Tensor]:
    """The state with the moments of `--mybn` and `--cross_replica` under the default names."""
    renamed = {}
    for key, tensor in state.items():
        module, inner, leaf = key.rpartition(".bn.")
        if inner and leaf in ("stored_mean", "stored_var"):
            count = state.get(f"{module}.bn.accumulation_counter")
            # Standing statistics are stored there as sums.
            renamed[f"{module}.{leaf}"] = tensor / count if count is not None and count else tensor
        elif inner and leaf in ("running_mean", "running_var"):
            renamed[f"{module}.{leaf.replace('running', 'stored')}"] = tensor
        elif not (inner and leaf in ("accumulation_counter", "num_batches_tracked")):
            renamed[key] = tensor
    return renamed


def _resolution(state: State, resolutions: Mapping[int, int]) -> int:
    """The resolution of the network whose list of blocks is as long."""
    n = 0
    while f"blocks.{n}.0.conv1.weight" in state:
        n += 1
    if n not in resolutions:
        known = ", ".join(f"{length} ({side} px)" for length, side in resolutions.items())
        raise WeightsError(
            f"blocks.{n}.0.conv1.weight is missing: a list of {n} blocks makes no network; expected"
            f" one of {known}"
        )
    return resolutions[n]


def _width(weights: Weights, key: str, axis: int, multiple: int) -> int:
    """The `ch` of a convolution with `multiple` * ch channels along an axis of its weight."""
    shape = weights.shape(key, 4)
    ch, rest = divmod(shape[axis], multiple)
    if rest or not ch:
        raise WeightsError(
            f"{key} has shape {list(shape)}: expected a multiple of {multiple} along axis {axis}"
        )
    return ch


def _attention(state: State, sides: Sequence[int]) -> tuple[int, ...]:
    """Sides of the feature maps that attention follows; `sides` are those after each entry."""
    found = [re.fullmatch(r"blocks\.(\d+)\.[12]\.gamma", key) for key in state]
    places = {int(match[1]) for match in found if match}
    return tuple(sorted({side for k, side in enumerate(sides) if k in places}))


def model_config(**fields: Any) -> ModelConfig:
    """A `ModelConfig`; raises `WeightsError` if there is none such."""
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise WeightsError(f"these weights make up no network: {explain(error)}") from None


def _fill(network: Generator | Discriminator, weights: Weights) -> None:
    state = {}
    for key, value in network.state_dict().items():
        name = _bp_name(key, _in_pairs(network))
        if name.endswith(".u0"):
            state[key] = weights.take(name, (1, *value.shape))[0]
            weights.drop(name.removesuffix("u0") + "sv0")  # For logging only.
        else:
            state[key] = weights.take(name, value.shape)
    weights.end()
    network.load_state_dict(state)


def _no_place(what: str) -> UserError:
    return UserError(f"BigGAN-PyTorch's format has no place for {what}")


def _check_exportable(network: Generator | Discriminator, resolutions: tuple[int, ...]) -> None:
    if network.channels != 3:
        raise _no_place(f"images of {network.channels} channels: it has 3")
    if network.resolution not in resolutions:
        raise _no_place(f"this network of {network.resolution} pixels: it has {resolutions}")
    if network.config.channel_attention:
        raise _no_place(f"channel attention, here at {network.config.channel_attention}")
    for layer in network.modules():
        if isinstance(layer, SelfAttention) and layer.theta.in_channels < 8:
            raise _no_place(f"attention on {layer.theta.in_channels} channels: 8 are the fewest")


def _in_pairs(network: Generator | Discriminator) -> bool:
    return network.config.deep and isinstance(network, Discriminator)


def _write(network: Generator | Discriminator) -> dict[str, Tensor]:
    layers = spectral_norms(network)
    state = {}
    for key, value in network.state_dict().items():
        if key.endswith((".table_mean", ".table_var")):
            continue
        name, tensor = _bp_name(key, _in_pairs(network)), value.detach().cpu().clone()
        if not name.endswith(".u0"):
            state[name] = tensor
            continue
        state[name] = tensor[None]
        matrix = layers[key.removesuffix(".u")].weight.detach().cpu().flatten(1)
        state[name.removesuffix("u0") + "sv0"] = (F.normalize(tensor, dim=0) @ matrix).norm()[None]
    return state
