"""The arithmetic of `benchmarks/scaling.py`: by hand, and beside what torch itself sends."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from biggan import presets
from biggan.config import RunConfig
from biggan.parallel import CPU, Workers
from biggan.training import TrainStep, build

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import scaling
from scaling import GRADIENT, SYNC, UPDATE, Cluster, Event, Link, Machine, Trace, Way
from trainers import Work

GB = 10**9
SLOW = Link(alpha=10e-6, bandwidth=100e9 / 8)
"""100 Gb/s: 12.5 GB/s."""
MACHINE = Machine(
    gpus=8,
    peak={"bfloat16": 1000e12},
    memory_bandwidth=1e12,
    inside=Link(alpha=1e-6, bandwidth=400e9),
    network=100,
    dollars=40.0,
)
CLUSTER = Cluster(MACHINE, network=100, link_share=1.0)


def test_a_ring_moves_the_fewest_bytes():
    # Each of 8 sends 7/8 GB twice: 1.75 / 12.5 s, and 14 messages.
    assert scaling.ring(1 * GB, 8, SLOW) == pytest.approx(0.14 + 140e-6)
    assert scaling.ring(1 * GB, 1, SLOW) == 0


def test_doubling_sends_the_fewest_messages():
    # 3 rounds, in each of which the whole GB goes once.
    assert scaling.doubling(1 * GB, 8, SLOW) == pytest.approx(3 * (0.08 + 10e-6))
    assert scaling.doubling(1000, 64, SLOW) == pytest.approx(6 * (10e-6 + 80e-9))
    assert scaling.doubling(1000, 9, SLOW) == pytest.approx(4 * (10e-6 + 80e-9))


def test_halving_moves_what_a_ring_does_in_fewer_messages():
    # 2 x 3 messages for the ring's 14.
    assert scaling.halving(1 * GB, 8, SLOW) == pytest.approx(0.14 + 60e-6)


def test_all_reduce_goes_through_nodes():
    # In one node: 14/8 GB over 400 GB/s and 14 messages.
    inside = 1.75 / 400 + 14e-6
    assert CLUSTER.all_reduce(1 * GB, 8) == pytest.approx(inside)
    # 16 GPUs are two nodes: a ring of two moves 1 GB over 12.5, as doubling does, in two messages
    # for its one.
    network = scaling.NETWORK
    assert CLUSTER.all_reduce(1 * GB, 16) == pytest.approx(inside + 0.08 + network)
    # 64 nodes: 126 messages in a ring, or 12, or 6, which is best for little to send.
    small = CLUSTER.all_reduce(1000, 512)
    assert small == pytest.approx(14e-6 + 1.75 * 1000 / 400e9 + 6 * (network + 80e-9))
    large = CLUSTER.all_reduce(1 * GB, 512)
    assert large == pytest.approx(inside + 2 * 63 / 64 * 0.08 + 12 * network)
    half = Cluster(MACHINE, network=100, link_share=0.5)
    assert half.all_reduce(1 * GB, 8) == pytest.approx(2 * 1.75 / 400 + 14e-6)


def a_trace(*events, flops=100):
    return Trace(tuple(events), flops, kernels=10, fixed_bytes=0, images=8)


MIB = scaling.MIB


@pytest.mark.parametrize(
    "way,seconds",
    [
        # One second of computing; gradients are ready at 0.5 and 0.8, and take 0.4 each: the first
        # is there at 0.9, the second goes only then.
        (Way(), 1.3),
        (Way(overlap=False), 1.8),
        (Way(gradient_bytes=0.5), 1.0),
    ],
)
def test_gradients_travel_beside_the_backward(way, seconds):
    found = a_trace(
        Event(GRADIENT, 50, 30 * MIB), Event(GRADIENT, 80, 30 * MIB), Event(UPDATE, 100)
    )
    cost = scaling.play(found, 1.0, lambda n_bytes: 0.4 * n_bytes / (30 * MIB), way)
    assert cost == pytest.approx(seconds)


def test_computing_waits_for_batch_norm_and_for_what_was_sent_before():
    found = a_trace(
        Event(GRADIENT, 20, 2 * MIB), Event(SYNC, 30, 100), Event(UPDATE, 100), flops=100
    )

    def reduce(n_bytes):
        return 0.5 if n_bytes >= MIB else 0.1

    # Sent at 0.2, the gradient is there at 0.7; only then goes the norm's, until 0.8; 0.7 are left.
    assert scaling.play(found, 1.0, reduce) == pytest.approx(1.5)
    # In a group of its own it takes from 0.3 to 0.4.
    assert scaling.play(found, 1.0, reduce, Way(own_group=True)) == pytest.approx(1.1)


def test_buckets_fill_before_they_go():
    sent = []
    sizes = (0.5, 0.75, 10, 20, 1)
    events = [Event(GRADIENT, k, int(size * MIB)) for k, size in enumerate(sizes)]
    found = a_trace(*events, Event(UPDATE, 100), Event(GRADIENT, 100, 7), Event(UPDATE, 100))
    scaling.play(found, 1.0, lambda n_bytes: sent.append(n_bytes) or 0.0)
    assert sent == [1.25 * MIB, 30 * MIB, 1 * MIB, 7]


def test_hours_and_dollars():
    # 1000 TFLOP at a quarter of a peak of 1000 TFLOP/s are 4 s, on one node, 8 images a GPU.
    config = RunConfig().override({"total_kimg": 64, "optim.batch_size": 64})
    model = scaling.Model(config, 32, 10, micro_batch=8)
    work = Trace((), int(1000e12), kernels=1000, fixed_bytes=int(1e12), images=8)
    model._traces = {(8, 8, 1): work, (1, 8, 1): work, (64, 1, 1): work}
    given = scaling.Assumptions(CLUSTER, "bfloat16", [(1, 0.25)], 1e-3, storage=1e9)
    row = model.row(8, given, spot=0.5)
    assert row.step == pytest.approx(4 + 1)  # And a second for 1 TB of memory traffic.
    assert row.images_per_second == pytest.approx(64 / 5)
    assert row.efficiency == pytest.approx(1)
    assert row.hours == pytest.approx(64_000 / 12.8 / 3600)
    assert row.dollars == pytest.approx(40 * row.hours)
    assert row.dollars_spot == pytest.approx(20 * row.hours)
    # 64 GPUs are 8 nodes.
    assert model.row(64, given, spot=0.5).dollars == pytest.approx(
        8 * 40 * model.row(64, given, spot=0.5).hours
    )
    # A host that takes 10 ms to start each of 1000 kernels is slower than the GPU.
    slow = scaling.Assumptions(CLUSTER, "bfloat16", [(1, 0.25)], 1e-2, storage=1e9)
    assert model.row(8, slow, spot=0.5).step == pytest.approx(10)
    # 8 GPUs x 8 images x 3 x 32 x 32 bytes = 196,608, at 1 KB/s.
    starved = scaling.Assumptions(CLUSTER, "bfloat16", [(1, 0.25)], 1e-3, storage=8e-6)
    assert model.row(8, starved, spot=0.5).step == pytest.approx(196.608)


def test_a_measured_step_gives_its_share_of_peak():
    given = scaling.Assumptions(CLUSTER, "bfloat16", [(8, 0.2), (16, 0.4)], 0.0, storage=100)
    work = Trace((), int(100e12), kernels=0, fixed_bytes=0, images=8)
    assert scaling.fraction_of(0.5, work, given) == pytest.approx(0.2)
    assert given.compute(work, 8) == pytest.approx(0.5)
    assert given.compute(work, 12) == pytest.approx(0.1 / 0.3)
    assert given.compute(work, 64) == pytest.approx(0.25)


def test_alpha_and_beta_are_found_again():
    sizes = [2**k for k in range(8, 28, 4)]
    alpha, beta = scaling.fit(sizes, [100e-6 + size / 5e9 for size in sizes])
    assert (alpha, 1 / beta) == pytest.approx((100e-6, 5e9))


def test_batch_norm_of_the_papers_network_by_hand():
    config = presets.get("imagenet128").override({"optim.batch_size": 2})
    found = scaling.trace(config, 128, 1000, workers=64)
    # Channels of 11 norms: 5 before each block's first convolution, 5 before its second, the last.
    channels = 96 * ((16 + 16 + 8 + 4 + 2) + (16 + 8 + 4 + 2 + 1) + 1)
    # G runs forward 3 times, two moments in float64; backward once, two means in float32.
    assert found.total(SYNC) == (4 * 11, (3 * 16 + 8) * channels)
    # D's gradients go twice, G's once, less the biases that batch norm takes out: those before each
    # block's second norm, and after the attention two more.
    idle = 96 * ((16 + 8 + 4 + 2 + 1) + 2)
    assert found.total(GRADIENT)[1] == 4 * (70_433_988 - idle + 2 * 87_982_370)


@pytest.fixture
def pretended_group():
    """A process group of two whose other half is not there, and which sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_what_is_counted_is_what_torch_sends(pretended_group, monkeypatch):
    config = RunConfig().override(
        {"optim.batch_size": 4, "optim.num_D_steps": 2, "model.ch_g": 32, "model.ch_d": 32,
         "model.z_dim": 32, "optim.accumulation": 2}
    )  # fmt: skip
    state = build(config, resolution=32, channels=3, n_classes=5, device=CPU)
    step = TrainStep(config, state, Workers.current(CPU))
    inputs = Work(config, 32, 5, CPU).inputs()
    reductions, buckets = [], []
    monkeypatch.setattr(dist, "all_reduce", lambda t: reductions.append(t.nbytes))

    def hook(_state, bucket):
        buckets.append(bucket.buffer().nbytes)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    for network in (step.D_update, step.G_update):
        network.register_comm_hook(None, hook)
    step(inputs)  # Torch sorts its buckets anew after the first.
    reductions.clear()
    buckets.clear()
    step(inputs)
    found = scaling.trace(config, 32, 5, workers=2)
    assert [e.n_bytes for e in found.events if e.kind == SYNC] == reductions
    sent = []
    scaling.play(
        Trace(tuple(e for e in found.events if e.kind != SYNC), found.flops, 0, 0, 8),
        1.0,
        lambda n_bytes: sent.append(n_bytes) or 0.0,
    )
    assert len(buckets) > 3  # More than one for a network.
    assert sent == buckets
