"""The Inception network of 2015-12-05, whose features the published FIDs compare.

Inception v3 (Szegedy et al. 2015, arXiv 1512.00567) as TensorFlow's graph of that day has it: 1,008
classes, average pools that leave the padding out, a max-pool in the last block. The modules are
named as in pytorch-fid's weights file. Published figures rest on two ways to bring an image to 299
pixels, and both are here: pytorch-fid's, and TensorFlow 1's, which torch-fidelity keeps.
"""

from __future__ import annotations

import io
import re
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from biggan.metrics.weights import ExtractorError

SIDE = 299
FEATURES = 2048
CLASSES = 1008

Resize = Literal["half-pixel centres", "TensorFlow 1"]
Pool = Literal["average", "max", "stride"]
Kernel = tuple[int, ...]
"""Channels out, height, width, and the stride where it is not 1."""


class ConvNorm(nn.Module):
    """Convolution, batch norm by the moments of training, ReLU."""

    def __init__(self, in_ch: int, kernel: Kernel, *, padded: bool = True) -> None:
        """Padding keeps the size; a strided convolution has none."""
        super().__init__()
        out_ch, height, width, *strides = kernel
        stride = strides[0] if strides else 1
        padding = (height // 2, width // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(in_ch, out_ch, (height, width), stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out_ch, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `[N, out_ch, H', W']`."""
        y: Tensor = F.relu(self.bn(self.conv(x)), inplace=True)
        return y

    def fold(self) -> None:
        """Make one convolution of convolution and norm; equal to rounding, a pass less."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
            self.bn = nn.Identity()


class Mixed(nn.Module):
    """A block of several paths side by side, one of which pools.

    The names of its convolutions say how they are joined: `branch_1`, `branch_2`, ... follow each
    other, `branch_2a` and `branch_2b` both follow `branch_1`, and `branch_pool` follows the pool.
    """

    def __init__(self, in_ch: int, pool: Pool, **kernels: Kernel) -> None:
        """`in_ch` channels in. A pool that strides goes out as it is, without a `branch_pool`."""
        super().__init__()
        self.pool = pool
        self.paths = [
            [list(stage) for _, stage in groupby(path, lambda name: name.rstrip("ab"))]
            for _, path in groupby(kernels, lambda name: re.sub(r"_\d[ab]?$", "", name))
        ]
        self.out_ch = in_ch if pool == "stride" else 0
        for path in self.paths:
            ch = in_ch
            for stage in path:
                for name in stage:
                    self.add_module(name, ConvNorm(ch, kernels[name]))
                ch = sum(kernels[name][0] for name in stage)
            self.out_ch += ch

    def forward(self, x: Tensor) -> Tensor:
        """The paths' feature maps `[N, out_ch, H', W']`, in their order."""
        pooled = self._pool(x)
        outs = []
        for path in self.paths:
            y = pooled if path == [["branch_pool"]] else x
            for stage in path:
                parts = [self.get_submodule(name)(y) for name in stage]
                y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outs.append(y)
        return torch.cat([*outs, pooled] if self.pool == "stride" else outs, 1)

    def _pool(self, x: Tensor) -> Tensor:
        if self.pool == "average":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 2) if self.pool == "stride" else F.max_pool2d(x, 3, 1, 1)


def mixed_a(in_ch: int, pool_ch: int) -> Mixed:
    """A block at 35 pixels."""
    return Mixed(
        in_ch, "average",
        branch1x1=(64, 1, 1),
        branch5x5_1=(48, 1, 1), branch5x5_2=(64, 5, 5),
        branch3x3dbl_1=(64, 1, 1), branch3x3dbl_2=(96, 3, 3), branch3x3dbl_3=(96, 3, 3),
        branch_pool=(pool_ch, 1, 1),
    )  # fmt: skip


def mixed_b() -> Mixed:
    """The block from 35 to 17 pixels."""
    return Mixed(
        288, "stride",
        branch3x3=(384, 3, 3, 2),
        branch3x3dbl_1=(64, 1, 1), branch3x3dbl_2=(96, 3, 3), branch3x3dbl_3=(96, 3, 3, 2),
    )  # fmt: skip


def mixed_c(ch: int) -> Mixed:
    """A block at 17 pixels, `ch` channels within its 7x7 paths."""
    return Mixed(
        768, "average",
        branch1x1=(192, 1, 1),
        branch7x7_1=(ch, 1, 1), branch7x7_2=(ch, 1, 7), branch7x7_3=(192, 7, 1),
        branch7x7dbl_1=(ch, 1, 1), branch7x7dbl_2=(ch, 7, 1), branch7x7dbl_3=(ch, 1, 7),
        branch7x7dbl_4=(ch, 7, 1), branch7x7dbl_5=(192, 1, 7),
        branch_pool=(192, 1, 1),
    )  # fmt: skip


def mixed_d() -> Mixed:
    """The block from 17 to 8 pixels."""
    return Mixed(
        768, "stride",
        branch3x3_1=(192, 1, 1), branch3x3_2=(320, 3, 3, 2),
        branch7x7x3_1=(192, 1, 1), branch7x7x3_2=(192, 1, 7), branch7x7x3_3=(192, 7, 1),
        branch7x7x3_4=(192, 3, 3, 2),
    )  # fmt: skip


def mixed_e(in_ch: int, pool: Pool) -> Mixed:
    """A block at 8 pixels."""
    return Mixed(
        in_ch, pool,
        branch1x1=(320, 1, 1),
        branch3x3_1=(384, 1, 1), branch3x3_2a=(384, 1, 3), branch3x3_2b=(384, 3, 1),
        branch3x3dbl_1=(448, 1, 1), branch3x3dbl_2=(384, 3, 3),
        branch3x3dbl_3a=(384, 1, 3), branch3x3dbl_3b=(384, 3, 1),
        branch_pool=(192, 1, 1),
    )  # fmt: skip


class Inception(nn.Module):
    """The network, from uint8 images to features and class logits."""

    def __init__(self, resize: Resize = "half-pixel centres") -> None:
        """Weights as torch draws them, until `load_weights`."""
        super().__init__()
        self.resize: Resize = resize
        self.is_folded = False
        self.Conv2d_1a_3x3 = ConvNorm(3, (32, 3, 3, 2))
        self.Conv2d_2a_3x3 = ConvNorm(32, (32, 3, 3), padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, (64, 3, 3))
        self.Conv2d_3b_1x1 = ConvNorm(64, (80, 1, 1))
        self.Conv2d_4a_3x3 = ConvNorm(80, (192, 3, 3), padded=False)
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = mixed_b()
        self.Mixed_6b = mixed_c(128)
        self.Mixed_6c = mixed_c(160)
        self.Mixed_6d = mixed_c(160)
        self.Mixed_6e = mixed_c(192)
        self.Mixed_7a = mixed_d()
        self.Mixed_7b = mixed_e(1280, "average")
        self.Mixed_7c = mixed_e(2048, "max")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[N, 2048]` and logits `[N, 1008]` of uint8 images `[N, 1 or 3, H, W]`.

        The logits lack the bias: the Inception Score of its authors (Salimans et al. 2016) and of
        torch-fidelity is computed so.
        """
        layout = torch.channels_last if self.is_folded else torch.contiguous_format
        x = self.prepare(images).contiguous(memory_format=layout)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight)

    def prepare(self, images: Tensor) -> Tensor:
        """What the first convolution sees: float32 `[N, 3, 299, 299]`, about -1 to 1.

        One channel is repeated. Raises `ExtractorError` for another number than 1 or 3.
        """
        if images.shape[1] not in (1, 3):
            raise ExtractorError(
                f"images have {images.shape[1]} channels, Inception knows 1 (grey) and 3 (RGB):"
                " use --extractor classifier, or a network file of your own"
            )
        x = images.float().expand(-1, 3, -1, -1)
        if self.resize == "TensorFlow 1":
            return (resize_like_tensorflow(x, SIDE) - 128) / 128
        size = (SIDE, SIDE)
        return 2 * F.interpolate(x / 255, size, mode="bilinear", align_corners=False) - 1

    def load_weights(self, content: bytes, source: str) -> None:
        """Load a weights file of pytorch-fid's format, key by key; no pickled code is run.

        Raises `ExtractorError` naming `source` and the first key that is missing, unexpected or of
        another shape.
        """
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for what is not its file.
            raise ExtractorError(f"{source} is no PyTorch weights file: {error}") from None
        if not isinstance(state, dict):
            raise ExtractorError(f"{source} holds a {type(state).__name__}, not a state dict")
        # Counters of batches, which only training reads, are in some files and not in others.
        found = {k: v for k, v in state.items() if not str(k).endswith(".num_batches_tracked")}
        wanted = dict(self.named_parameters()) | {
            name: value for name, value in self.named_buffers() if value.dim() > 0
        }
        _check_keys(found, wanted, source)
        with torch.no_grad():
            for name, value in wanted.items():
                value.copy_(found[name])

    def fold(self) -> None:
        """Make a loaded network twice as fast: norms within convolutions, channels last."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        self.is_folded = True
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _check_keys(found: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> None:
    absent = [name for name in wanted if name not in found]
    strange = [name for name in found if name not in wanted]
    for names, what in ((absent, "lacks"), (strange, "has an unexpected")):
        if names:
            raise ExtractorError(
                f"{source} {what} {names[0]} (the first of {len(names)}): it is no file of the"
                " 2015-12-05 network; see --inception-weights"
            )
    for name, value in wanted.items():
        shape = getattr(found[name], "shape", None)
        if shape != value.shape:
            raise ExtractorError(
                f"{source}: {name} has shape {shape and list(shape)}, must be {list(value.shape)}"
            )


def resize_like_tensorflow(images: Tensor, side: int) -> Tensor:
    """Bilinear resize of float images `[N, C, H, W]` to `side`, as TensorFlow 1 did by default.

    Pixel i is read at i * (old / new): corners, not centres, coincide, which shifts the picture.
    """
    for dim in (3, 2):
        n = images.shape[dim]
        at = torch.arange(side, device=images.device, dtype=images.dtype) * (n / side)
        low = at.long().clamp(max=n - 1)
        high = (low + 1).clamp(max=n - 1)
        weight = (at - low).view(-1, *[1] * (3 - dim))
        left, right = images.index_select(dim, low), images.index_select(dim, high)
        images = left + (right - left) * weight
    return images
