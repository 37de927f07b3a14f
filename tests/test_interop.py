"""Weights of others: images as their implementations make them, and files that do not fit.

What the originals compute is written down here anew, from their formats, as plain functions over
state dicts. Checkouts of the originals are compared with too where $BIGGAN_PYTORCH (of
ajbrock/BigGAN-PyTorch) and $BIGGAN_DEEP_HF (of huggingface/pytorch-pretrained-BigGAN) name them.
"""

import importlib
import io
import json
import math
import os
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import job

import biggan
from biggan.config import ModelConfig
from biggan.errors import UserError
from biggan.exchange import WeightFiles, export_weights, import_weights, read_state
from biggan.interop import (
    original_flags,
    read_discriminator,
    read_generator,
    write_discriminator,
    write_generator,
)
from biggan.interop_hf import read_deep_hf
from biggan.models import ModelStore, load_card, load_discriminator
from biggan.networks import Discriminator, Generator
from biggan.truncation import TruncationTables

G_IN = {32: (4, 4, 4), 64: (16, 16, 8, 4), 128: (16, 16, 8, 4, 2)}
G_OUT = {32: (4, 4, 4), 64: (16, 8, 4, 2), 128: (16, 8, 4, 2, 1)}
D_IN = {32: (0, 4, 4, 4), 64: (0, 1, 2, 4, 8)}
D_OUT = {32: (4, 4, 4, 4), 64: (1, 2, 4, 8, 16)}
DEEP_OUT = {
    128: (16, 8, 4, 2, 1),
    256: (16, 8, 8, 4, 2, 1),
    512: (16, 8, 8, 4, 2, 1, 1),
}
DEEP_LAYERS = [
    layer for i, o in pairwise((16, *DEEP_OUT[128])) for layer in ((False, i, i), (True, i, o))
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# State dicts as the originals have them, with random content.


def draw(state):
    """Fill a state with values that exercise everything and keep activations sane."""
    generator = torch.Generator().manual_seed(len(state))

    def normal(like):
        return torch.randn(like.shape, generator=generator)

    for key, value in state.items():
        leaf = key.rpartition(".")[2]
        if leaf in ("weight", "weight_orig") and value.dim() > 1:
            state[key] = normal(value) * value.shape[0] ** -0.5
        elif leaf in ("stored_var", "running_vars"):
            state[key] = 0.5 + torch.rand(value.shape, generator=generator)
        elif leaf == "gamma":
            state[key] = torch.full_like(value, 0.7)
        elif leaf == "sv0":
            state[key] = torch.ones(1)
        elif key in ("output_layer.0.gain", "generator.bn.weight"):
            state[key] = 0.3 + 0.05 * normal(value)  # Keeps tanh from saturating.
        elif not leaf.startswith(("u0", "weight_")):
            state[key] = 0.1 * normal(value)
    for key in [key for key in state if key.endswith((".u0", ".weight_u"))]:
        module, _, leaf = key.rpartition(".")
        W = state[f"{module}.{'weight' if leaf == 'u0' else 'weight_orig'}"].flatten(1)
        u = F.normalize(torch.randn(len(W), generator=generator), dim=0)
        for _ in range(3):
            v = F.normalize(u @ W, dim=0)
            u = F.normalize(W @ v, dim=0)
        state[key] = u.reshape(state[key].shape)
        if leaf == "weight_u":
            state[f"{module}.weight_v"] = v
    return state


def put(state, name, shape, bias=True, norm=True):
    state[f"{name}.weight"] = torch.empty(shape)
    if bias:
        state[f"{name}.bias"] = torch.empty(shape[0])
    if norm:
        state |= {f"{name}.u0": torch.empty(1, shape[0]), f"{name}.sv0": torch.empty(1)}


def put_attention(state, name, ch):
    state[f"{name}.gamma"] = torch.empty(())
    for layer, shape in (
        ("theta", (ch // 8, ch, 1, 1)),
        ("phi", (ch // 8, ch, 1, 1)),
        ("g", (ch // 2, ch, 1, 1)),
        ("o", (ch, ch // 2, 1, 1)),
    ):
        put(state, f"{name}.{layer}", shape, bias=False)


def generator_state(resolution, ch, chunk, shared_dim=8, n_classes=5, hier=True, attention=None):
    """`G_ema.pth`; `shared_dim` 0 is without a shared embedding, `attention` a block's index."""
    state = {}
    widths = [(ch * i, ch * o) for i, o in zip(G_IN[resolution], G_OUT[resolution], strict=True)]
    if shared_dim:
        state["shared.weight"] = torch.empty(n_classes, shared_dim)
    put(state, "linear", (16 * widths[0][0], chunk))
    for k, (i, o) in enumerate(widths):
        block = f"blocks.{k}.0"
        put(state, f"{block}.conv1", (o, i, 3, 3))
        put(state, f"{block}.conv2", (o, o, 3, 3))
        put(state, f"{block}.conv_sc", (o, i, 1, 1))
        for bn, channels in (("bn1", i), ("bn2", o)):
            for part in ("gain", "bias"):
                if shared_dim:
                    shape = (channels, shared_dim + (chunk if hier else 0))
                    put(state, f"{block}.{bn}.{part}", shape, bias=False)
                else:
                    shape = (n_classes, channels)
                    put(state, f"{block}.{bn}.{part}", shape, bias=False, norm=False)
            state |= {f"{block}.{bn}.stored_{m}": torch.empty(channels) for m in ("mean", "var")}
        if k == attention:
            put_attention(state, f"blocks.{k}.1", o)
    for part in ("gain", "bias", "stored_mean", "stored_var"):
        state[f"output_layer.0.{part}"] = torch.empty(widths[-1][1])
    put(state, "output_layer.2", (3, widths[-1][1], 3, 3))
    return draw(state)


def discriminator_state(resolution, ch, n_classes=5, attention=None):
    """`D.pth`."""
    state = {}
    for k, (i, o) in enumerate(zip(D_IN[resolution], D_OUT[resolution], strict=True)):
        i, o = i * ch or 3, o * ch
        put(state, f"blocks.{k}.0.conv1", (o, i, 3, 3))
        put(state, f"blocks.{k}.0.conv2", (o, o, 3, 3))
        if k < downsamplings(resolution) or i != o:
            put(state, f"blocks.{k}.0.conv_sc", (o, i, 1, 1))
        if k == attention:
            put_attention(state, f"blocks.{k}.1", o)
    put(state, "linear", (1, o))
    put(state, "embed", (n_classes, o), bias=False)
    return draw(state)


def downsamplings(resolution):
    return 2 if resolution == 32 else len(D_OUT[resolution]) - 1


def deep_hf(ch=4, z_dim=6, n_classes=5, n_stats=51):
    """`pytorch_model.bin` of 128 pixels, and its `config.json`."""
    state = {"embeddings.weight": torch.empty(z_dim, n_classes)}

    def sn(name, shape, bias=True):
        if bias:
            state[f"{name}.bias"] = torch.empty(shape[0])
        state[f"{name}.weight_orig"] = torch.empty(shape)
        state[f"{name}.weight_u"] = torch.empty(shape[0])
        state[f"{name}.weight_v"] = torch.empty(math.prod(shape[1:]))

    def moments(name, channels):
        state[f"{name}.running_means"] = torch.empty(n_stats, channels)
        state[f"{name}.running_vars"] = torch.empty(n_stats, channels)

    sn("generator.gen_z", (16 * 16 * ch, 2 * z_dim))
    for k, (_, i, o) in enumerate(DEEP_LAYERS):
        layer, i, o = f"generator.layers.{k + (k >= 8)}", i * ch, o * ch
        m = i // 4
        for j, shape in enumerate([(m, i, 1, 1), (m, m, 3, 3), (m, m, 3, 3), (o, m, 1, 1)]):
            moments(f"{layer}.bn_{j}", shape[1])
            sn(f"{layer}.bn_{j}.scale", (shape[1], 2 * z_dim), bias=False)
            sn(f"{layer}.bn_{j}.offset", (shape[1], 2 * z_dim), bias=False)
            sn(f"{layer}.conv_{j}", shape)
    attended = 2 * ch
    state["generator.layers.8.gamma"] = torch.empty(1)
    for part, shape in (
        ("theta", (attended // 8, attended, 1, 1)),
        ("phi", (attended // 8, attended, 1, 1)),
        ("g", (attended // 2, attended, 1, 1)),
        ("o_conv", (attended, attended // 2, 1, 1)),
    ):
        sn(f"generator.layers.8.snconv1x1_{part}", shape, bias=False)
    state |= {"generator.bn.weight": torch.empty(ch), "generator.bn.bias": torch.empty(ch)}
    moments("generator.bn", ch)
    sn("generator.conv_to_rgb", (ch, ch, 3, 3))
    config = {
        "output_dim": 128,
        "z_dim": z_dim,
        "class_embed_dim": z_dim,
        "channel_width": ch,
        "num_classes": n_classes,
        "layers": DEEP_LAYERS,
        "attention_layer_position": 8,
        "eps": 1e-4,
        "n_stats": n_stats,
    }
    return draw(state), config


# What the originals compute.


def sn_weight(state, name):
    W, u = state[f"{name}.weight"].flatten(1), state[f"{name}.u0"][0]
    v = W.T @ u / (W.T @ u).norm()
    u = W @ v / (W @ v).norm()
    return state[f"{name}.weight"] / (u @ W @ v)


def conv(state, name, x, weight=sn_weight):
    W = weight(state, name)
    return F.conv2d(x, W, state.get(f"{name}.bias"), padding=W.shape[-1] // 2)


def attend(state, name, x, names=("theta", "phi", "g", "o"), weight=sn_weight):
    theta, phi, g, o = names
    query = conv(state, f"{name}.{theta}", x, weight).flatten(2)
    key = F.max_pool2d(conv(state, f"{name}.{phi}", x, weight), 2).flatten(2)
    value = F.max_pool2d(conv(state, f"{name}.{g}", x, weight), 2).flatten(2)
    beta = torch.einsum("ncq,nck->nqk", query, key).softmax(2)
    attended = torch.einsum("nck,nqk->ncq", value, beta).reshape(len(x), -1, *x.shape[2:])
    return x + state[f"{name}.gamma"] * conv(state, f"{name}.{o}", attended, weight)


def normalized(x, mean, var, eps, gain, bias):
    def wide(v):
        return v[..., None, None]

    return (x - wide(mean)) / wide((var + eps).sqrt()) * wide(gain) + wide(bias)


def conditional_norm(state, name, x, condition):
    if condition.is_floating_point():
        gain, bias = (condition @ sn_weight(state, f"{name}.{p}").T for p in ("gain", "bias"))
    else:
        gain, bias = (state[f"{name}.{part}.weight"][condition] for part in ("gain", "bias"))
    moments = state[f"{name}.stored_mean"], state[f"{name}.stored_var"]
    return normalized(x, *moments, 1e-5, 1 + gain, bias)


def double(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def generate(state, z, ids):
    """Images of BigGAN-PyTorch's generator, before tanh."""
    chunk = state["linear.weight"].shape[1]
    first, *rest = z.split(chunk, 1)
    y = state["shared.weight"][ids] if "shared.weight" in state else ids
    h = F.linear(first, sn_weight(state, "linear"), state["linear.bias"]).reshape(len(z), -1, 4, 4)
    k = 0
    while f"blocks.{k}.0.conv1.weight" in state:
        block, condition = f"blocks.{k}.0", torch.cat([y, rest[k]], 1) if rest else y
        x = double(h)
        h = double(F.relu(conditional_norm(state, f"{block}.bn1", h, condition)))
        h = F.relu(
            conditional_norm(state, f"{block}.bn2", conv(state, f"{block}.conv1", h), condition)
        )
        h = conv(state, f"{block}.conv2", h) + conv(state, f"{block}.conv_sc", x)
        if f"blocks.{k}.1.gamma" in state:
            h = attend(state, f"blocks.{k}.1", h)
        k += 1
    parts = (state[f"output_layer.0.{part}"] for part in ("stored_mean", "stored_var"))
    affine = (state[f"output_layer.0.{part}"] for part in ("gain", "bias"))
    return conv(state, "output_layer.2", F.relu(normalized(h, *parts, 1e-5, *affine)))


def judge(state, images, ids):
    """Logits of BigGAN-PyTorch's discriminator."""
    h, k = images, 0
    while f"blocks.{k}.0.conv1.weight" in state:
        block, x = f"blocks.{k}.0", h
        h = conv(state, f"{block}.conv1", F.relu(h) if k else h)
        h = conv(state, f"{block}.conv2", F.relu(h))
        if f"{block}.conv_sc.weight" in state:
            x = conv(state, f"{block}.conv_sc", x)
        if k < downsamplings(images.shape[2]):
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h = h + x
        if f"blocks.{k}.1.gamma" in state:
            h = attend(state, f"blocks.{k}.1", h)
        k += 1
    h = F.relu(h).sum((2, 3))
    linear = F.linear(h, sn_weight(state, "linear"), state["linear.bias"])[:, 0]
    return linear + (sn_weight(state, "embed")[ids] * h).sum(1)


def fixed_weight(state, name):
    W, u, v = (state[f"{name}.weight_{part}"] for part in ("orig", "u", "v"))
    return W / (u @ W.flatten(1) @ v)


def deep_moments(state, name, truncations):
    """Means and variances of a batch norm, `[N, C]`."""
    for kind in ("means", "vars"):
        table, rows = state[f"{name}.running_{kind}"], []
        for truncation in truncations:
            share, k = math.modf(truncation / (1.0 / (len(table) - 1)))
            k = int(k)  # The two weights are swapped, as the original has it.
            rows.append(table[k] * share + table[k + 1] * (1 - share) if share else table[k])
        yield torch.stack(rows)


def generate_deep(state, z, ids, truncations):
    """Images of pytorch-pretrained-BigGAN, before tanh, each at a truncation."""
    condition = torch.cat([z, state["embeddings.weight"][:, ids].T], 1)

    def norm(name, x):
        gain, bias = (condition @ fixed_weight(state, f"{name}.{p}").T for p in ("scale", "offset"))
        return F.relu(normalized(x, *deep_moments(state, name, truncations), 1e-4, 1 + gain, bias))

    h = F.linear(condition, fixed_weight(state, "generator.gen_z"), state["generator.gen_z.bias"])
    h = h.reshape(len(z), 4, 4, -1).permute(0, 3, 1, 2)
    for k, (up, _, _) in enumerate(DEEP_LAYERS):
        if k == 8:
            names = [f"snconv1x1_{part}" for part in ("theta", "phi", "g", "o_conv")]
            h = attend(state, "generator.layers.8", h, names, fixed_weight)
        layer, x = f"generator.layers.{k + (k >= 8)}", h
        for j in range(4):
            h = norm(f"{layer}.bn_{j}", h)
            if up and j == 1:
                h = double(h)
            h = conv(state, f"{layer}.conv_{j}", h, fixed_weight)
        x = x[:, : h.shape[1]]
        h = h + (double(x) if up else x)
    affine = state["generator.bn.weight"], state["generator.bn.bias"]
    h = F.relu(normalized(h, *deep_moments(state, "generator.bn", truncations), 1e-4, *affine))
    return conv(state, "generator.conv_to_rgb", h, fixed_weight)[:, :3]


def assert_same(ours, before_tanh, atol):
    assert 0.01 < before_tanh.std() < 3  # Neither blank nor saturated.
    assert (ours - before_tanh.tanh()).abs().max() <= atol


RECIPES = {
    "32": {"resolution": 32, "ch": 4, "chunk": 5, "attention": 1},
    "64": {"resolution": 64, "ch": 2, "chunk": 4, "attention": 2},
    "128": {"resolution": 128, "ch": 4, "chunk": 3, "attention": 3},
    "shared": {"resolution": 32, "ch": 4, "chunk": 12, "hier": False},
    "cifar": {"resolution": 32, "ch": 4, "chunk": 12, "shared_dim": 0, "hier": False},
    "cifar-64": {"resolution": 64, "ch": 2, "chunk": 9, "shared_dim": 0, "attention": 2},
}


@pytest.fixture(params=RECIPES)
def g_state(request):
    return generator_state(**RECIPES[request.param])


@torch.no_grad()
def test_the_generators_images_are_the_originals(g_state):
    G = read_generator(g_state)
    z, ids = torch.randn(3, G.z_dim), torch.tensor([0, 4, 2])
    assert_same(G(z, ids), generate(g_state, z, ids), 1e-5)


def test_what_a_generator_is_like_is_read_off_its_weights():
    G = read_generator(generator_state(**RECIPES["128"]))
    assert (G.resolution, G.channels, G.n_classes, G.z_dim) == (128, 3, 5, 18)
    assert G.config == ModelConfig(ch_g=4, ch_d=4, z_dim=18, shared_dim=8, attention=(64,))
    assert original_flags(G) == (
        "--model BigGAN --G_ch 4 --dim_z 18 --shared_dim 8 --G_attn 64 --BN_eps 1e-05"
        " --SN_eps 1e-06 --G_shared --hier"
    )
    plain = read_generator(generator_state(**RECIPES["cifar"])).config
    assert (plain.shared, plain.hierarchical, plain.attention) == (False, False, ())
    assert not read_generator(generator_state(**RECIPES["shared"])).config.hierarchical


def assert_same_state(written, state):
    assert written.keys() == state.keys()
    for key, value in state.items():
        if key.endswith("sv0"):
            W = state[key.replace("sv0", "weight")].flatten(1)
            assert written[key].item() == pytest.approx(
                (state[key.replace("sv0", "u0")] @ W).norm()
            )
        else:
            assert torch.equal(written[key], value), key


def test_what_is_written_is_what_was_read(g_state):
    assert_same_state(write_generator(read_generator(g_state)), g_state)
    ours = {"module." + key: value for key, value in g_state.items()}
    unwrapped = read_state(saved({"state_dict": ours}), "file")
    assert_same_state(write_generator(read_generator(unwrapped)), g_state)


@pytest.mark.parametrize("architecture", ["biggan", "biggan-deep"])
def test_networks_of_ours_come_back_the_same(architecture):
    shape = {"resolution": 64, "channels": 3, "n_classes": 5}
    config = ModelConfig(
        architecture=architecture, ch_g=8, ch_d=8, z_dim=10, shared_dim=6, attention=(32,)
    )
    G, D = Generator(config, **shape), Discriminator(config, **shape)
    written = write_generator(G), write_discriminator(D)
    again = read_generator(written[0]), read_discriminator(written[1])
    assert again[0].config == config
    for before, back in zip((G, D), again, strict=True):
        for key, value in before.state_dict().items():
            assert torch.equal(back.state_dict()[key], value), key
    if architecture == "biggan-deep":  # Which its D lists stage by stage, its G block by block.
        assert "blocks.5.0.conv4.weight" in written[0]
        assert "blocks.5.1.gamma" in written[0]
        assert "blocks.3.1.conv4.weight" in written[1]
        assert "blocks.0.2.gamma" in written[1]


def test_moments_under_the_names_of_other_batch_norms():
    state = generator_state(**RECIPES["shared"])
    mybn, synchronized = {}, {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf.startswith("stored_"):
            mybn[f"{module}.bn.{leaf}"] = 4 * value
            mybn[f"{module}.bn.accumulation_counter"] = torch.tensor([4.0])
            synchronized[f"{module}.bn.running_{leaf[7:]}"] = value
        else:
            mybn[key] = synchronized[key] = value
    for other in (mybn, synchronized):
        assert_same_state(write_generator(read_generator(other)), state)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(32, 4, None), (64, 2, 1)])
def test_the_discriminators_logits_are_the_originals(shape):
    resolution, ch, attention = shape
    ch = ch if attention is None else 4
    state = discriminator_state(resolution, ch, attention=attention)
    D = read_discriminator(state)
    assert (D.resolution, D.n_classes, D.config.ch_d) == (resolution, 5, ch)
    images, ids = torch.rand(3, 3, resolution, resolution) * 2 - 1, torch.tensor([3, 0, 3])
    expected = judge(state, images, ids)
    assert expected.std() > 0.01
    assert torch.allclose(D(images, ids), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    assert_same_state(write_discriminator(D), state)


@torch.no_grad()
def test_deep_images_are_the_originals():
    state, config = deep_hf()
    before = {key: value.clone() for key, value in state.items()}
    G = read_deep_hf(state, config)
    truncations = [0.02, 0.37, 0.38, 0.513, 0.999, 1.0]
    z, ids = torch.randn(6, 6), torch.arange(6) % 5
    assert_same(G(z, ids, truncations), generate_deep(state, z, ids, truncations), 1e-4)
    assert torch.equal(G(z[:2], ids[:2]), G(z[:2], ids[:2], 1.0))
    assert all(torch.equal(value, before[key]) for key, value in state.items())
    assert G.config.attention == (64,)


def test_deep_moments_are_the_originals_at_every_truncation():
    state, config = deep_hf()
    norm = read_deep_hf(state, config).blocks[3].bn2.norm
    truncations = [i * 0.02 for i in range(1, 51)] + [0.01, 0.37, 0.513, 0.999]
    tables = torch.cat([norm.table_var, norm.running_var[None]])
    mix = TruncationTables(truncations=[i / 50 for i in range(51)], convention="scale")
    _, expected = deep_moments(state, "generator.layers.3.bn_1", truncations)
    assert torch.allclose(mix.mix(truncations) @ tables, expected, rtol=1e-6)


# What does not fit.


def changed(state, key, value):
    """The state with a key cut to a shape, renamed to a text, or dropped (None)."""
    state = dict(state)
    tensor = state.pop(key)
    if isinstance(value, str):
        state[value] = tensor
    elif value is not None:
        state[key] = torch.zeros(value)
    return state


@pytest.mark.parametrize(
    "key,value,said",
    [
        ("linear.bias", None, r"linear.bias is missing: expected it with shape \[256\]"),
        ("linear.u0", (1, 7), r"linear.u0 has shape \[1, 7\]: expected \[1, 256\]"),
        (
            "blocks.1.0.conv2.weight",
            (16, 16, 5, 5),
            r"blocks.1.0.conv2.weight has shape \[16, 16, 5, 5\]: expected \[16, 16, 3, 3\]",
        ),
        ("blocks.2.0.bn2.gain.weight", "odd", "blocks.2.0.bn2.gain.weight is missing"),
        ("linear.sv0", "linear.u1", r"linear.u1, of shape \[1\], has no place"),
        (
            "blocks.0.0.bn1.gain.weight",
            (16, 9),
            r"bn1.gain.weight has shape \[16, 9\]: expected \[16, 8\] or, .* \[16, 13\]",
        ),
        (
            "blocks.0.0.conv1.weight",
            (16, 15, 3, 3),
            r"conv1.weight has shape \[16, 15, 3, 3\]: expected a multiple of 4 along axis 1",
        ),
        ("shared.weight", None, "shared.weight is missing"),
        ("linear.sv0", "blocks.9.1.gamma", r"blocks.9.1.gamma, of shape \[1\], has no place"),
        ("shared.weight", (5,), r"shared.weight has shape \[5\]: expected 2 dimensions"),
        (
            "blocks.2.0.conv1.weight",
            None,
            r"blocks.2.0.conv1.weight is missing: a list of 2 blocks makes no",
        ),
        ("output_layer.2.weight", None, "output_layer.2.weight is missing"),
    ],
)
def test_the_first_key_that_does_not_fit_is_named(key, value, said):
    state = generator_state(**RECIPES["32"])
    with pytest.raises(UserError, match=said):
        read_generator(changed(state, key, value))


@pytest.mark.parametrize(
    "key,value,said",
    [
        ("embed.weight", (5, 3), r"embed.weight has shape \[5, 3\]: expected \[5, 16\]"),
        ("blocks.3.0.conv2.bias", None, "blocks.3.0.conv2.bias is missing"),
        ("linear.bias", "output_layer.2.weight", "these are a generator's weights"),
    ],
)
def test_a_discriminator_that_does_not_fit(key, value, said):
    with pytest.raises(UserError, match=said):
        read_discriminator(changed(discriminator_state(32, 4), key, value))


@pytest.mark.parametrize(
    "change,key,said",
    [
        ({"num_classes": 9}, None, r"num_classes is 9, but embeddings.weight has shape \[6, 5\]"),
        ({"z_dim": 7}, None, r"z_dim is 7, but embeddings.weight has shape \[6, 5\]"),
        ({"channel_width": 8}, None, "channel_width is 8, but generator.bn.weight has shape"),
        ({"n_stats": 11}, None, "n_stats is 11, but generator.bn.running_means has shape"),
        ({"output_dim": 256}, None, r"layers\[5\] is \[True, 8, 4\]"),
        ({"output_dim": 64}, None, "output_dim is 64, expected one of"),
        ({"layers": DEEP_LAYERS[:9]}, None, r"layers\[9\] is None, expected \[True, 2, 1\]"),
        ({"attention_layer_position": 6}, None, "is 6, but the weights have generator.layers.8"),
        ({"attention_layer_position": 7}, None, "is 7: expected an even number"),
        ({"eps": "much"}, None, "config: eps = 'much'"),
        ({}, "generator.layers.9.conv_1.weight_v", "layers.9.conv_1.weight_v is missing"),
        ({}, "generator.layers.8.gamma", "the weights have no attention"),
    ],
)
def test_deep_weights_and_config_that_disagree(change, key, said):
    state, config = deep_hf(n_stats=3)
    state.pop(key, None)
    with pytest.raises(UserError, match=said):
        read_deep_hf(state, config | change)


@pytest.mark.parametrize(
    "changes,shape,said",
    [
        ({}, (32, 1), "images of 1 channels"),
        ({}, (16, 3), "of 16 pixels"),
        ({"channel_attention": (16,)}, (32, 3), r"channel attention, here at \(16,\)"),
        ({"attention": (64,)}, (64, 3), "attention on 4 channels"),
    ],
)
def test_what_the_format_has_no_place_for(changes, shape, said):
    config = ModelConfig(ch_g=2, ch_d=2, z_dim=60, **changes)
    G = Generator(config, resolution=shape[0], channels=shape[1], n_classes=3)
    with pytest.raises(UserError, match=said):
        write_generator(G)


def test_what_the_format_has_no_place_for_in_other_networks():
    G = read_deep_hf(*deep_hf(n_stats=2))
    with pytest.raises(UserError, match="folded into the weights"):
        write_generator(G)
    config = ModelConfig(ch_g=4, ch_d=4, z_dim=60, attention=(8,))
    D = Discriminator(config, resolution=32, channels=3, n_classes=3)
    with pytest.raises(UserError, match="attention at 8 in a discriminator of 32 pixels"):
        write_discriminator(D)


# Through the store.


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.fixture
def files(storage, tmp_path):
    """A generator and a discriminator of BigGAN-PyTorch, and class names."""
    torch.save(generator_state(32, 2, 12, 0, 3, False), tmp_path / "G_ema.pth")
    torch.save(discriminator_state(32, 4, n_classes=3), tmp_path / "D.pth")
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    return tmp_path


def test_import_by_command_and_export(files):
    flags = ["--format", "biggan-pytorch", "--weights", f"{files}/G_ema.pth", "--name", "theirs"]
    more = ["--discriminator", f"{files}/D.pth", "--classes", f"{files}/names.txt"]
    said = job("import_weights", *flags, *more, "--licence", "MIT").stdout
    assert "model theirs@v1: biggan of 32 pixels, ch 2, z 12, 3 classes, with its discr" in said
    card = load_card(ModelStore("theirs").folder / "v1")
    assert card.licence == "MIT"
    assert card.fid is None
    assert (card.imported["format"], card.imported["weights"]) == ("biggan-pytorch", "G_ema.pth")
    assert len(card.imported["sha256"]) == 64
    G = biggan.load_generator("theirs")
    assert G.class_names == ["cat", "dog", "owl"]
    assert G.sample([0, 2], seed=1, truncation=0.5).shape == (2, 32, 32, 3)
    assert (ModelStore("theirs").folder / "v1").exists("samples.png")
    assert load_discriminator("theirs")(torch.zeros(1, 3, 32, 32), torch.tensor([2])).shape == (1,)

    said = export_weights("theirs@v1", f"{files}/out")
    assert said["G_ema.pth"].startswith("--model BigGAN --G_ch 2 --dim_z 12")
    for name in ("G_ema.pth", "D.pth"):
        written, given = (torch.load(files / part / name) for part in ("out", ""))
        assert_same_state(written, given)


def test_best_stays_unless_forced(files):
    def put_in(**changes):
        given = WeightFiles("biggan-pytorch", f"{files}/G_ema.pth", bn_eps=changes.pop("eps", None))
        return import_weights(given, "moving", **changes)

    assert put_in().is_best
    again = put_in(licence="MIT")
    assert (again.card.version, again.is_best, again.card.licence) == ("v1", True, "MIT")
    torch.save(generator_state(32, 1, 12, 0, 3, False), files / "G_ema.pth")
    second = put_in(eps=1e-4)
    assert second.G.config.bn_eps == 1e-4
    assert (second.card.version, second.is_best) == ("v2", False)
    assert put_in(eps=1e-4, force=True).is_best
    assert put_in().card.version == "v3"
    with pytest.raises(UserError, match="moving has no discriminator"):
        load_discriminator("moving")


def test_deep_with_its_config_beside(storage, tmp_path):
    state, config = deep_hf(n_classes=2, n_stats=5)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    import_weights(WeightFiles("biggan-deep-hf", f"{tmp_path}/pytorch_model.bin"), "deep")
    G, expected = biggan.load_generator("deep"), read_deep_hf(state, config)
    z, ids = torch.randn(2, 6), torch.tensor([1, 0])
    assert torch.equal(G(z, ids, 0.3), expected(z, ids, 0.3))
    assert G.sample(1, truncation=0.4).shape == (1, 128, 128, 3)
    with pytest.raises(UserError, match="at most by 1"):
        G.sample(1, truncation=1.5)


class Malice:
    def __reduce__(self):
        return os.system, ("true",)


def test_files_that_are_refused(files):
    def put_in(**changes):
        given = {"format": "biggan-pytorch", "weights": f"{files}/G_ema.pth"} | changes
        import_weights(WeightFiles(**given), "never")

    torch.save({"a": Malice()}, files / "bad.pth")
    (files / "text.pth").write_text("hello")
    torch.save({"itr": 5}, files / "state_dict.pth")
    (files / "names.txt").write_text("cat\ndog\n")
    torch.save(discriminator_state(32, 4, n_classes=4), files / "D4.pth")
    for changes, said in (
        ({"weights": f"{files}/bad.pth"}, r"bad.pth is refused: .*(system|GLOBAL)"),
        ({"weights": f"{files}/text.pth"}, "text.pth is refused"),
        ({"weights": f"{files}/state_dict.pth"}, "holds no sets of weights"),
        ({"weights": f"{files}/nothing.pth"}, "--weights .*nothing.pth: cannot be read"),
        ({"weights": f"{files}/D.pth"}, "holds a discriminator: give it as --discriminator"),
        (
            {"discriminator": f"{files}/G_ema.pth"},
            "G_ema.pth: embed.weight is missing: these are a",
        ),
        ({"discriminator": f"{files}/D4.pth"}, "D4.pth: .*n_classes is 4, the generator's is 3"),
        ({"classes": f"{files}/names.txt"}, "names.txt names 2 classes; the generator has 3"),
        ({"config": "config.json"}, "config = config.json: biggan-pytorch has none"),
        ({"format": "biggan-deep-hf"}, "--config .*config.json: cannot be read"),
    ):
        with pytest.raises(UserError, match=said):
            put_in(**changes)
    assert ModelStore("never").versions() == []


# Against the originals.


@pytest.fixture
def original(monkeypatch):
    """Modules of BigGAN-PyTorch, whose names at the top level are `layers`, `utils` and so on."""
    checkout = os.environ.get("BIGGAN_PYTORCH")
    if not checkout:
        pytest.skip("BIGGAN_PYTORCH does not name a checkout of ajbrock/BigGAN-PyTorch")
    monkeypatch.syspath_prepend(checkout)
    names = {path.stem for path in Path(checkout).glob("*.py")} | {"sync_batchnorm"}
    kept = {name: sys.modules.pop(name) for name in names & {*sys.modules}}
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]
    sys.modules.update(kept)


ORIGINALS = [
    (model, resolution, flags)
    for model, resolutions in (("BigGAN", (32, 64, 128, 256)), ("BigGANdeep", (32, 64, 128, 256)))
    for resolution in resolutions
    for flags in (
        {"G_attn": "0", "D_attn": "0"},
        {"G_attn": "16_32" if resolution == 32 else "32_64", "D_attn": "32"},
    )
] + [("BigGAN", 32, {"G_attn": "0", "D_attn": "0", "G_shared": False, "hier": False})]


@torch.no_grad()
@pytest.mark.parametrize("model,resolution,flags", ORIGINALS)
def test_against_biggan_pytorch(original, model, resolution, flags):
    module = original(model)
    ch = 4 if resolution == 32 else 8
    # The deep one itself is 1e-5 from what it computes in float64.
    atol = 1e-4 if model == "BigGANdeep" else 1e-5
    settings = {"resolution": resolution, "n_classes": 7, "G_ch": ch, "D_ch": ch, "SN_eps": 1e-6}
    settings |= {"dim_z": 42, "shared_dim": 16, "G_shared": True, "hier": True, "no_optim": True}
    settings |= {"G_lr": 0.1, "D_lr": 0.1} | flags
    theirs = module.Generator(**settings).eval()
    for trained in (False, True):
        if trained:
            theirs.load_state_dict(draw(theirs.state_dict()))
        G = read_generator(theirs.state_dict())
        z, ids = torch.randn(2, G.z_dim), torch.tensor([6, 1])
        assert_close(G(z, ids), theirs(z, theirs.shared(ids)), atol, "images")
        theirs.load_state_dict(write_generator(G))
    theirs = module.Discriminator(**settings).eval()
    theirs.load_state_dict(draw(theirs.state_dict()))
    D = read_discriminator(theirs.state_dict())
    images = torch.rand(2, 3, resolution, resolution) * 2 - 1
    logits = theirs(images, ids)[:, 0]
    assert_close(D(images, ids), logits, 1e-5 * max(1, logits.abs().max()), "logits")
    theirs.load_state_dict(write_discriminator(D))


def assert_close(ours, theirs, atol, what):
    difference = (ours - theirs).abs().max().item()
    print(f"{what} up to {theirs.abs().max():.3g}, std {theirs.std():.3g}: {difference:.2g} apart")
    assert difference <= atol


@torch.no_grad()
@pytest.mark.parametrize("output_dim", [128, 256, 512])
def test_against_pytorch_pretrained_biggan(monkeypatch, output_dim):
    checkout = os.environ.get("BIGGAN_DEEP_HF")
    if not checkout:
        pytest.skip("BIGGAN_DEEP_HF does not name one of huggingface/pytorch-pretrained-BigGAN")
    theirs, config = deep_original(monkeypatch, checkout, output_dim)
    truncations = [i * 0.02 for i in range(1, 51)] + [0.37, 0.513] if output_dim == 128 else [0.4]
    for trained in (False, True):
        if trained:
            theirs.load_state_dict(draw(theirs.state_dict()))
        G = read_deep_hf(theirs.state_dict(), config)
        z, ids = torch.randn(len(truncations), G.z_dim), torch.arange(len(truncations)) % 7
        expected = torch.cat(
            [
                theirs(z[k : k + 1], F.one_hot(ids[k : k + 1], 7).float(), truncation)
                for k, truncation in enumerate(truncations)
            ]
        )
        assert_close(G(z, ids, truncations), expected, 1e-4, "images")


def deep_original(monkeypatch, checkout, output_dim):
    """A BigGAN of pytorch-pretrained-BigGAN, and its config, without what it downloads with."""
    package = types.ModuleType("pytorch_pretrained_biggan")
    package.__path__ = [f"{checkout}/pytorch_pretrained_biggan"]
    downloads = types.ModuleType("pytorch_pretrained_biggan.file_utils")
    downloads.cached_path = None
    for module in (package, downloads):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("model", "config"):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
    widths = (16, *DEEP_OUT[output_dim])
    config = importlib.import_module(f"{package.__name__}.config").BigGANConfig(
        output_dim=output_dim,
        z_dim=16,
        channel_width=4,
        num_classes=7,
        layers=[layer for i, o in pairwise(widths) for layer in ((False, i, i), (True, i, o))],
    )
    G = importlib.import_module(f"{package.__name__}.model").BigGAN(config).eval()
    G.generator.bn.weight.fill_(1.0)  # These two it leaves uninitialized.
    G.generator.bn.bias.fill_(0.0)
    G.train()
    for _ in range(3):  # In evaluation it never iterates on its random singular vectors.
        G(torch.randn(1, 16), F.one_hot(torch.tensor([0]), 7).float(), 1.0)
    G.eval()
    return G, config.to_dict()
