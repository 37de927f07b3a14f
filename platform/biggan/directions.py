"""Directions in which a generator's images change most: closed-form factorization, SeFa.

Shen and Zhou, Closed-Form Factorization of Latent Semantics in GANs, CVPR 2021 (arXiv 2007.06600):
the first thing a generator does to a latent is to multiply it by a matrix A, so the unit vectors n
that maximize |A n|^2 (eq. 3 to 5), the eigenvectors of A^T A with the largest eigenvalues, are the
ways in which images change most. No samples, no training, no labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from biggan.errors import UserError
from biggan.layers import SNLinear
from biggan.networks import GBlock, Generator
from biggan.networks_deep import DeepGBlock


@dataclass(frozen=True)
class Directions:
    """A generator's directions, the one with the greatest effect first."""

    vectors: Tensor
    """Orthonormal rows: float32 `[K, z_dim]`, with K = z_dim."""
    effects: Tensor
    """|A n| of each direction n: `[K]`, falling."""
    stages: tuple[int, ...]
    """What each acts on: 0 the first linear layer, k the k-th block; 0 where all see all of z."""

    def apply(self, z: Tensor, edits: Mapping[int, float]) -> Tensor:
        """A latent `[z_dim]` moved along directions, by index and strength; raises `UserError`."""
        for index, strength in edits.items():
            if not 0 <= index < len(self.vectors):
                raise UserError(
                    f"direction {index}: this model has directions 0 to {len(self.vectors) - 1}"
                )
            z = z + strength * self.vectors[index]
        return z


@torch.no_grad()
def find_directions(G: Generator) -> Directions:
    """The directions of a generator, by SeFa on everything that its latent goes into first.

    Under hierarchical z each chunk meets a matrix of its own: chunk 0 the first linear layer, chunk
    k the gains and biases of block k's batch norms. A^T A then has a block a chunk, and every
    eigenvector lies in one chunk. A sign is free; the largest component is made positive.
    """
    parts = _matrices(G)
    vectors, effects, stages = [], [], []
    start = 0
    for stage, A in enumerate(parts):
        _, singular, rows = torch.linalg.svd(A.double(), full_matrices=True)
        width = A.shape[1]
        padded = torch.zeros(width, dtype=torch.double)
        padded[: len(singular)] = singular
        whole = torch.zeros(width, G.z_dim, dtype=torch.double)
        whole[:, start : start + width] = rows
        vectors.append(whole)
        effects.append(padded)
        stages += [stage] * width
        start += width
    found, strength = torch.cat(vectors), torch.cat(effects)
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    found = found * largest.sign()
    order = strength.argsort(descending=True, stable=True)
    return Directions(
        found[order].float(), strength[order].float(), tuple(stages[i] for i in order.tolist())
    )


def _matrices(G: Generator) -> list[Tensor]:
    """What each chunk of z is multiplied by first: `[outputs, chunk]`, on the CPU."""
    chunk = G.z_dim // G.chunks
    first = G.linear.normalized_weight().cpu()[:, -chunk:]
    # A condition is [embedding, chunk], or the embedding alone.
    norms = [torch.cat(_norm_weights(block)).cpu() for block in G.blocks if _conditioned(G)]
    if G.config.deep:  # Every layer sees all of z.
        return [torch.cat([first, *(weight[:, -chunk:] for weight in norms)])]
    if G.chunks == 1:
        return [first]
    return [first, *(weight[:, -chunk:] for weight in norms)]


def _conditioned(G: Generator) -> bool:
    """Whether batch norms see a part of the latent."""
    return G.config.deep or G.chunks > 1


def _norm_weights(block: torch.nn.Module) -> list[Tensor]:
    """The matrices that make gains and biases of a block's conditional batch norms."""
    assert isinstance(block, GBlock | DeepGBlock)
    linear = [layer for name, layer in block.named_modules() if name.split(".")[-1] in _AFFINE]
    return [layer.normalized_weight() for layer in linear if isinstance(layer, SNLinear)]


_AFFINE = ("gain", "bias")
