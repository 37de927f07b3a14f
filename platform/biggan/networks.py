"""The BigGAN generator and discriminator (arXiv 1809.11096, appendix B, figure 15 and tables 4-9).

G maps a latent and a class to an image in [-1, 1]; D maps an image and a class to a logit. Both
are residual networks whose widths are multiples of `ch`. Images of 32 pixels and below follow the
paper's CIFAR recipe: every block is 4 ch wide and D stops shrinking at 8 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biggan.config import RESOLUTIONS, ConfigError, ModelConfig
from biggan.errors import UserError
from biggan.latents import sample_z
from biggan.layers import (
    AffineBatchNorm2d,
    ConditionalBatchNorm2d,
    SelfAttention,
    SNConv2d,
    SNDownConv2d,
    SNEmbedding,
    SNLinear,
    SNUpConv2d,
)
from biggan.pixels import to_uint8

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
    """Side of the feature map after each of G's blocks: every block doubles it."""
    return [BASE << (k + 1) for k in range(len(G_WIDTHS[resolution]) - 1)]


def d_sides(resolution: int) -> list[int]:
    """Side of the feature map after each of D's blocks.

    Every block but the last halves it, down to 4; images of 32 pixels and below stop at 8.
    """
    floor = 8 if resolution <= 32 else BASE
    return [max(resolution >> (k + 1), floor) for k in range(len(D_WIDTHS[resolution]))]


def check_model(config: ModelConfig, resolution: int) -> None:
    """Raise `ConfigError` unless networks of this configuration exist at this resolution."""
    if resolution not in RESOLUTIONS:
        raise ConfigError(f"resolution {resolution}: must be one of {RESOLUTIONS}")
    chunks = len(G_WIDTHS[resolution])
    if config.hierarchical and config.z_dim % chunks:
        near = max(round(config.z_dim / chunks), 1) * chunks
        raise ConfigError(
            f"model.z_dim = {config.z_dim}: at {resolution} pixels hierarchical z splits into"
            f" {chunks} equal chunks, so it must be a multiple of {chunks}: try {near}"
        )
    places = sorted({*g_sides(resolution), *d_sides(resolution)})
    for side in config.attention:
        if side not in places:
            raise ConfigError(
                f"model.attention = {config.attention}: no block of a {resolution}-pixel network"
                f" ends at {side}; choose among {places}, or none"
            )


def _attention(sides: list[int], widths: list[int], config: ModelConfig) -> nn.ModuleDict:
    """Self-attention layers by index of the block that each follows: the first to end at a side."""
    return nn.ModuleDict(
        {
            str(k): SelfAttention(widths[k], config.sn_eps)
            for k, side in enumerate(sides)
            if side in config.attention and side not in sides[:k]
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

    def __init__(self, in_ch: int, out_ch: int, cond_dim: int, config: ModelConfig) -> None:
        super().__init__()
        eps = config.sn_eps
        self.bn1 = ConditionalBatchNorm2d(in_ch, cond_dim, config.bn_eps, eps)
        self.conv1 = SNUpConv2d(in_ch, out_ch, 3, eps)
        self.bn2 = ConditionalBatchNorm2d(out_ch, cond_dim, config.bn_eps, eps)
        self.conv2 = SNConv2d(out_ch, out_ch, 3, eps)
        self.conv_sc = SNConv2d(in_ch, out_ch, 1, eps)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map `[N, in_ch, H, W]` to `[N, out_ch, 2 H, 2 W]` under `condition` `[N, cond_dim]`."""
        h: Tensor = self.conv1(F.relu(self.bn1(x, condition)))
        h = self.conv2(F.relu(self.bn2(h, condition)))
        # A 1x1 convolution and nearest upsampling commute; this order is a quarter of the work.
        return h + F.interpolate(self.conv_sc(x), scale_factor=2)


class DBlock(nn.Module):
    """Residual block of D that may halve the resolution (figure 15c)."""

    def __init__(
        self, in_ch: int, out_ch: int, *, first: bool, downsample: bool, config: ModelConfig
    ) -> None:
        super().__init__()
        self.first = first
        self.downsample = downsample
        self.conv1 = SNConv2d(in_ch, out_ch, 3, config.sn_eps)
        conv2 = SNDownConv2d if downsample else SNConv2d
        self.conv2 = conv2(out_ch, out_ch, 3, config.sn_eps)
        self.conv_sc = (
            SNConv2d(in_ch, out_ch, 1, config.sn_eps) if downsample or in_ch != out_ch else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_ch, H, W]` to `[N, out_ch, H, W]`, H and W halved if it downsamples."""
        h: Tensor = x if self.first else F.relu(x)
        h = self.conv2(F.relu(self.conv1(h)))
        if self.downsample:
            x = F.avg_pool2d(x, 2)  # Commutes with the 1x1 convolution; a quarter of its work.
        return h + (x if self.conv_sc is None else self.conv_sc(x))


class Generator(nn.Module):
    """G: (z, class) -> image.

    Attributes of use to callers: `z_dim`, `n_classes`, `resolution`, `channels`, and
    `class_names` (a name a class; the numbers as text until a dataset gives better ones).
    """

    def __init__(
        self, config: ModelConfig, *, resolution: int, channels: int, n_classes: int
    ) -> None:
        """Raises `ConfigError` if `config` does not fit the resolution."""
        super().__init__()
        check_model(config, resolution)
        widths = [config.ch_g * width for width in G_WIDTHS[resolution]]
        blocks = list(pairwise(widths))
        self.config = config
        self.z_dim, self.n_classes = config.z_dim, n_classes
        self.resolution, self.channels = resolution, channels
        self.class_names = [str(i) for i in range(n_classes)]
        self.chunks = len(blocks) + 1 if config.hierarchical else 1
        chunk = config.z_dim // self.chunks
        cond_dim = config.shared_dim + (chunk if config.hierarchical else 0)

        self.shared = nn.Embedding(n_classes, config.shared_dim)
        self.linear = SNLinear(chunk, widths[0] * BASE**2, config.sn_eps)
        self.blocks = nn.ModuleList(GBlock(i, o, cond_dim, config) for i, o in blocks)
        self.attention = _attention(g_sides(resolution), widths[1:], config)
        self.bn_out = AffineBatchNorm2d(widths[-1])
        self.conv_out = SNConv2d(widths[-1], channels, 3, config.sn_eps)
        _init_weights(self, config.init)
        self._freeze_idle_biases()

    def _freeze_idle_biases(self) -> None:
        """Keep biases that batch norm takes out again from drifting.

        A constant that a convolution adds to a channel reaches nothing but batch norms, unless
        attention looks at it on the way. The gradient of such a bias is zero but for rounding,
        which Adam would blow up into steps of full size, different on every machine.
        """
        last_attention = max(map(int, self.attention), default=-1)
        for k, block in enumerate(self.blocks):
            assert isinstance(block, GBlock)
            idle: list[SNConv2d] = [block.conv1]
            if k > last_attention:
                idle += [block.conv2, block.conv_sc]
            for conv in idle:
                assert conv.bias is not None
                conv.bias.requires_grad_(False)

    def embed(self, classes: Tensor) -> Tensor:
        """Class embeddings `[N, shared_dim]` of ids (int `[N]`) or mixtures (float `[N, classes]`).

        A mixture weighs the embeddings: ``[0.5, 0.5, 0, ...]`` lies half-way between two classes.
        """
        table = self.shared.weight
        return classes @ table if classes.is_floating_point() else F.embedding(classes, table)

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        """Images in [-1, 1], float `[N, channels, resolution, resolution]`.

        `z` is float `[N, z_dim]`; `classes` are ids `[N]` or mixtures `[N, n_classes]`.
        """
        return self.synthesize(z, self.embed(classes))

    def synthesize(self, z: Tensor, y: Tensor) -> Tensor:
        """Images from latents `[N, z_dim]` and class embeddings `[N, shared_dim]`."""
        first, *rest = z.chunk(self.chunks, dim=1)
        conditions = [torch.cat([y, part], 1) for part in rest] or [y] * len(self.blocks)
        h = self.linear(first).unflatten(1, (-1, BASE, BASE))
        for k, (block, condition) in enumerate(zip(self.blocks, conditions, strict=True)):
            h = block(h, condition)
            if str(k) in self.attention:
                h = self.attention[str(k)](h)
        return torch.tanh(self.conv_out(F.relu(self.bn_out(h))))

    @property
    def sample_batch(self) -> int:
        """Images generated at a time outside training: 256 up to 128 pixels, then fewer."""
        return max(1, 256 * 128**2 // max(self.resolution, 128) ** 2)

    @torch.inference_mode()
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
        varied); None is no truncation. Raises `UserError` for a class or truncation out of range.
        """
        ids = [class_ids] if isinstance(class_ids, int) else list(class_ids)
        if not ids:
            raise UserError("no classes given: name one for each image")
        seeds = range(seed, seed + len(ids)) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(ids):
            raise UserError(f"{len(seeds)} seeds for {len(ids)} images: give one seed an image")
        for class_id in ids:
            if not 0 <= class_id < self.n_classes:
                raise UserError(f"class {class_id} is not in 0..{self.n_classes - 1}")
        device = self.shared.weight.device
        z = sample_z(seeds, self.z_dim, truncation)
        y = torch.tensor(ids)
        images = [
            to_uint8(self(some_z.to(device), some_y.to(device))).cpu()
            for some_z, some_y in zip(
                z.split(self.sample_batch), y.split(self.sample_batch), strict=True
            )
        ]
        return torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy()


class Discriminator(nn.Module):
    """D: (image, class) -> logit, with the projection of Miyato and Koyama 2018."""

    def __init__(
        self, config: ModelConfig, *, resolution: int, channels: int, n_classes: int
    ) -> None:
        """Raises `ConfigError` if `config` does not fit the resolution."""
        super().__init__()
        check_model(config, resolution)
        widths = [config.ch_d * width for width in D_WIDTHS[resolution]]
        blocks = list(pairwise([channels, *widths]))
        sides = d_sides(resolution)
        self.blocks = nn.ModuleList(
            DBlock(i, o, first=k == 0, downsample=before != after, config=config)
            for k, ((i, o), (before, after)) in enumerate(
                zip(blocks, pairwise([resolution, *sides]), strict=True)
            )
        )
        self.attention = _attention(sides, widths, config)
        self.linear = SNLinear(widths[-1], 1, config.sn_eps)
        self.embed = SNEmbedding(n_classes, widths[-1], config.sn_eps)
        _init_weights(self, config.init)

    def forward(self, images: Tensor, class_ids: Tensor) -> Tensor:
        """Logits `[N]` for images `[N, C, H, W]` in [-1, 1] under classes `[N]`."""
        h = images
        for k, block in enumerate(self.blocks):
            h = block(h)
            if str(k) in self.attention:
                h = self.attention[str(k)](h)
        features = F.relu(h).sum((2, 3))
        realness: Tensor = self.linear(features).squeeze(1)
        projection: Tensor = (self.embed(class_ids) * features).sum(1)
        return realness + projection
