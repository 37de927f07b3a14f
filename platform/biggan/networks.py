"""The BigGAN generator and discriminator (arXiv 1809.11096, appendix B, figure 15 and tables 4-9).

G maps a latent and a class to an image in [-1, 1]; D maps an image and a class to a logit. Both
are residual networks whose widths are multiples of `ch`. Images of 32 pixels and below follow the
paper's CIFAR recipe: every block is 4 ch wide and D stops shrinking at 8 pixels. BigGAN-deep has
the same widths, with the blocks of `biggan.networks_deep`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from biggan.config import RESOLUTIONS, ConfigError, ModelConfig
from biggan.errors import UserError
from biggan.layers import (
    AffineBatchNorm2d,
    ChannelAttention,
    ConditionalBatchNorm2d,
    CrossReplicaBatchNorm2d,
    Recomputation,
    SelfAttention,
    SNConv2d,
    SNDownConv2d,
    SNEmbedding,
    SNLinear,
    SNUpConv2d,
    spectral_norms,
)
from biggan.networks_deep import DeepDBlock, DeepGBlock
from biggan.pixels import to_uint8
from biggan.truncation import TruncationTables

# Widths along the network in multiples of ch, by resolution: block i leads from entry i to i + 1.
G_WIDTHS = {
    512: (16, 16, 8, 8, 4, 2, 1, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    64: (16, 16, 8, 4, 2),
    32: (4, 4, 4, 4),
    16: (4, 4, 4),
    8: (4, 4),
}
# D's first block leads from the image's channels to the first entry.
D_WIDTHS = {
    512: (1, 1, 2, 4, 8, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
    128: (1, 2, 4, 8, 16, 16),
    64: (1, 2, 4, 8, 16),
    32: (4, 4, 4, 4),
    16: (4, 4, 4),
    8: (4, 4),
}
BASE = 4
"""Side of G's first feature map."""


def g_sides(resolution: int) -> list[int]:
    """Side of the feature map after each of G's stages: every stage doubles it."""
    return [BASE << (k + 1) for k in range(len(G_WIDTHS[resolution]) - 1)]


def d_sides(resolution: int, deep: bool = False) -> list[int]:
    """Side of the feature map after each of D's stages.

    A stage is a block, or two in BigGAN-deep. Every one halves the map, down to 4; images of 32
    pixels and below stop at 8. The deep D has a stem in the place of the first block.
    """
    floor = 8 if resolution <= 32 else BASE
    stages = len(D_WIDTHS[resolution]) - deep
    return [max(resolution >> (k + 1), floor) for k in range(stages)]


def check_model(config: ModelConfig, resolution: int) -> None:
    """Raise `ConfigError` unless networks of this configuration exist at this resolution."""
    if resolution not in RESOLUTIONS:
        raise ConfigError(f"resolution {resolution}: must be one of {RESOLUTIONS}")
    chunks = len(G_WIDTHS[resolution])
    if config.hierarchical and not config.deep and config.z_dim % chunks:
        near = max(round(config.z_dim / chunks), 1) * chunks
        raise ConfigError(
            f"model.z_dim = {config.z_dim}: at {resolution} pixels hierarchical z splits into"
            f" {chunks} equal chunks, so it must be a multiple of {chunks}: try {near}"
        )
    places = sorted({*g_sides(resolution), *d_sides(resolution, config.deep)})
    for field in ("attention", "channel_attention"):
        for side in getattr(config, field):
            if side not in places:
                raise ConfigError(
                    f"model.{field} = {getattr(config, field)}: no block of a {resolution}-pixel"
                    f" network ends at {side}; choose among {places}, or none"
                )


def _after_blocks(
    layer: Callable[[int, float], nn.Module],
    wanted: tuple[int, ...],
    sides: list[int],
    widths: list[int],
    config: ModelConfig,
) -> nn.ModuleDict:
    """Attention layers by index of the block each follows: that of the first stage at a side."""
    blocks_a_stage = 2 if config.deep else 1
    return nn.ModuleDict(
        {
            str((k + 1) * blocks_a_stage - 1): layer(widths[k], config.sn_eps)
            for k, side in enumerate(sides)
            if side in wanted and side not in sides[:k]
        }
    )


def _init_weights(network: nn.Module, init: str) -> None:
    """Fill convolution, linear and embedding weights; biases stay as torch makes them."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            if init == "orthogonal":
                nn.init.orthogonal_(module.weight)
            else:
                nn.init.normal_(module.weight, std=0.02)


class GBlock(nn.Module):
    """Residual block that doubles the resolution (figure 15b)."""

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        *,
        norm: Callable[[int], ConditionalBatchNorm2d],
        sn_eps: float,
    ) -> None:
        super().__init__()
        self.bn1 = norm(in_ch)
        self.conv1 = SNUpConv2d(in_ch, out_ch, 3, sn_eps)
        self.bn2 = norm(out_ch)
        self.conv2 = SNConv2d(out_ch, out_ch, 3, sn_eps)
        self.conv_sc = SNConv2d(in_ch, out_ch, 1, sn_eps)

    def forward(self, x: Tensor, condition: Tensor, mix: Tensor | None = None) -> Tensor:
        """Map `[N, in_ch, H, W]` to `[N, out_ch, 2 H, 2 W]` under `condition` `[N, cond_dim]`."""
        h: Tensor = self.conv1(self.bn1(x, condition, mix, relu=True))
        h = self.conv2(self.bn2(h, condition, mix, relu=True))
        # A 1x1 convolution and nearest upsampling commute; this order is a quarter of the work.
        return h.add_(F.interpolate(self.conv_sc(x), scale_factor=2))

    @property
    def idle_biases(self) -> tuple[list[SNConv2d], list[SNConv2d]]:
        """Convolutions whose bias the next batch norm takes out; those where a later one may."""
        return [self.conv1], [self.conv2, self.conv_sc]


class DBlock(nn.Module):
    """Residual block of D that may halve the resolution (figure 15c)."""

    def __init__(
        self, in_ch: int, out_ch: int, *, first: bool, downsample: bool, sn_eps: float
    ) -> None:
        super().__init__()
        self.first = first
        self.downsample = downsample
        self.conv1 = SNConv2d(in_ch, out_ch, 3, sn_eps)
        self.conv2 = (SNDownConv2d if downsample else SNConv2d)(out_ch, out_ch, 3, sn_eps)
        self.conv_sc = SNConv2d(in_ch, out_ch, 1, sn_eps) if downsample or in_ch != out_ch else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_ch, H, W]` to `[N, out_ch, H, W]`, H and W halved if it downsamples."""
        h: Tensor = x if self.first else F.relu(x)
        h = self.conv2(F.relu_(self.conv1(h)))
        if self.downsample:
            x = F.avg_pool2d(x, 2)  # Commutes with the 1x1 convolution; a quarter of its work.
        return h.add_(x if self.conv_sc is None else self.conv_sc(x))


class Generator(nn.Module):
    """G: (z, class) -> image.

    Attributes of use to callers: `z_dim`, `n_classes`, `resolution`, `channels`, and
    `class_names` (a name a class; the numbers as text until a dataset gives better ones).
    """

    recompute: bool = False
    """Whether training keeps only the blocks' inputs, and makes the rest anew in the backward."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        resolution: int,
        channels: int,
        n_classes: int,
    ) -> None:
        """Raises `ConfigError` if `config` does not fit the resolution."""
        super().__init__()
        check_model(config, resolution)
        widths = [config.ch_g * width for width in G_WIDTHS[resolution]]
        self.config = config
        self.z_dim, self.n_classes = config.z_dim, n_classes
        self.resolution, self.channels = resolution, channels
        self.class_names = [str(i) for i in range(n_classes)]
        split = config.hierarchical and not config.deep
        self.chunks = len(widths) if split else 1
        chunk = config.z_dim // self.chunks

        self.shared = nn.Embedding(n_classes, config.shared_dim) if config.shared else None
        cond_dim = config.shared_dim if config.shared else n_classes
        cond_dim += chunk if split else config.z_dim if config.deep else 0
        self.linear = SNLinear(
            cond_dim if config.deep else chunk, widths[0] * BASE**2, config.sn_eps
        )
        self.blocks = nn.ModuleList(_g_blocks(widths, cond_dim, config))
        place = partial(_after_blocks, sides=g_sides(resolution), widths=widths[1:], config=config)
        self.attention = place(SelfAttention, config.attention)
        self.channel_attention = place(ChannelAttention, config.channel_attention)
        self.bn_out = AffineBatchNorm2d(widths[-1])
        self.conv_out = SNConv2d(widths[-1], channels, 3, config.sn_eps)
        _init_weights(self, config.init)
        self._freeze_idle_biases()
        self.tables: TruncationTables | None = None

    def _freeze_idle_biases(self) -> None:
        """Keep biases that batch norm takes out again from drifting.

        A constant that a convolution adds to a channel reaches nothing but batch norms, unless
        attention looks at it on the way. The gradient of such a bias is zero but for rounding,
        which Adam would blow up into steps of full size, different on every machine.
        """
        last_attention = max(map(int, [*self.attention, *self.channel_attention]), default=-1)
        for k, block in enumerate(self.blocks):
            assert isinstance(block, GBlock | DeepGBlock)
            always, if_last = block.idle_biases
            for conv in always + (if_last if k > last_attention else []):
                assert conv.bias is not None
                conv.bias.requires_grad_(False)

    def add_tables(self, tables: TruncationTables) -> None:
        """Give every batch norm room for moments at several truncations, to be filled."""
        self.tables = tables
        for norm in self.batch_norms():
            norm.add_tables(len(tables.truncations))

    def batch_norms(self) -> list[CrossReplicaBatchNorm2d]:
        """Every batch norm, in the order of the forward."""
        return [m for m in self.modules() if isinstance(m, CrossReplicaBatchNorm2d)]

    def embed(self, classes: Tensor) -> Tensor:
        """Class embeddings of ids (int `[N]`) or mixtures (float `[N, n_classes]`).

        `[N, shared_dim]`; without a shared embedding the mixtures themselves, `[N, n_classes]`. A
        mixture weighs the embeddings: ``[0.5, 0.5, 0, ...]`` lies half-way between two classes.
        """
        if not classes.is_floating_point():
            if self.shared is not None:
                return F.embedding(classes, self.shared.weight)
            return F.one_hot(classes, self.n_classes).to(self.linear.weight.dtype)
        return classes if self.shared is None else classes @ self.shared.weight

    def forward(
        self,
        z: Tensor,
        classes: Tensor,
        truncation: float | Sequence[float | None] | None = None,
    ) -> Tensor:
        """Images in [-1, 1], float `[N, channels, resolution, resolution]`.

        `z` is float `[N, z_dim]`; `classes` are ids `[N]` or mixtures `[N, n_classes]`.
        `truncation` is that of z, one for all images or one for each: a model that has moments for
        several truncations (`tables`) takes the fitting ones.
        """
        return self.synthesize(z, self.embed(classes), truncation)

    def synthesize(
        self, z: Tensor, y: Tensor, truncation: float | Sequence[float | None] | None = None
    ) -> Tensor:
        """Images from latents `[N, z_dim]` and class embeddings as `embed` gives them."""
        one = truncation is None or isinstance(truncation, int | float)
        mix = self.mix([truncation] * len(z) if one else truncation)  # type: ignore[list-item, arg-type]
        return self.draw(z, y, None if mix is None else mix.to(z))

    def mix(self, truncations: Sequence[float | None]) -> Tensor | None:
        """How each image weighs the moments: `[N, tables + 1]`; None if it has no choice."""
        if self.tables is None or self.training:
            return None
        return self.tables.mix(truncations).to(self.device)

    def draw(self, z: Tensor, y: Tensor, mix: Tensor | None) -> Tensor:
        """`synthesize` with the weights of `mix`: tensors alone, for what compiles it."""
        first, *rest = z.chunk(self.chunks, dim=1)
        conditions = [torch.cat([y, part], 1) for part in rest] or [y] * len(self.blocks)
        if self.config.deep:
            first = torch.cat([y, z], 1)
            conditions = [first] * len(self.blocks)
        h = self.linear(first).unflatten(1, (-1, BASE, BASE))
        for k, (block, condition) in enumerate(zip(self.blocks, conditions, strict=True)):
            h = _run(block, self.recompute and self.training, h, condition, mix)
            for attention in (self.attention, self.channel_attention):
                if str(k) in attention:
                    h = attention[str(k)](h)
        return torch.tanh(self.conv_out(self.bn_out(h, mix, relu=True)))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.linear.weight.device

    def latents(self, seeds: Sequence[int], truncation: float | None = None) -> Tensor:
        """Latents for sampling, one a seed: float32 `[len(seeds), z_dim]`; raises `UserError`."""
        tables = self.tables or TruncationTables(truncations=())
        return tables.latents(seeds, self.z_dim, truncation)

    def fold_spectral_norms(self) -> None:
        """Make every normalized weight the weight: nothing is estimated in a forward any more."""
        for layer in spectral_norms(self).values():
            layer.fold()

    def freeze(self) -> None:
        """For generating alone: compute ahead whatever follows from weights, which now stay."""
        for layer in spectral_norms(self).values():
            layer.freeze_weight()

    @property
    def sample_batch(self) -> int:
        """Images generated at a time outside training: 256 up to 128 pixels, then fewer."""
        return max(1, 256 * 128**2 // max(self.resolution, 128) ** 2)

    def sample(
        self,
        class_ids: int | Sequence[int],
        seed: int | Sequence[int] = 0,
        truncation: float | None = None,
    ) -> np.ndarray:
        """Images of the given classes: uint8 `[N, resolution, resolution, channels]`.

        Image i comes from seed `seed + i`, or `seed[i]` where seeds are given one by one. A seed,
        class and truncation give the same image (to within one grey level) whatever the batch.
        `truncation` t keeps the latent's components in [-t, t] (smaller: more typical, less
        varied); None is no truncation. Seeds are 0 to 2^63 - 1. Raises `UserError` for a class,
        seed or truncation out of range, for no classes, and unless there is a seed an image.
        """
        ids = [class_ids] if isinstance(class_ids, int) else list(class_ids)
        if not ids:
            raise UserError("no classes given: name one for each image")
        seeds = range(seed, seed + len(ids)) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(ids):
            raise UserError(f"{len(seeds)} seeds for {len(ids)} images: give one seed an image")
        self.check_classes(ids)
        z = self.latents(seeds, truncation)
        return self.render(z, torch.tensor(ids), [truncation] * len(ids))

    def check_classes(self, ids: Sequence[int]) -> None:
        """Raise `UserError` unless all are classes of this generator."""
        for class_id in ids:
            if not 0 <= class_id < self.n_classes:
                raise UserError(f"class {class_id} is not in 0..{self.n_classes - 1}")

    @torch.inference_mode()
    def render(self, z: Tensor, classes: Tensor, truncations: Sequence[float | None]) -> np.ndarray:
        """Images of latents `[N, z_dim]`, classes `[N]` and truncations: uint8 `[N, H, W, C]`.

        At most `sample_batch` at a time, on the generator's device.
        """
        return self.render_embedded(z, self.embed(classes.to(self.device)), truncations)

    @torch.inference_mode()
    def render_embedded(
        self, z: Tensor, y: Tensor, truncations: Sequence[float | None]
    ) -> np.ndarray:
        """As `render`, from class embeddings as `embed` gives them."""
        images = []
        for start in range(0, len(z), self.sample_batch):
            part = slice(start, start + self.sample_batch)
            generated = self.synthesize(
                z[part].to(self.device), y[part].to(self.device), truncations[part]
            )
            images.append(to_uint8(generated).cpu())
        return torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy()


class Discriminator(nn.Module):
    """D: (image, class) -> logit, with the projection of Miyato and Koyama 2018."""

    recompute: bool = False
    """Whether training keeps only the blocks' inputs, and makes the rest anew in the backward."""

    def __init__(
        self, config: ModelConfig, *, resolution: int, channels: int, n_classes: int
    ) -> None:
        """Raises `ConfigError` if `config` does not fit the resolution."""
        super().__init__()
        check_model(config, resolution)
        self.config = config
        self.resolution, self.channels, self.n_classes = resolution, channels, n_classes
        widths = [config.ch_d * width for width in D_WIDTHS[resolution]]
        sides = d_sides(resolution, config.deep)
        self.stem = SNConv2d(channels, widths[0], 3, config.sn_eps) if config.deep else None
        self.blocks = nn.ModuleList(_d_blocks(widths, channels, [resolution, *sides], config))
        stage_widths = widths[1:] if config.deep else widths
        place = partial(_after_blocks, sides=sides, widths=stage_widths, config=config)
        self.attention = place(SelfAttention, config.attention)
        self.channel_attention = place(ChannelAttention, config.channel_attention)
        self.linear = SNLinear(widths[-1], 1, config.sn_eps)
        self.embed = SNEmbedding(n_classes, widths[-1], config.sn_eps)
        _init_weights(self, config.init)

    def forward(self, images: Tensor, class_ids: Tensor) -> Tensor:
        """Logits `[N]` for images `[N, C, H, W]` in [-1, 1] under classes `[N]`."""
        h = images if self.stem is None else self.stem(images)
        for k, block in enumerate(self.blocks):
            h = _run(block, self.recompute and self.training, h)
            for attention in (self.attention, self.channel_attention):
                if str(k) in attention:
                    h = attention[str(k)](h)
        # Sums over many positions: half precision would lose what tells images apart.
        features = F.relu(h).sum((2, 3), dtype=torch.promote_types(h.dtype, torch.float32))
        with torch.autocast(h.device.type, enabled=False):
            realness: Tensor = self.linear(features).squeeze(1)
            projection: Tensor = (self.embed(class_ids) * features).sum(1)
            return realness + projection


def _g_blocks(widths: list[int], cond_dim: int, config: ModelConfig) -> list[nn.Module]:
    norm = partial(
        ConditionalBatchNorm2d,
        cond_dim=cond_dim,
        bn_eps=config.bn_eps,
        sn_eps=config.sn_eps,
        shared=config.shared,
    )
    if not config.deep:
        return [GBlock(i, o, norm=norm, sn_eps=config.sn_eps) for i, o in pairwise(widths)]
    return [
        DeepGBlock(i, out, upsample=upsample, norm=norm, sn_eps=config.sn_eps)
        for i, o in pairwise(widths)
        for out, upsample in ((i, False), (o, True))
    ]


def _d_blocks(
    widths: list[int], channels: int, sides: list[int], config: ModelConfig
) -> list[nn.Module]:
    """D's blocks between the given sides of the feature map, from the image's own on."""
    halves = [before != after for before, after in pairwise(sides)]
    eps = config.sn_eps
    if not config.deep:
        stages = enumerate(zip(pairwise([channels, *widths]), halves, strict=True))
        return [DBlock(i, o, first=k == 0, downsample=h, sn_eps=eps) for k, ((i, o), h) in stages]
    return [
        DeepDBlock(i, out, downsample=down, sn_eps=eps)
        for (before, out), half in zip(pairwise(widths), halves, strict=True)
        for i, down in ((before, half), (out, False))
    ]


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), Recomputation()


def _run(block: nn.Module, recompute: bool, *inputs: Tensor | None) -> Tensor:
    """A block's output; with `recompute`, all inside is made anew in the backward pass."""
    if not (recompute and torch.is_grad_enabled()):
        out: Tensor = block(*inputs)
        return out
    again: Tensor
    if torch.compiler.is_compiling():  # It knows no contexts, and by itself moves moments once.
        again = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        again = checkpoint(
            block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts
        )
    return again
