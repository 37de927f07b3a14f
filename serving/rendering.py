"""How a sampler computes: its precision, and forwards compiled for a few sizes of batch.

A compiled forward is made for one size, which takes seconds to minutes. So there are few of them: a
batch is padded to the next size, and all are made before a model serves. On a GPU each is a CUDA
graph, too: a single launch in the place of hundreds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from biggan.networks import Generator
from biggan.pixels import to_uint8

logger = logging.getLogger("ray.serve")

Precision = Literal["float32", "bf16"]
Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`Generator.draw`: from latents, class embeddings and weights of the moments to [-1, 1]."""

COMPILES = {"recompile_limit": 1024, "accumulated_recompile_limit": 1024}
"""Sizes of all models that a sampler ever loads; beyond torch's 8 it would no longer compile."""


@dataclass(frozen=True)
class Rendering:
    """How images are computed. Fields are those of `serving.config.EndpointConfig`."""

    precision: Precision = "float32"
    compiled: bool | None = None


DEFAULT = Rendering()
"""Images that can be made again; compiled on a GPU."""


class Renderer:
    """Makes pixels of latents and class embeddings, where `Generator.render_embedded` would."""

    def __init__(self, G: Generator, rendering: Rendering) -> None:
        """`G` stays as it is from now on: what is compiled may have its weights' addresses."""
        self.G, self.half = G, rendering.precision == "bf16"
        self.required = rendering.compiled
        on_gpu = G.device.type == "cuda"
        self.compiled = on_gpu if rendering.compiled is None else rendering.compiled
        self._sizes: dict[int, Forward] = {}
        if self.compiled:
            self._forward = torch.compile(_forward(G, self.half), dynamic=False, fullgraph=True)
            self._pool = torch.cuda.graph_pool_handle() if on_gpu else None

    @torch.inference_mode()
    def prepare(self, size: int) -> None:
        """Compile the forward of `size` images, where forwards are compiled and as large as that.

        Sizes in between are padded to the next that was prepared. Where it cannot be done, as for
        want of a compiler, nothing is compiled, unless it was asked for.
        """
        if not self.compiled or size > self.G.sample_batch:
            return
        try:
            self._prepare(size)
        except Exception as error:  # Of the compiler's, the driver's, or the C compiler's.
            if self.required:
                raise
            logger.warning("forwards are not compiled: %s", error)
            self.compiled = False
            self._sizes.clear()

    def _prepare(self, size: int) -> None:
        y = self.G.embed(torch.zeros(1, self.G.n_classes, device=self.G.device))
        inputs = self._inputs(size, torch.zeros(1, self.G.z_dim), y, [None])
        with torch._dynamo.config.patch(COMPILES):
            self._forward(*inputs)
        self._sizes[size] = self._forward
        if self._pool:
            self._sizes[size] = Graph(self._forward, inputs, self._pool)

    def fits(self, images: int) -> int:
        """The most images that are no more work than `images` are unpadded."""
        largest = max(self._sizes, default=1)
        if images >= largest:
            return images - images % largest
        return max((size for size in self._sizes if size <= images), default=images)

    @torch.inference_mode()
    def __call__(self, z: Tensor, y: Tensor, truncations: Sequence[float | None]) -> np.ndarray:
        """As `Generator.render_embedded`; compiles nothing that was not prepared."""
        if not self._sizes:
            with _autocast(self.G.device, self.half):
                return self.G.render_embedded(z, y, truncations)
        images, largest = [], max(self._sizes)
        for start in range(0, len(z), largest):
            part = slice(start, start + largest)
            images.append(self._padded(z[part], y[part], truncations[part]))
        return torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy()

    def _padded(self, z: Tensor, y: Tensor, truncations: Sequence[float | None]) -> Tensor:
        size = min(size for size in self._sizes if size >= len(z))
        images = self._sizes[size](*self._inputs(size, z, y, truncations))
        return to_uint8(images[: len(z)]).cpu()

    def _inputs(
        self, size: int, z: Tensor, y: Tensor, truncations: Sequence[float | None]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the forward takes, its last row repeated up to `size`; always of one layout."""
        rows = torch.arange(size, device=self.G.device).clamp(max=len(z) - 1)
        mix = self.G.mix(truncations)
        z, y = z.to(self.G.device)[rows], y.to(self.G.device)[rows]
        return z, y, None if mix is None else mix[rows]


class Graph:
    """A forward of one size as a CUDA graph, which any thread may replay.

    torch.compile's own graphs ("reduce-overhead") belong to the thread that recorded them, and a
    model is loaded in another thread than it serves in, while others serve.
    """

    def __init__(
        self, forward: Forward, inputs: tuple[Tensor, Tensor, Tensor | None], pool: Any
    ) -> None:
        """Record `forward`, which has run before; graphs of one `pool` never run side by side."""
        self.inputs, self.graph = inputs, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.images = forward(*inputs)

    def __call__(self, z: Tensor, y: Tensor, mix: Tensor | None) -> Tensor:
        """The images, which the next replay in the pool overwrites."""
        for kept, given in zip(self.inputs, (z, y, mix), strict=True):
            if kept is not None and given is not None:
                kept.copy_(given)
        self.graph.replay()
        return self.images


def _autocast(device: torch.device, half: bool) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


def _forward(G: Generator, half: bool) -> Forward:
    device = G.device

    def forward(z: Tensor, y: Tensor, mix: Tensor | None) -> Tensor:
        with _autocast(device, half):
            return G.draw(z, y, mix).float()

    return forward
