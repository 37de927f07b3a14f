"""The residual blocks of BigGAN-deep (arXiv 1809.11096, appendix B, figure 16 and tables 7-9).

Two blocks a stage, each a bottleneck of 1x1, 3x3, 3x3 and 1x1 convolutions at a quarter of the
width. Skips are never convolved: G drops channels on them, D adds channels from a 1x1. The networks
around them are those of `biggan.networks`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biggan.layers import ConditionalBatchNorm2d, SNConv2d, SNUpConv2d

BOTTLENECK = 4
"""How much narrower the 3x3 convolutions are than the block's wider end."""


class DeepGBlock(nn.Module):
    """Bottleneck block of G, the second of a stage doubles the resolution (figure 16b)."""

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        *,
        upsample: bool,
        norm: Callable[[int], ConditionalBatchNorm2d],
        sn_eps: float,
    ) -> None:
        super().__init__()
        hidden = in_ch // BOTTLENECK
        self.out_ch, self.upsample = out_ch, upsample
        self.bn1 = norm(in_ch)
        self.conv1 = SNConv2d(in_ch, hidden, 1, sn_eps)
        self.bn2 = norm(hidden)
        self.conv2 = (SNUpConv2d if upsample else SNConv2d)(hidden, hidden, 3, sn_eps)
        self.bn3 = norm(hidden)
        self.conv3 = SNConv2d(hidden, hidden, 3, sn_eps)
        self.bn4 = norm(hidden)
        self.conv4 = SNConv2d(hidden, out_ch, 1, sn_eps)

    def forward(self, x: Tensor, condition: Tensor, mix: Tensor | None = None) -> Tensor:
        """Map `[N, in_ch, H, W]` to `[N, out_ch, H, W]`, H and W doubled if it upsamples."""
        h: Tensor = self.conv1(self.bn1(x, condition, mix, relu=True))
        h = self.conv2(self.bn2(h, condition, mix, relu=True))
        h = self.conv3(self.bn3(h, condition, mix, relu=True))
        h = self.conv4(self.bn4(h, condition, mix, relu=True))
        x = x[:, : self.out_ch]
        return h.add_(F.interpolate(x, scale_factor=2) if self.upsample else x)

    @property
    def idle_biases(self) -> tuple[list[SNConv2d], list[SNConv2d]]:
        """Convolutions whose bias the next batch norm takes out; those where a later one may."""
        return [self.conv1, self.conv2, self.conv3], [self.conv4]


class DeepDBlock(nn.Module):
    """Bottleneck block of D, the first of a stage may halve the resolution (figure 16c)."""

    def __init__(self, in_ch: int, out_ch: int, *, downsample: bool, sn_eps: float) -> None:
        super().__init__()
        hidden = out_ch // BOTTLENECK
        self.downsample = downsample
        self.conv1 = SNConv2d(in_ch, hidden, 1, sn_eps)
        self.conv2 = SNConv2d(hidden, hidden, 3, sn_eps)
        self.conv3 = SNConv2d(hidden, hidden, 3, sn_eps)
        self.conv4 = SNConv2d(hidden, out_ch, 1, sn_eps)
        self.conv_sc = SNConv2d(in_ch, out_ch - in_ch, 1, sn_eps) if in_ch != out_ch else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_ch, H, W]` to `[N, out_ch, H, W]`, H and W halved if it downsamples."""
        h: Tensor = self.conv1(F.relu(x))
        h = self.conv2(F.relu_(h))
        h = F.relu_(self.conv3(F.relu_(h)))
        if self.downsample:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if self.conv_sc is not None:
            x = torch.cat([x, self.conv_sc(x)], 1)
        out: Tensor = self.conv4(h)
        return out.add_(x)
