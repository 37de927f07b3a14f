"""The training step against arithmetic done again, and against itself in parts."""

import copy

import pytest
import torch
import torch.nn.functional as F

from biggan.augmentation import NOISE, diff_augment, flip_and_shift
from biggan.config import ConfigError, RunConfig
from biggan.layers import spectral_norms
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

    def noise():
        return torch.rand(n, NOISE, generator=generator)

    def fakes():
        return Fakes(torch.randn(n, 8, generator=generator), labels(), noise())

    def reals():
        return Reals(torch.rand(n, 1, 8, 8, generator=generator) * 2 - 1, labels(), noise())

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


def in_double(state):
    for network in (state.G, state.D, state.G_ema):
        network.double()
    return state


def doubled(given):
    def convert(item):
        kind, tensors = type(item), vars(item).values()
        return kind(*(t.double() if t.is_floating_point() else t for t in tensors))

    d = [[(convert(reals), convert(fakes)) for reals, fakes in parts] for parts in given.d]
    return StepInputs(d, [convert(fakes) for fakes in given.g])


def test_all_penalties_on_D_done_again_by_hand():
    run = config(
        loss__r1=0.5,
        loss__r1_every=2,
        loss__lecam=0.3,
        loss__consistency=2.0,
        loss__consistency_fake=3.0,
        augment__name="diffaugment",
        model__attention=[8],
    )
    state = in_double(build(run, **SHAPE, device=CPU))
    state.running["anchors"].copy_(torch.tensor([0.7, -0.4, 1]))
    given = doubled(inputs(run))
    step = TrainStep(run, state)
    D = copy.deepcopy(state.D)
    reals, fakes = given.d[0][0]
    step._update_D(given.d[0], lend=False)

    with torch.no_grad():
        generated = copy.deepcopy(state.G)(fakes.z, fakes.labels)
    x = reals.images.clone().requires_grad_()

    def logits(images, labels):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return D(images, labels)

    policy = run.augment.policy
    D.eval()  # So that its power iterations begin all where the one of the step began.
    real = logits(diff_augment(x, reals.noise, policy), reals.labels)
    fake = logits(diff_augment(generated, fakes.noise, policy), fakes.labels)
    loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    loss = loss + 0.5 * 2 * 0.5 * slope.square().sum((1, 2, 3)).mean()  # gamma, every, half
    loss = loss + 0.3 * ((real + 0.4).square().mean() + (fake - 0.7).square().mean())
    moved = diff_augment(x, reals.noise, policy)
    moved = logits(flip_and_shift(moved, reals.noise), reals.labels)
    loss = loss + 2 * (real - moved).square().mean()
    moved = diff_augment(generated, fakes.noise, policy)
    moved = logits(flip_and_shift(moved, fakes.noise), fakes.labels)
    loss = loss + 3 * (fake - moved).square().mean()
    for p, q in zip(D.parameters(), state.D.parameters(), strict=True):
        (expected,) = torch.autograd.grad(loss, p, retain_graph=True)
        assert torch.allclose(q.grad, expected, atol=1e-9)
    anchors = [0.99 * 0.7 + 0.01 * real.mean().item(), 0.99 * -0.4 + 0.01 * fake.mean().item(), 1]
    assert state.running["anchors"].tolist() == pytest.approx(anchors)


def test_r1_is_left_out_between_its_steps():
    gradients = []
    for strength in (0.0, 5.0):
        run = config(loss__r1=strength, loss__r1_every=2)
        state = build(run, **SHAPE, device=CPU)
        state.step = 1
        TrainStep(run, state)._update_D(inputs(run).d[0], lend=False)
        gradients.append([p.grad for p in state.D.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_topk_learns_from_the_best_fakes_alone():
    run = config(loss__topk=0.25)  # Two of eight.
    state = in_double(build(run, **SHAPE, device=CPU))
    given = doubled(inputs(run)).g
    G, D = copy.deepcopy(state.G), copy.deepcopy(state.D).eval()
    TrainStep(run, state)._update_G(given, [])
    logits = D(G.train()(given[0].z, given[0].labels), given[0].labels)
    loss = -logits.topk(2).values.mean()
    parameters = [(p, q) for p, q in zip(G.parameters(), state.G.parameters(), strict=True)]
    for p, q in parameters:
        if p.requires_grad:
            (expected,) = torch.autograd.grad(loss, p, retain_graph=True)
            assert torch.allclose(q.grad, expected, atol=1e-9)


def test_adas_probability_follows_the_sign_of_D():
    run = config(augment__name="ada", augment__ada_kimg=0.08)  # A batch of 8 moves it by 0.1.
    state = build(run, **SHAPE, device=CPU)
    step = TrainStep(run, state)
    with torch.no_grad():
        state.D.linear.bias.fill_(100)
    assert step(inputs(run))["ada_p"].item() == pytest.approx(0.1)
    with torch.no_grad():
        state.D.linear.bias.fill_(-100)
    assert step(inputs(run))["ada_p"].item() == pytest.approx(0)


def test_lent_fakes_are_those_that_G_learns_from():
    run = config(speed__reuse_fakes=True, optim__num_D_steps=2)
    plain = config(optim__num_D_steps=2)
    given = doubled(inputs(run))
    lent = given.d[-1][0][1]
    states = [in_double(build(c, **SHAPE, device=CPU)) for c in (run, plain)]
    TrainStep(run, states[0])(given)
    TrainStep(plain, states[1])(StepInputs(given.d, [lent]))
    for a, b in zip(states[0].G.parameters(), states[1].G.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("architecture", ["biggan", "biggan-deep"])
def test_recomputation_changes_nothing(architecture):
    changes = {"model__architecture": architecture, "model__ch_g": 4, "model__ch_d": 4}
    states = []
    for recompute in (False, True):
        run = config(speed__recompute=recompute, loss__r1=1.0, **changes)
        state = in_double(build(run, **SHAPE, device=CPU))
        step = TrainStep(run, state)
        for seed in range(2):
            step(doubled(inputs(run, seed)))
        states.append(state)
    for name in ("G", "D", "G_ema"):
        first, second = (getattr(state, name).state_dict() for state in states)
        for key in first:
            assert torch.allclose(first[key], second[key], atol=1e-12), f"{name}.{key}"


def test_one_power_iteration_a_step_for_G_and_one_an_update_for_D():
    run = config(optim__num_D_steps=2, optim__accumulation=2)
    state = build(run, **SHAPE, device=CPU)
    for network in (state.G, state.D):  # Learning nothing, so that the iterations can be told.
        for group in (state.optim_G, state.optim_D):
            group.param_groups[0]["lr"] = 0.0
        for layer in spectral_norms(network).values():
            torch.nn.init.normal_(layer.weight)
    expected = {}
    for network, iterations in ((state.G, 1), (state.D, 3)):
        for layer in spectral_norms(network).values():
            u, W = layer.u.clone(), layer.weight.detach().flatten(1)
            for _ in range(iterations):
                v = F.normalize(u @ W, dim=0)
                u = F.normalize(W @ v, dim=0)
            expected[layer] = u
    TrainStep(run, state)(inputs(run))
    for layer, u in expected.items():
        assert torch.allclose(layer.u, u, atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(precision):
    losses = []
    for g, d in (("float32", "float32"), (precision, precision)):
        run = config(
            speed__precision_g=g,
            speed__precision_d=d,
            model__ch_g=8,
            model__ch_d=8,
            loss__ortho_g=1e-3,
            loss__lecam=0.1,
            optim__lr_d=1e-5,
        )
        state = build(run, **SHAPE, device=CPU)
        step = TrainStep(run, state)
        for seed in range(3):
            measured = step(inputs(run, seed))
        assert all(p.dtype == torch.float32 for p in state.G.parameters())
        assert state.scaler_D.is_enabled() == (d == "float16")
        losses.append(torch.stack(list(measured.values())))
    assert torch.allclose(losses[0], losses[1], rtol=0.05, atol=0.05)
    assert not torch.equal(losses[0], losses[1])


def test_half_precision_in_one_network_alone():
    run = config(speed__precision_d="bfloat16")
    state = build(run, **SHAPE, device=CPU)
    kinds = {}
    for name, layer in (("G", state.G.blocks[0].conv2), ("D", state.D.blocks[0].conv1)):
        layer.register_forward_hook(lambda _m, _i, out, name=name: kinds.update({name: out.dtype}))
    TrainStep(run, state)(inputs(run))
    assert kinds == {"G": torch.float32, "D": torch.bfloat16}


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"speed__precision_g": "tf32"}, "tf32 is a switch of the whole process; set both"),
        ({"speed__reuse_fakes": True, "optim__accumulation": 2}, "switch one of them off"),
        ({"loss__r1": 1.0, "speed__compile": "default"}, "loss.r1 1.0 differentiates twice"),
        ({"loss__r1": 1.0, "speed__precision_d": "float16"}, "too small for"),
        ({"speed__reuse_fakes": True, "speed__auto_accumulate": True}, "may have to split"),
        ({"speed__compile": "reduce-overhead", "optim__accumulation": 2}, "CUDA graphs"),
        ({"model__shared": False}, "hierarchical = False"),
        ({"model__architecture": "biggan-deep"}, "biggan-deep needs 4 or more"),
    ],
)
def test_what_does_not_go_together(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)
