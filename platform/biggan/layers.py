"""The layers BigGAN is made of: spectral norm, conditional and cross-replica batch norm, attention.

Section numbers are those of Brock, Donahue and Simonyan 2018 (arXiv 1809.11096) unless said
otherwise. Images and feature maps are float tensors `[N, C, H, W]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralNorm(nn.Module):
    """Mixin that divides `weight` by its largest singular value (Miyato et al. 2018, section 2.1).

    The value is estimated by one power iteration a forward from the stored left singular vector
    `u`. In training the improved `u` is stored; in evaluation it is used and forgotten, as in
    BigGAN-PyTorch.
    """

    weight: Tensor
    u: Tensor
    sn_eps: float

    def _init_spectral_norm(self, sn_eps: float) -> None:
        self.sn_eps = sn_eps
        self.register_buffer("u", F.normalize(torch.randn(self.weight.shape[0]), dim=0))

    def normalized_weight(self) -> Tensor:
        """`weight` / sigma(`weight`), in the shape of `weight`."""
        W = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(W.T @ self.u, dim=0, eps=self.sn_eps)
            u = F.normalize(W @ v, dim=0, eps=self.sn_eps)
            if self.training:
                self.u.copy_(u)
        sigma = u @ (W @ v)  # Singular vectors are constants to the gradient (eq. 12 there).
        return self.weight / sigma


class SNConv2d(nn.Conv2d, SpectralNorm):
    """`nn.Conv2d` with "same" padding and a spectrally normalized weight."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        sn_eps: float,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )
        self._init_spectral_norm(sn_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_channels, H, W]` to `[N, out_channels, H, W]`."""
        return F.conv2d(x, self.normalized_weight(), self.bias, padding=self.padding)


class SNUpConv2d(SNConv2d):
    """Nearest upsampling by 2, then a 3x3 `SNConv2d`, as one transposed convolution.

    Each output pixel sees a 2x2 patch of the small map, so 4 products serve where 9 did; equal up
    to rounding. `benchmarks/README.md` has the gain.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_channels, H, W]` to `[N, out_channels, 2 H, 2 W]`."""
        kernel = _spread(self.normalized_weight()).flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class SNDownConv2d(SNConv2d):
    """A 3x3 `SNConv2d`, then average pooling by 2, as one 4x4 convolution of stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_channels, H, W]` to `[N, out_channels, H / 2, W / 2]`."""
        kernel = _spread(self.normalized_weight()) / 4
        return F.conv2d(x, kernel, self.bias, stride=2, padding=1)


def _spread(kernel: Tensor) -> Tensor:
    """A `[out, in, 3, 3]` kernel convolved with a 2x2 box of ones: `[out, in, 4, 4]`."""
    wide = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))
    return F.pad(wide, (0, 0, 0, 1)) + F.pad(wide, (0, 0, 1, 0))


class SNLinear(nn.Linear, SpectralNorm):
    """`nn.Linear` with a spectrally normalized weight."""

    def __init__(
        self, in_features: int, out_features: int, sn_eps: float, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._init_spectral_norm(sn_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_features]` to `[N, out_features]`."""
        return F.linear(x, self.normalized_weight(), self.bias)


class SNEmbedding(nn.Embedding, SpectralNorm):
    """`nn.Embedding` with a spectrally normalized table; `u` has an entry a class."""

    def __init__(self, num_embeddings: int, embedding_dim: int, sn_eps: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self._init_spectral_norm(sn_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up class ids `[N]`: `[N, embedding_dim]`."""
        return F.embedding(ids, self.normalized_weight())


class _CrossReplicaNormalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) with moments over the batches of all ranks, and its gradient.

    One all-reduce each way. Moments travel in float64, in which E[x^2] - E[x]^2 loses nothing
    that float32 activations have. Every rank must hold equally many images.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        mean, var = mean.double(), var.double()
        moments = torch.stack([mean, var + mean.square()])
        dist.all_reduce(moments)
        mean, square = moments / dist.get_world_size()
        var = square - mean.square()
        invstd = torch.rsqrt(var + eps).to(x.dtype)
        normalized = (x - mean.to(x.dtype)[:, None, None]) * invstd[:, None, None]
        ctx.save_for_backward(normalized, invstd)
        ctx.mark_non_differentiable(mean, var)
        return normalized, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        normalized, invstd = ctx.saved_tensors
        sums = torch.stack([grad.mean((0, 2, 3)), (grad * normalized).mean((0, 2, 3))])
        dist.all_reduce(sums)
        mean, along = (sums / dist.get_world_size())[:, :, None, None]
        return (grad - mean - normalized * along) * invstd[:, None, None], None


class CrossReplicaBatchNorm2d(nn.Module):
    """Batch norm whose moments are those of the whole batch over all workers, without gain or bias.

    On a single process it is `F.batch_norm`. Gloo and NCCL both carry it, so CPU and GPU workers
    compute the same thing. `momentum` is the weight of the newest batch in the running moments.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[N, C, H, W]` by the batch in training, by the running moments after."""
        if not (self.training and _world_size() > 1):
            return F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                training=self.training,
                momentum=self.momentum,
                eps=self.eps,
            )
        normalized: Tensor
        normalized, mean, var = _CrossReplicaNormalize.apply(x, self.eps)  # type: ignore[no-untyped-call]
        n = x.numel() // x.shape[1] * _world_size()
        unbiased = var * (n / (n - 1))  # As F.batch_norm stores it.
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return normalized


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def standing_statistics(module: nn.Module) -> Iterator[None]:
    """Collect standing statistics (appendix D): batch-norm moments averaged over the forwards made.

    Within the context every batch norm of `module` normalizes by the batch and replaces its
    running moments by the plain mean over all batches seen; nothing else changes mode, so
    spectral norms stay as they are. Afterwards all is in evaluation mode.
    """
    norms = [m for m in module.modules() if isinstance(m, CrossReplicaBatchNorm2d)]
    seen = dict.fromkeys(norms, 0)
    momenta = {norm: norm.momentum for norm in norms}

    def weigh(norm: nn.Module, _args: object) -> None:
        assert isinstance(norm, CrossReplicaBatchNorm2d)
        seen[norm] += 1
        norm.momentum = 1 / seen[norm]

    module.eval()
    hooks = [norm.train().register_forward_pre_hook(weigh) for norm in norms]
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        module.eval()


class ConditionalBatchNorm2d(nn.Module):
    """Class-conditional batch norm (section 3; Dumoulin et al. 2017).

    gain = 1 + linear(condition) and bias = linear(condition), both without bias of their own.
    """

    def __init__(self, num_features: int, cond_dim: int, bn_eps: float, sn_eps: float) -> None:
        super().__init__()
        self.norm = CrossReplicaBatchNorm2d(num_features, bn_eps)
        self.gain = SNLinear(cond_dim, num_features, sn_eps, bias=False)
        self.bias = SNLinear(cond_dim, num_features, sn_eps, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Normalize `x` `[N, C, H, W]` under `condition` `[N, cond_dim]`."""
        gain = 1 + self.gain(condition)
        bias = self.bias(condition)
        return torch.addcmul(bias[:, :, None, None], self.norm(x), gain[:, :, None, None])


class AffineBatchNorm2d(nn.Module):
    """Batch norm with a learned gain and bias a channel; stands before G's last convolution."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = CrossReplicaBatchNorm2d(num_features, eps)
        self.gain = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[N, C, H, W]`."""
        return torch.addcmul(self.bias[:, None, None], self.norm(x), self.gain[:, None, None])


class SelfAttention(nn.Module):
    """Self-attention over positions (Zhang et al. 2018, as released): gamma * o(attend(x)) + x.

    Keys and values are max-pooled to a quarter of the positions; logits are not scaled; gamma
    starts at 0, so that the layer starts as the identity.
    """

    def __init__(self, channels: int, sn_eps: float) -> None:
        super().__init__()
        narrow, half = max(channels // 8, 1), max(channels // 2, 1)
        self.theta = SNConv2d(channels, narrow, 1, sn_eps, bias=False)
        self.phi = SNConv2d(channels, narrow, 1, sn_eps, bias=False)
        self.g = SNConv2d(channels, half, 1, sn_eps, bias=False)
        self.o = SNConv2d(half, channels, 1, sn_eps, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to the same shape."""
        query = self.theta(x).flatten(2).mT  # [N, HW, C/8]
        key = F.max_pool2d(self.phi(x), 2).flatten(2).mT  # [N, HW/4, C/8]
        value = F.max_pool2d(self.g(x), 2).flatten(2).mT  # [N, HW/4, C/2]
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return torch.addcmul(x, self.gamma, self.o(attended.mT.unflatten(2, x.shape[2:])))
