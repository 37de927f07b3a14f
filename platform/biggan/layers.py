"""The layers BigGAN is made of: spectral norm, conditional and cross-replica batch norm, attention.

Section numbers are those of Brock, Donahue and Simonyan 2018 (arXiv 1809.11096) unless said
otherwise. Images and feature maps are float tensors `[N, C, H, W]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralNorm(nn.Module):
    """Mixin that divides `weight` by its largest singular value (Miyato et al. 2018, section 2.1).

    The value is estimated by one power iteration a forward from the stored left singular vector
    `u`. In training the improved `u` is stored; in evaluation it is used and forgotten, as in
    BigGAN-PyTorch. Forwards of one and the same weight can share an iteration:
    `shared_power_iteration`.
    """

    weight: Tensor
    u: Tensor | None
    """Left singular vector `[weight.shape[0]]`; None once the norm is folded into the weight."""
    v: Tensor
    """The right singular vector that belongs to `u` while an iteration is shared."""
    sn_eps: float
    shares_iteration: bool = False

    def _init_spectral_norm(self, sn_eps: float) -> None:
        self.sn_eps = sn_eps
        rows, columns = self.weight.flatten(1).shape
        self.register_buffer("u", F.normalize(torch.randn(rows), dim=0))
        self.register_buffer("v", torch.zeros(columns), persistent=False)

    def _matrix(self) -> Tensor:
        """`weight` as a matrix, a row an output; columns in whatever order they lie in memory."""
        if self.weight.ndim == 4 and not self.weight.is_contiguous():  # Channels last.
            return self.weight.permute(0, 2, 3, 1).flatten(1)
        return self.weight.flatten(1)

    def _iterate(self) -> tuple[Tensor, Tensor]:
        """One power iteration from `u`: the next (u, v)."""
        assert self.u is not None
        W = self._matrix().detach()
        v = F.normalize(W.T @ self.u, dim=0, eps=self.sn_eps)
        return F.normalize(W @ v, dim=0, eps=self.sn_eps), v

    @torch.no_grad()
    def share_iteration(self) -> None:
        """Do a training forward's power iteration, for all forwards until further notice."""
        if self.u is not None:
            u, v = self._iterate()
            self.u.copy_(u)
            self.v.copy_(v)
            self.shares_iteration = True

    def singular_value(self) -> Tensor:
        """sigma(`weight`), with its gradient. Singular vectors are constants to it (eq. 12)."""
        assert self.u is not None
        # Products of vectors would lose digits in the precision that autocast chooses.
        with torch.autocast(self.weight.device.type, enabled=False):
            if self.shares_iteration:
                u, v = self.u, self.v
            else:
                u, v = self._iterate()
                if self.training:
                    self.u.copy_(u)
            sigma: Tensor = u @ (self._matrix() @ v)
            return sigma

    @torch.no_grad()
    def estimate(self) -> Tensor:
        """|W^T u|, which converges to the largest singular value from below; changes nothing."""
        assert self.u is not None
        norm: Tensor = torch.linalg.vector_norm(self._matrix().T @ self.u)
        return norm

    def normalized_weight(self) -> Tensor:
        """`weight` / sigma(`weight`), in the shape of `weight`."""
        return self.weight if self.u is None else self.weight / self.singular_value()

    @torch.no_grad()
    def fold(self) -> None:
        """Make the normalized weight the weight, for good: nothing is estimated any more."""
        self.weight.copy_(self.normalized_weight())
        self.u = None

    def freeze_weight(self) -> None:
        """Compute ahead whatever follows from the weight, which must not change from now on."""
        self.fold()


def spectral_norms(network: nn.Module) -> dict[str, SpectralNorm]:
    """Every spectrally normalized layer of a network, by its name in it."""
    return {name: m for name, m in network.named_modules() if isinstance(m, SpectralNorm)}


@contextmanager
def shared_power_iteration(network: nn.Module) -> Iterator[None]:
    """Let all forwards of `network` within share one power iteration, done and stored here.

    Right where the weights stay as they are within: iterating again would only sharpen the
    estimate. So a step pays once for G, whatever the number of D updates and micro-batches.
    """
    layers = spectral_norms(network).values()
    for layer in layers:
        layer.share_iteration()
    try:
        yield
    finally:
        for layer in layers:
            layer.shares_iteration = False


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

    kernel: Tensor | None
    """That of the transposed convolution, once the layer is frozen. To make it takes longer than
    to convolve one image with it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("kernel", None, persistent=False)

    @torch.no_grad()
    def freeze_weight(self) -> None:
        """See `SpectralNorm.freeze_weight`."""
        super().freeze_weight()
        self.kernel = self._kernel().contiguous()

    def _kernel(self) -> Tensor:
        return _spread(self.normalized_weight()).flip(2, 3).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_channels, H, W]` to `[N, out_channels, 2 H, 2 W]`."""
        kernel = self._kernel() if self.kernel is None else self.kernel
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


class _BatchNormAffine(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * gain + bias, then ReLU if asked, with moments of all ranks.

    Written as x * scale + shift, forward and backward, which needs neither the normalized map nor
    the one before the ReLU: half the memory of the separate steps, and half their passes over it
    (`benchmarks/README.md`). `gain` and `bias` are `[N, C]` or `[1, C]`. Moments cross ranks in
    float64, in which E[x^2] - E[x]^2 loses nothing that float32 activations have; one all-reduce
    each way. Every rank must hold equally many images.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, bias: Tensor, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _moments(x)
        if _world_size() > 1:
            moments = torch.stack([mean.double(), var.double() + mean.double().square()])
            dist.all_reduce(moments)
            first, second = moments / _world_size()
            mean, var = first.to(mean.dtype), (second - first.square()).to(mean.dtype)
        invstd = torch.rsqrt(var + eps)
        scale = gain * invstd
        y = _affine(x, scale, bias - mean * scale)
        y = y.relu_() if relu else y
        ctx.relu = relu
        ctx.save_for_backward(x, y if relu else None, gain, mean, invstd)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, gain, mean, invstd = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grads[0], y, 0) if ctx.relu else grads[0]
        # Sums over positions, [N, C]; over x hat = (x - mean) * invstd for the gain's.
        grad_bias = grad.sum((2, 3), dtype=gain.dtype)
        along = (grad.to(gain.dtype) * x).sum((2, 3))
        grad_gain = invstd * (along - mean * grad_bias)
        # Means over the batches of all ranks of the normalized map's gradient, and along x hat.
        means = torch.stack([(gain * grad_bias).sum(0), (gain * grad_gain).sum(0)])
        means = means / (x.numel() // x.shape[1])
        if _world_size() > 1:
            dist.all_reduce(means)
            means = means / _world_size()
        slope = -invstd.square() * means[1]
        offset = -invstd * means[0] - slope * mean
        grad_x = _affine(x, slope, offset)
        grad_x.addcmul_(grad, _wide(gain * invstd))
        return (
            grad_x,
            grad_gain.sum_to_size(gain.shape),
            grad_bias.sum_to_size(gain.shape),
            *2 * [None],
        )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over images and positions: float32 (or float64) `[C]`."""
    half_on_cpu = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    # What a compiler fuses beats a kernel of its own; and that kernel's moments are half on a CPU.
    if torch.compiler.is_compiling() or half_on_cpu:
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(full, (0, 2, 3), correction=0)
        return mean, var
    # One fused reduction; on a CPU several times quicker than var_mean.
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean, var


def _wide(v: Tensor) -> Tensor:
    """`[C]` or `[N, C]` against `[N, C, H, W]`."""
    return v[..., None, None]


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift `x` in the precision of `scale`, rounded once to that of `x`."""
    if x.dtype == scale.dtype or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return torch.addcmul(_wide(shift), x, _wide(scale)).to(x.dtype)
    return torch.addcmul(_wide(shift), x, _wide(scale), out=torch.empty_like(x))


class CrossReplicaBatchNorm2d(nn.Module):
    """Batch norm whose moments are those of the whole batch over all workers.

    Gloo and NCCL both carry it, so CPU and GPU workers compute the same thing. `momentum` is the
    weight of the newest batch in the running moments. A trained network may carry tables of
    moments besides, collected at several truncations of the latents (`TruncationTables`).
    """

    running_mean: Tensor
    running_var: Tensor
    table_mean: Tensor
    table_var: Tensor

    def __init__(self, num_features: int, eps: float, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def add_tables(self, n: int) -> None:
        """Make room for the moments of `n` truncations: `table_mean` and `table_var` `[n, C]`."""
        self.register_buffer("table_mean", self.running_mean.repeat(n, 1))
        self.register_buffer("table_var", self.running_var.repeat(n, 1))

    def forward(
        self,
        x: Tensor,
        gain: Tensor | None = None,
        bias: Tensor | None = None,
        mix: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Normalize `[N, C, H, W]` by the batch in training, by stored moments after.

        Then multiply by `gain` and add `bias` (`[N, C]` or `[1, C]`; 1 and 0 if not given), then
        ReLU. In evaluation `mix` `[N, tables + 1]` weighs, for each image, the tables of
        moments and last the running ones; without it the running moments serve.
        """
        gain = (
            self.running_var.new_ones(1, x.shape[1])
            if gain is None
            else gain.to(self.running_var.dtype)
        )
        bias = torch.zeros_like(gain) if bias is None else bias.to(self.running_var.dtype)
        if self.training:
            y: Tensor
            y, mean, var = _BatchNormAffine.apply(x, gain, bias, self.eps, relu)  # type: ignore[no-untyped-call]
            if not Recomputation.active:
                n = x.numel() // x.shape[1] * _world_size()
                self._move(mean, var * (n / (n - 1)))  # Unbiased, as torch stores it.
            return y
        mean, var = self.running_mean, self.running_var
        if mix is not None:
            mean = mix @ torch.cat([self.table_mean, mean[None]])
            var = mix @ torch.cat([self.table_var, var[None]])
        scale = gain * torch.rsqrt(var + self.eps)
        y = _affine(x, scale, bias - mean * scale)
        return y.relu_() if relu else y

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)


class Recomputation:
    """Context of forwards made again for the backward pass: running moments stay as they are.

    Can be entered any number of times, since a graph can be gone through more than once.
    """

    active: ClassVar[bool] = False

    def __enter__(self) -> None:
        """Begin."""
        Recomputation.active = True

    def __exit__(self, *_error: object) -> None:
        """End."""
        Recomputation.active = False


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


class ClassEmbedding(nn.Embedding):
    """`nn.Embedding` that also takes mixtures of classes."""

    def forward(self, classes: Tensor) -> Tensor:
        """Embed ids (int `[N]`), or mixtures (float `[N, classes]`): sums so weighed."""
        if classes.is_floating_point():
            return classes.to(self.weight.dtype) @ self.weight
        return super().forward(classes)


class ConditionalBatchNorm2d(nn.Module):
    """Class-conditional batch norm (section 3; Dumoulin et al. 2017).

    gain = 1 + linear(condition) and bias = linear(condition), both without bias of their own. With
    `shared` off the condition is a mixture of classes, of which each norm has embeddings of its
    own in the place of the linear layers.
    """

    def __init__(
        self, num_features: int, cond_dim: int, bn_eps: float, sn_eps: float, shared: bool = True
    ) -> None:
        super().__init__()
        self.norm = CrossReplicaBatchNorm2d(num_features, bn_eps)

        def linear() -> nn.Module:
            if shared:
                return SNLinear(cond_dim, num_features, sn_eps, bias=False)
            return ClassEmbedding(cond_dim, num_features)

        self.gain, self.bias = linear(), linear()

    def forward(
        self, x: Tensor, condition: Tensor, mix: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Normalize `x` `[N, C, H, W]` under `condition` `[N, cond_dim]`, then ReLU if asked."""
        gain, bias = self.gain(condition), self.bias(condition)
        # In half precision gains near 1 would come in steps of 1/128.
        gain = 1 + gain.to(torch.promote_types(gain.dtype, torch.float32))
        normalized: Tensor = self.norm(x, gain, bias, mix, relu)
        return normalized


class AffineBatchNorm2d(nn.Module):
    """Batch norm with a learned gain and bias a channel; stands before G's last convolution."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = CrossReplicaBatchNorm2d(num_features, eps)
        self.gain = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, mix: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalize `[N, C, H, W]`, then ReLU if asked."""
        normalized: Tensor = self.norm(x, self.gain[None], self.bias[None], mix, relu)
        return normalized


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018, arXiv 1709.01507): every channel weighed by a gate.

    The gate is 1 + gamma * (sigmoid(...) - 1): with gamma at 0 the layer starts as the identity, at
    1 it is the paper's.
    """

    def __init__(self, channels: int, sn_eps: float) -> None:
        super().__init__()
        narrow = max(channels // 16, 4)
        self.squeeze = SNLinear(channels, narrow, sn_eps)
        self.excite = SNLinear(narrow, channels, sn_eps)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to the same shape."""
        weight = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        gate = 1 + self.gamma * (weight - 1)
        return x * gate.to(x.dtype)[:, :, None, None]


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
        # The kernels that never hold all logits want heads: one.
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)
        seen = self.o(attended.mT.unflatten(2, x.shape[2:]))
        return torch.addcmul(x, self.gamma.to(x.dtype), seen.to(x.dtype))
