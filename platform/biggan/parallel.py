"""This process's place among the workers of a run, by `torch.distributed`; no Ray.

The same code serves Ray Train's workers, torchrun's, and a single process, where every operation
here is the identity.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

CPU = torch.device("cpu")
# Torch 2.13 renamed the option.
_LEAVE_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


@dataclass(frozen=True)
class Workers:
    """Rank of this process, number of workers, and this one's device."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device | None = None) -> Workers:
        """This process's place: that of its process group, or a group of one without any."""
        if device is None:
            cuda = torch.cuda.is_available()
            device = torch.device("cuda", torch.cuda.current_device()) if cuda else CPU
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    @property
    def is_main(self) -> bool:
        """Whether this worker is the one that writes files and prints."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This worker's consecutive part of n items; parts differ by one item at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over workers, in place."""
        return self.sum(tensor).div_(self.size) if self.size > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all workers, equally long, one after the other."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def agree(self, text: str) -> str:
        """The main worker's `text`, on all workers."""
        if self.size == 1:
            return text
        agreed = [text]
        dist.broadcast_object_list(agreed, src=0, device=self.device)
        return agreed[0]

    def wrap(self, network: nn.Module) -> nn.Module:
        """`network` such that its backward averages gradients over workers, overlapped with it.

        Buffers are left alone: cross-replica batch norm and spectral norm keep them equal.
        """
        if self.size == 1:
            return network
        # Torch minds the strides of 1x1 kernels, which mean nothing.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
        return DistributedDataParallel(network, **_LEAVE_BUFFERS, gradient_as_bucket_view=True)


ALONE = Workers(0, 1, CPU)
"""A single process that computes on the CPU."""
