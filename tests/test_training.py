"""The training step against arithmetic done again, and against itself in parts."""

import copy

import pytest
import torch

from biggan.config import RunConfig
from biggan.losses import LOSSES, orthogonal_penalty, regularized_weights
from biggan.parallel import CPU
from biggan.training import Fakes, Reals, StepInputs, TrainStep, build

SHAPE = {"resolution": 8, "channels": 1, "n_classes": 3}


def config(**changes):
    base = {
        "model.ch_g": 2,
        "model.ch_d": 2,
        "model.z_dim": 8,
        "model.shared_dim": 4,
        "optim.batch_size": 8,
        "loss.ortho_g": 0.0,
        "ema.decay": 0.9,
    }
    return RunConfig().override(base | {k.replace("__", "."): v for k, v in changes.items()})


def inputs(run, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = run.optim.batch_size // run.optim.accumulation

    def labels():
        return torch.randint(3, (n,), generator=generator)

    def fakes():
        return Fakes(torch.randn(n, 8, generator=generator), labels())

    def reals():
        return Reals(torch.rand(n, 1, 8, 8, generator=generator) * 2 - 1, labels())

    parts = range(run.optim.accumulation)
    d = [[(reals(), fakes()) for _ in parts] for _ in range(run.optim.num_D_steps)]
    return StepInputs(d, [fakes() for _ in parts])


def test_a_step_is_what_the_paper_says():
    """One step with plain gradient descent in the optimizers' place, done again by hand."""
    run = config(loss__ortho_g=0.01, loss__ortho_d=0.02)
    state = build(run, **SHAPE, device=CPU)
    state.optim_G = torch.optim.SGD(state.G.parameters(), lr=0.1)
    state.optim_D = torch.optim.SGD(state.D.parameters(), lr=0.2)
    G, D, G_ema = (copy.deepcopy(n) for n in (state.G, state.D, state.G_ema))
    given = inputs(run)
    losses = TrainStep(run, state)(given)

    def descend(network, loss, lr):
        parameters = [p for p in network.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p -= lr * gradient

    (reals, fakes), generated_from = given.d[0][0], given.g[0]
    with torch.no_grad():
        generated = G(fakes.z, fakes.labels)
    logits = D(torch.cat([reals.images, generated]), torch.cat([reals.labels, fakes.labels]))
    loss = LOSSES["hinge"].d(logits[:8], logits[8:])
    penalty = sum(orthogonal_penalty(w, "modified") for w in regularized_weights(D))
    descend(D, loss + 0.02 * penalty, 0.2)
    assert losses["loss_D"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert losses["D_real"].item() == pytest.approx(logits[:8].mean().item(), rel=1e-4)

    loss = -D(G(generated_from.z, generated_from.labels), generated_from.labels).mean()
    penalty = sum(orthogonal_penalty(w, "modified") for w in regularized_weights(G))
    descend(G, loss + 0.01 * penalty, 0.1)
    assert losses["loss_G"].item() == pytest.approx(loss.item(), rel=1e-4)
    for ours, by_hand in ((state.G, G), (state.D, D)):
        for name, p in by_hand.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], p, atol=1e-5), name
    for name, p in G_ema.state_dict().items():  # Buffers are averaged too.
        expected = 0.9 * p + 0.1 * G.state_dict()[name]
        assert torch.allclose(state.G_ema.state_dict()[name], expected, atol=1e-5), name


def test_averaging_starts_where_it_should():
    run = config(ema__start_kimg=0.016)  # Two steps of eight images.
    state = build(run, **SHAPE, device=CPU)
    step = TrainStep(run, state)
    for _ in range(2):
        step(inputs(run))
        for a, b in zip(state.G_ema.parameters(), state.G.parameters(), strict=True):
            assert torch.equal(a, b)
    step(inputs(run))
    assert not torch.equal(state.G_ema.linear.weight, state.G.linear.weight)


def test_several_D_steps_update_D_alone():
    run = config(optim__num_D_steps=3)
    state = build(run, **SHAPE, device=CPU)
    step = TrainStep(run, state)
    given = inputs(run)
    step(given)
    assert state.images_seen == 24
    moments = state.optim_D.state[state.D.linear.weight]["step"], state.optim_G.state
    assert moments[0] == 3
    assert moments[1][state.G.linear.weight]["step"] == 1


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """D has no batch norm, and its spectral norms barely move: two halves make one whole."""
    whole, halves = config(), config(optim__accumulation=2)
    gradients = []
    for run in (whole, halves):
        state = build(run, **SHAPE, device=CPU)
        for norm in (m for m in state.D.modules() if hasattr(m, "u")):
            for _ in range(50):  # So that one iteration more or less makes no difference.
                norm.normalized_weight()
        state.G.eval()
        step = TrainStep(run, state)
        (reals, fakes), _g = inputs(whole).d[0][0], None
        parts = [slice(0, 8)] if run is whole else [slice(0, 4), slice(4, 8)]
        step._update_D(
            [
                (
                    Reals(reals.images[part], reals.labels[part]),
                    Fakes(fakes.z[part], fakes.labels[part]),
                )
                for part in parts
            ],
            lend=False,
        )
        gradients.append([p.grad.clone() for p in state.D.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build(config(), **SHAPE, device=CPU)
    torch.manual_seed(2)
    second = build(config(), **SHAPE, device=CPU)
    third = build(config(seed=5), **SHAPE, device=CPU)
    assert torch.equal(first.G.linear.weight, second.G.linear.weight)
    assert torch.equal(first.D.linear.u, second.D.linear.u)
    assert not torch.equal(first.G.linear.weight, third.G.linear.weight)


def test_gradients_of_D_are_spared_in_Gs_update():
    run = config()
    state = build(run, **SHAPE, device=CPU)
    step = TrainStep(run, state)
    state.optim_D.zero_grad()
    step._update_G(inputs(run).g, [])
    assert all(p.grad is None for p in state.D.parameters())
    assert all(p.requires_grad for p in state.D.parameters())
