"""Up- and down-convolutions: one strided convolution against resampling and a convolution.

`layers.SNUpConv2d` and `layers.SNDownConv2d` fold nearest-neighbour up-sampling and average pooling
into their kernels. This measures what that is worth, forward and backward, side by side:
`python benchmarks/resampling.py`. Needs no Ray.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from biggan.layers import SNConv2d, SNDownConv2d, SNUpConv2d

ROUNDS = 15
SN_EPS = 1e-6
CASES = [(64, 32, 8), (64, 64, 16), (32, 128, 32)]
"""Batch, channels, and side of the smaller image."""


def seconds(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Time of one forward and backward."""
    if x.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    layer(x).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads,"
          f" {platform.processor() or platform.machine()}")  # fmt: skip
    print(f"{'':24}{'two steps':>12}{'one kernel':>12}{'ratio':>8}")
    for batch, channels, side in CASES:
        plain = SNConv2d(channels, channels, 3, SN_EPS).to(device)
        up, down = (
            kind(channels, channels, 3, SN_EPS).to(device) for kind in (SNUpConv2d, SNDownConv2d)
        )
        small, large = (
            torch.randn(batch, channels, s, s, device=device, requires_grad=True)
            for s in (side, 2 * side)
        )
        pairs: dict[str, tuple[Tensor, Callable[..., Tensor], Callable[..., Tensor]]] = {
            "up": (small, lambda x, c=plain: c(F.interpolate(x, scale_factor=2)), up),
            "down": (large, lambda x, c=plain: F.avg_pool2d(c(x), 2), down),
        }
        for name, (x, two_steps, one_kernel) in pairs.items():
            seconds(two_steps, x), seconds(one_kernel, x)
            # In turn, so that other work on the machine hits both alike.
            rounds = [(seconds(two_steps, x), seconds(one_kernel, x)) for _ in range(ROUNDS)]
            a, b = (statistics.median(times) * 1000 for times in zip(*rounds, strict=True))
            label = f"{name:5}{batch}x{channels} at {side}"
            print(f"{label:24}{a:9.1f} ms{b:9.1f} ms{a / b:8.2f}")


if __name__ == "__main__":
    main()
