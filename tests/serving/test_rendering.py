"""How samplers compute: compiled for a few sizes, in half precision, or just as everything else."""

import asyncio
from functools import partial

import numpy as np
import pytest
import torch
import torch._inductor.config
from conftest import add_imported
from local_endpoint import random_generator
from torch._dynamo.utils import counters

import serving.loading
from biggan.directions import find_directions
from biggan.models import find_model, model_name
from biggan.recipe import Recipe
from biggan.synthesis import synthesize
from biggan.truncation import TruncationTables
from serving.rendering import Renderer, Rendering
from serving.sampler import Sampler

# It would compile, for 10 s, what tells whether the processor can do what it says.
torch._inductor.config.cpp.vec_isa_ok = True
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RECIPES = [
    Recipe(classes={i % 10: 1.0}, seed=i, truncation=t)
    for i, t in enumerate([None, 0.5, 1.0, None, 0.7, 0.5, None])
]


def compiles():
    return counters["stats"]["unique_graphs"]


def trained():
    """With moments at several truncations, unlike each other."""
    G = random_generator(3)
    G.add_tables(TruncationTables(truncations=(0.5, 1.0)))
    for norm in G.batch_norms():
        norm.table_var.mul_(torch.tensor([[0.5], [0.8]]))
    return G


def generator(device="cpu"):
    """As a sampler has it in memory."""
    G = trained()
    G.freeze()
    return G.to(device, memory_format=torch.channels_last)


def apart(G, recipes, renderer):
    """How many grey levels the renderer's images differ from the plain ones: all differences."""
    directions = find_directions(G)
    plain = synthesize(G, recipes, directions)
    assert plain.std() > 20
    return np.abs(synthesize(G, recipes, directions, renderer).astype(int) - plain)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request):
    return request.param


def test_without_options_nothing_differs():
    G = generator()
    renderer = Renderer(G, Rendering())
    renderer.prepare(4)
    assert not renderer.compiled
    assert [renderer.fits(n) for n in (1, 3, 57)] == [1, 3, 57]
    assert apart(G, RECIPES, renderer).max() == 0


def test_compiled_images_are_the_same_and_few_sizes_are_compiled(device):
    G = generator(device)
    renderer, before = Renderer(G, Rendering(compiled=True)), compiles()
    renderer.prepare(2)
    renderer.prepare(4)
    prepared = compiles()
    assert prepared == before + 2
    for n in (1, 3, 4, 7):  # The last in two parts.
        assert apart(G, RECIPES[:n], renderer).max() <= 1
    assert compiles() == prepared
    assert [renderer.fits(n) for n in (2, 3, 4, 57)] == [2, 2, 4, 56]


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_is_near(device, compiled):
    G = generator(device)
    renderer = Renderer(G, Rendering("bf16", compiled))
    renderer.prepare(4)
    differences = apart(G, RECIPES, renderer)
    assert differences.max() > 0
    assert differences.mean() < 0.5  # 0.25 on a CPU, and 2 at most.
    assert differences.max() <= 6


def test_torch_never_gives_up_compiling(monkeypatch):
    # By default it does after 8 compilations of a function.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    renderer, before = Renderer(generator(), Rendering(compiled=True)), compiles()
    for size in range(1, 10):
        renderer.prepare(size)
    assert compiles() == before + 9


def test_a_sampler_compiles_before_it_serves(storage, monkeypatch):
    monkeypatch.setattr(serving.loading, "BATCH_SECONDS", 60.0)
    monkeypatch.setattr(serving.loading, "MAX_BATCH_IMAGES", 2)
    G = trained()
    add_imported("compiled", G)
    version = model_name(find_model("compiled@best"))
    sampler = Sampler(None, rendering=Rendering(compiled=True))

    async def serve():
        model, before = await sampler.model(version), compiles()
        assert model.limit == 2
        assert model.renderer.compiled
        made = [await sampler.synthesize(version, RECIPES[:n]) for n in (1, 2, 7)]
        assert compiles() == before
        return made

    plain = synthesize(G, RECIPES, find_directions(G)).astype(int)
    for images in asyncio.run(serve()):
        assert np.abs(images - plain[: len(images)]).max() <= 1


def test_where_nothing_can_be_compiled_images_are_made_all_the_same(monkeypatch):
    def broken(*_arguments, **_options):
        def forward(*_inputs):
            raise RuntimeError("no C compiler")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    G = generator()
    with pytest.raises(RuntimeError, match="no C compiler"):
        Renderer(G, Rendering(compiled=True)).prepare(1)
    renderer = Renderer(G, Rendering())
    renderer.compiled, renderer._forward, renderer._pool = True, broken(), None  # As on a GPU.
    renderer.prepare(1)
    recipes = [Recipe(classes={1: 1.0}, seed=seed) for seed in range(3)]
    assert apart(G, recipes, renderer).max() == 0
