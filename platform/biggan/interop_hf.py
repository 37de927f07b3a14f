"""Weights in the format of huggingface/pytorch-pretrained-BigGAN: BigGAN-deep generators.

Its files are those that the authors of arXiv 1809.11096 released, converted: 128, 256 and 512
pixels, with batch-norm moments for 51 truncations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from biggan.config import explain
from biggan.interop import State, Weights, WeightsError, model_config
from biggan.layers import CrossReplicaBatchNorm2d, SNConv2d, SNLinear
from biggan.models import GeneratorConfig, blank_generator
from biggan.networks import BASE, G_WIDTHS, Generator
from biggan.truncation import TruncationTables

_RESOLUTIONS = (128, 256, 512)


class _HFConfig(BaseModel):
    """What matters of its `config.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    output_dim: int
    z_dim: int
    channel_width: int
    num_classes: int
    layers: list[tuple[bool, int, int]]
    attention_layer_position: int
    eps: float
    n_stats: int


def read_deep_hf(state: State, config: Mapping[str, Any]) -> Generator:
    """pytorch-pretrained-BigGAN's generator, with its 51 tables of moments.

    Its spectral norms are divided out, since that implementation never iterates on its singular
    vectors. Raises `WeightsError` on the first entry of config or weights that does not fit.
    """
    try:
        hf = _HFConfig.model_validate(config)
    except ValidationError as error:
        raise WeightsError(f"config: {explain(error)}") from None
    weights = Weights(state)
    position = _check_hf_config(hf, weights, state)
    model = model_config(
        architecture="biggan-deep",
        ch_g=hf.channel_width,
        ch_d=hf.channel_width,
        z_dim=hf.z_dim,
        shared_dim=hf.z_dim,
        attention=() if position is None else (BASE << position // 2,),
        bn_eps=hf.eps,
    )
    tables = TruncationTables(
        truncations=tuple(i / (hf.n_stats - 1) for i in range(hf.n_stats)), convention="scale"
    )
    names = [str(i) for i in range(hf.num_classes)]
    G = blank_generator(
        GeneratorConfig(
            model=model,
            resolution=hf.output_dim,
            channels=3,
            class_names=names,
            tables=tables,
            folded=True,
        )
    )
    G.load_state_dict(_hf_state(G, weights, position))
    return G.eval()


def _check_hf_config(hf: _HFConfig, weights: Weights, state: State) -> int | None:
    """Check a config by itself and against the weights; returns the layer that is attention."""
    if hf.output_dim not in _RESOLUTIONS:
        raise WeightsError(f"config: output_dim is {hf.output_dim}, expected one of {_RESOLUTIONS}")
    widths = G_WIDTHS[hf.output_dim]
    plan = [layer for i, o in pairwise(widths) for layer in ((False, i, i), (True, i, o))]
    for k, expected in enumerate(plan):
        found = hf.layers[k] if k < len(hf.layers) else None
        if found != expected:
            raise WeightsError(
                f"config: layers[{k}] is {found and list(found)}, expected {list(expected)} in a"
                f" network of output_dim {hf.output_dim}"
            )
    if len(hf.layers) > len(plan):
        raise WeightsError(f"config: layers has {len(hf.layers)} entries, expected {len(plan)}")
    if hf.n_stats < 2:
        raise WeightsError(f"config: n_stats is {hf.n_stats}, expected 2 or more")
    for field, key, dims, axis in (
        ("num_classes", "embeddings.weight", 2, 1),
        ("z_dim", "embeddings.weight", 2, 0),
        ("channel_width", "generator.bn.weight", 1, 0),
        ("n_stats", "generator.bn.running_means", 2, 0),
    ):
        shape = weights.shape(key, dims)
        if shape[axis] != getattr(hf, field):
            raise WeightsError(
                f"config: {field} is {getattr(hf, field)}, but {key} has shape {list(shape)}"
            )
    position = hf.attention_layer_position
    attended = [key for key in state if re.fullmatch(r"generator\.layers\.\d+\.gamma", key)]
    if position not in range(len(plan)):  # Then that implementation makes none.
        expected_key = []
    elif position % 2 or not position:
        raise WeightsError(
            f"config: attention_layer_position is {position}: expected an even number from 2, since"
            " attention follows whole stages"
        )
    else:
        expected_key = [f"generator.layers.{position}.gamma"]
    if attended != expected_key:
        raise WeightsError(
            f"config: attention_layer_position is {position}, but the weights have"
            f" {', '.join(attended) or 'no attention'}"
        )
    return position if expected_key else None


def _hf_state(G: Generator, weights: Weights, position: int | None) -> dict[str, Tensor]:
    state = {"shared.weight": weights.take("embeddings.weight", (G.z_dim, G.n_classes)).T}
    for name, module in G.named_modules():
        theirs = _hf_name(name, position)
        if isinstance(module, SNConv2d | SNLinear):
            state |= _hf_layer(name, theirs, module, weights)
        elif isinstance(module, CrossReplicaBatchNorm2d):
            state |= _hf_moments(name, theirs, module, weights)
        elif name == "bn_out":
            shape = G.bn_out.gain.shape
            state["bn_out.gain"] = weights.take(f"{theirs}.weight", shape)
            state["bn_out.bias"] = weights.take(f"{theirs}.bias", shape)
        elif re.fullmatch(r"attention\.\d+", name):
            state[f"{name}.gamma"] = weights.take(f"{theirs}.gamma", (1,))[0]
    # Its last batch norm takes the config's eps; ours has its own, which the variances make up for.
    for key in ("bn_out.norm.table_var", "bn_out.norm.running_var"):
        state[key] = state[key] + (G.config.bn_eps - G.bn_out.norm.eps)
    weights.end()
    return state


def _hf_name(name: str, position: int | None) -> str:
    """What pytorch-pretrained-BigGAN calls a module of ours."""
    whole = {"linear": "gen_z", "bn_out": "bn", "bn_out.norm": "bn", "conv_out": "conv_to_rgb"}
    if name in whole:
        return f"generator.{whole[name]}"
    network, _, rest = name.partition(".")
    index, _, layer = rest.partition(".")
    if network == "attention":
        inner = {"o": "o_conv"}.get(layer, layer)
        return f"generator.layers.{position}" + (f".snconv1x1_{inner}" if layer else "")
    if network != "blocks" or not layer:
        return ""
    place = int(index) + (position is not None and int(index) >= position)
    kind, number, part = re.fullmatch(r"(bn|conv)(\d)(?:\.(\w+))?", layer).groups()  # type: ignore[union-attr]
    inner = {"gain": ".scale", "bias": ".offset"}.get(part, "")
    return f"generator.layers.{place}.{kind}_{int(number) - 1}{inner}"


def _hf_layer(
    name: str, theirs: str, layer: SNConv2d | SNLinear, weights: Weights
) -> dict[str, Tensor]:
    shape = list(layer.weight.shape)
    if name == "conv_out":
        shape[0] = shape[1]  # As many channels as come in, of which 3 are looked at.
    weight = weights.take(f"{theirs}.weight_orig", shape)
    u = weights.take(f"{theirs}.weight_u", shape[:1])
    v = weights.take(f"{theirs}.weight_v", [math.prod(shape[1:])])
    weight = weight / (u @ (weight.flatten(1) @ v))
    if isinstance(layer, SNLinear):  # Its columns are for [z, y]; ours for [y, z].
        weight = torch.cat(weight.chunk(2, dim=1)[::-1], 1)
    state = {f"{name}.weight": weight}
    if layer.bias is not None:
        state[f"{name}.bias"] = weights.take(f"{theirs}.bias", shape[:1])
    if name == "conv_out":
        return {key: rows[: len(layer.weight)] for key, rows in state.items()}
    if name == "linear":  # Its rows are a feature map in NHWC.
        return {
            key: rows.unflatten(0, (BASE**2, -1)).transpose(0, 1).flatten(0, 1)
            for key, rows in state.items()
        }
    return state


def _hf_moments(
    name: str, theirs: str, norm: CrossReplicaBatchNorm2d, weights: Weights
) -> dict[str, Tensor]:
    state = {}
    for kind in ("mean", "var"):
        table = weights.take(f"{theirs}.running_{kind}s", norm.table_mean.shape)
        state[f"{name}.table_{kind}"] = table
        state[f"{name}.running_{kind}"] = table[-1].clone()
    return state
