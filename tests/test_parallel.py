"""Workers together compute what one would alone: real processes, over gloo."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from biggan.config import ConfigError, RunConfig
from biggan.data.batches import Batches
from biggan.data.dataset import Dataset
from biggan.layers import CrossReplicaBatchNorm2d
from biggan.parallel import CPU, Workers
from biggan.training import StepInputs, TrainStep, build


@contextmanager
def joined(rank, size, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size)
    yield Workers.current(CPU)
    # Without it the interpreter may end while gloo's threads run, which aborts the process.
    dist.barrier()
    dist.destroy_process_group()


def normalize(rank, size, folder):
    with joined(rank, size, folder / "rendezvous") as workers:
        normalize_part(workers, rank, size, folder)


def normalize_part(workers, rank, size, folder):
    x, grad = torch.load(folder / "in.pt")
    norm = CrossReplicaBatchNorm2d(x.shape[1], 1e-5)
    part = x.chunk(size)[rank].clone().requires_grad_()
    assert workers.mean(torch.tensor([rank + 1.0])).item() == 1.5
    assert workers.gather(torch.tensor([rank, 7])).tolist() == [0, 7, 1, 7]
    assert workers.agree(f"rank {rank}") == "rank 0"
    out = norm(part)
    out.backward(grad.chunk(size)[rank])
    torch.save((out.detach(), part.grad, norm.running_mean, norm.running_var), folder / f"{rank}")


def test_batch_norm_over_workers_is_that_of_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    # A mean far from 0 shows whether variances survive E[x^2] - E[x]^2.
    x, grad = 30 + torch.randn(8, 5, 4, 4), torch.randn(8, 5, 4, 4)
    torch.save((x, grad), tmp_path / "in.pt")
    mp.spawn(normalize, (2, tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    whole = CrossReplicaBatchNorm2d(5, 1e-5)
    x.requires_grad_()
    out = whole(x)
    out.backward(grad)
    assert torch.allclose(torch.cat([p[0] for p in parts]), out, atol=1e-5)
    assert torch.allclose(torch.cat([p[1] for p in parts]), x.grad, atol=1e-5)
    for _, _, mean, var in parts:
        assert torch.allclose(mean, whole.running_mean, rtol=1e-5)
        assert torch.allclose(var, whole.running_var, rtol=1e-5)


CONFIG = RunConfig().override(
    {
        "model.ch_g": 4,
        "model.ch_d": 4,
        "model.z_dim": 30,
        "model.attention": [8],
        "model.channel_attention": [16],
        "optim.batch_size": 64,
        "optim.num_D_steps": 2,
        "optim.accumulation": 2,
        "loss.ortho_g": 1e-3,
        "loss.ortho_d": 1e-3,
        "data.flip": True,
        "ema.decay": 0.9,
        "loss.r1": 0.1,
        "loss.lecam": 0.3,
        "loss.consistency": 1.0,
        "loss.topk": 0.5,
        "augment.name": "ada",
        "augment.ada_kimg": 1.0,
        "augment.ada_target": 0.01,
    }
)


def in_double(inputs):
    def convert(item):
        return replace(
            item,
            **{
                name: value.double()
                for name, value in vars(item).items()
                if value is not None and value.is_floating_point()
            },
        )

    d = [[(convert(real), convert(fake)) for real, fake in parts] for parts in inputs.d]
    return StepInputs(d, [convert(fake) for fake in inputs.g])


def train(workers, dataset, steps=5):
    """In float64: in float32 a value at the kink of a ReLU may fall to either side."""
    state = build(CONFIG, **dataset.info.shape, device=CPU)
    for network in (state.G, state.D, state.G_ema):
        network.double()
    batches = Batches(CONFIG, dataset, workers)
    step = TrainStep(CONFIG, state, workers)
    for _ in range(steps):
        step(in_double(batches.inputs(state.step)))
    return {name: getattr(state, name).state_dict() for name in ("G", "D", "G_ema")}


def train_part(rank, size, folder, dataset):
    with joined(rank, size, folder / "rendezvous") as workers:
        weights = train(workers, Dataset.open(dataset))
    torch.save(weights, folder / f"{rank}.pt")


def test_two_workers_follow_one(tmp_path, digits):
    mp.spawn(train_part, (2, tmp_path, digits.folder.uri), nprocs=2)
    alone = train(Workers(0, 1, CPU), digits)
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt")
        for name, weights in alone.items():
            for key, expected in weights.items():
                difference = (together[name][key] - expected).norm() / expected.norm()
                assert difference < 1e-9, f"{name}.{key} on rank {rank}"


def test_shares_cover_everything_once():
    for size in (1, 2, 3, 7):
        shares = [list(range(20))[Workers(rank, size, CPU).share(20)] for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(20))


def test_a_batch_that_does_not_divide(digits):
    with pytest.raises(ConfigError, match=r"64: does not divide among 3 workers x 2.*try 66"):
        Batches(CONFIG, digits, Workers(0, 3, CPU))
