"""The benchmarks as they are run, on networks small enough for seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from biggan.config import SpeedConfig

ROOT = Path(__file__).parents[2]
PEER = os.environ.get("BIGGAN_PYTORCH", "")
TINY = "--resolution 32 --ch 1 --n-classes 3 --threads 1 --device cpu --rounds 1 --steps 1"


def benchmark(script, *flags):
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def train_step(tmp_path, *flags):
    """The figures of one run, as its JSON has them, and what it printed."""
    run = benchmark("train_step", *TINY.split(), *flags, "--json", tmp_path / "figures.json")
    assert run.returncode == 0, run.stderr
    return json.loads((tmp_path / "figures.json").read_text()), run.stdout


def flops_of_one_image():
    """Multiplications and additions of a step a real image, at 32 pixels and ch 1, by hand.

    Convolutions and linear layers only: 2 x inputs to each output x outputs.
    """

    def conv(in_ch, out_ch, kernel, side):
        return 2 * in_ch * kernel**2 * out_ch * side**2

    chunk, width = 30, 4
    g = g_first = 2 * chunk * width * 16
    for side in (8, 16, 32):
        # conv1 reads four of the small image's pixels for each of the large one's; the shortcut
        # runs before it is enlarged; two norms have a gain and a bias each.
        g += conv(width, width, 2, side) + conv(width, width, 3, side)
        g += conv(width, width, 1, side // 2) + 4 * 2 * (chunk + 128) * width
    g += conv(width, 3, 3, 32)
    d = 0
    for in_ch, side in ((3, 32), (width, 16)):
        # conv2 is one 4x4 kernel of stride 2.
        d += conv(in_ch, width, 3, side) + conv(width, width, 4, side // 2)
        d += conv(in_ch, width, 1, side // 2)
    d += 2 * 2 * conv(width, width, 3, 8) + 2 * width
    d_first = conv(3, width, 3, 32) + conv(3, width, 1, 16)
    # G runs forward for D's fakes, then forward and backward; D forward and backward on the reals
    # and on the fakes, then on fakes again. A backward costs two forwards, but one where only
    # the gradient of D's input is wanted, and where nobody wants that of a first layer's input.
    return g + (3 * g - g_first) + 2 * (3 * d - d_first) + 2 * d


def test_figures_of_a_step(tmp_path):
    figures, said = train_step(tmp_path, "--batch-size", 4)
    ours = figures["trainers"]["ours"]
    assert ours["error"] == ""
    assert len(ours["seconds"]) == 1
    assert ours["images_per_second"] == pytest.approx(4 / ours["seconds"][0])
    assert ours["peak_memory_bytes"] > 1e6  # No less than a few copies of the weights.
    assert ours["precision"] == "float32"
    assert figures["config"]["model.ch_g"] == 1
    rate = figures["matmul_flops_per_second"]["float32"]
    share = ours["flops_per_step"] / ours["seconds_per_step"] / rate
    assert ours["share_of_matmul_rate"] == pytest.approx(share)
    assert "ours" in said

    # What else is counted, such as spectral norms, does not grow with the batch.
    larger, _ = train_step(tmp_path, "--batch-size", 8, "--set", "optim.lr_g=2e-4")
    assert larger["config"]["optim.lr_g"] == 2e-4
    grown = larger["trainers"]["ours"]["flops_per_step"] - ours["flops_per_step"]
    assert grown == pytest.approx(4 * flops_of_one_image(), rel=1e-3)


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--peer", "biggan=."], "peer 'biggan' is not known; known: biggan-pytorch, studiogan"),
        (["--peer", "biggan-pytorch=/nowhere"], "git clone https://github.com/ajbrock"),
        (["--peer", "studiogan"], "no checkout there"),
        (["--set", "optim.lr_q=1"], "optim.lr_q is no setting: did you mean optim.lr_"),
        (["--set", "optim.lr_g"], "write NAME=VALUE"),
    ],
)
def test_what_cannot_be_measured_is_told(flags, message):
    run = benchmark("train_step", *TINY.split(), *flags)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def checkout(tmp_path):
    """A folder that passes for a checkout of BigGAN-PyTorch until it is imported."""
    (tmp_path / "BigGAN.py").write_text("import a_package_that_is_not_there\n")
    return tmp_path


def test_a_peer_that_fails_does_not_end_the_benchmark(tmp_path):
    peer = f"biggan-pytorch={checkout(tmp_path)}"
    figures, said = train_step(tmp_path, "--batch-size", 4, "--peer", peer)
    assert "a_package_that_is_not_there" in figures["trainers"]["biggan-pytorch"]["error"]
    assert "pip install a_package_that_is_not_there" in said
    assert figures["trainers"]["ours"]["images_per_second"] > 0
    assert figures["ours_against"] == {}


def test_an_option_against_the_default(tmp_path):
    run = benchmark(
        "options", *TINY.split(), "--batch-size", 4, "--only", "reuse_fakes", "--json",
        tmp_path / "figures.json",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["settings"]) == ["reuse_fakes=True"]
    one = figures["settings"]["reuse_fakes=True"]
    assert one["error"] == ""
    ratio = one["seconds_of_default"][0] / one["seconds"][0]
    memory = one["peak_memory_bytes"] / one["peak_memory_bytes_of_default"]
    row = f"| reuse_fakes=True | {ratio:.2f} | {ratio:.2f} to {ratio:.2f} | {memory:.2f} |"
    assert run.stdout.splitlines()[-1] == row


def test_every_option_can_be_measured():
    run = benchmark("options", "--only", "speed")
    assert run.returncode == 1
    known = set(run.stderr.strip().partition("those are ")[2].split(", "))
    assert known == set(SpeedConfig.model_fields) - {"auto_accumulate"}


def test_ray_overhead_tells_what_it_measures():
    run = benchmark("ray_overhead", "--help")
    assert run.returncode == 0, run.stderr
    assert "--threads" in run.stdout


def test_scaling_measures_what_it_models(tmp_path):
    run = benchmark(
        "scaling", "measure", *TINY.split(), "--batch-size", 2, "--workers", 2, "--json",
        tmp_path / "figures.json",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    alone, together = (figures["seconds"][way][0] for way in ("alone", "together"))
    assert figures["ratios"]["efficiency"] == [pytest.approx(alone / together)]
    assert figures["images_per_second"] == pytest.approx([2 / alone, 4 / together])
    assert "measured together" in run.stdout.splitlines()[-1]


def test_scaling_says_what_it_assumes(tmp_path):
    flags = ["scaling", "model", "--preset", "imagenet64", "--gpus", 8, 16]
    flags += ["--kernel-microseconds", 0, "--json"]
    run = benchmark(*flags, tmp_path / "figures.json")
    assert run.returncode == 0, run.stderr
    assert "ASSUMED, not measured: a GPU sustains 25% of its peak" in run.stdout
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["gpus"], row["batch"]) for row in rows] == [(8, 64), (16, 32)]
    assert rows[1]["efficiency"] < rows[0]["efficiency"] <= 1.01

    # A GPU that was measured to take as long as assumed changes nothing but the heading.
    again = ["--step-seconds", f"64={rows[0]['compute']}"]
    run = benchmark(*flags, tmp_path / "figures.json", *again)
    assert run.returncode == 0, run.stderr
    assert "MEASURED: a GPU sustains 25.0% at 64 images of its peak" in run.stdout
    measured = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert measured[0]["step"] == pytest.approx(rows[0]["step"])


def test_what_an_image_costs_a_sampler():
    flags = "--resolution 32 --ch 1 --images 1 3 --rounds 2"
    run = benchmark("forward", *flags.split())
    assert run.returncode == 0, run.stderr
    *_, one, three = run.stdout.splitlines()
    for row, images in ((one, 1), (three, 3)):
        n, *costs = [float(cell) for cell in row.strip("| ").split("|")]
        assert n == images
        assert len(costs) == 5
        assert all(cost > 0 for cost in costs)


def test_a_simulated_cluster_schedules_a_sweep(tmp_path):
    run = benchmark(
        "simulated_cluster", "--nodes", 2, "--trials", 3, "--seconds", 0.2, "--reports", 2,
        "--reserve", 0.5, "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["nodes"], figures["trials"], figures["concurrent"]) == (2, 3, 2)
    held = figures["overhead_seconds"] + figures["own_seconds"]
    assert held == pytest.approx(2 * figures["wall_seconds"] / 3)
    assert figures["state_bytes"] > 0


def test_convergence_wants_a_dataset_that_the_peer_can_read(digits, tmp_path):
    peer = f"biggan-pytorch={checkout(tmp_path)}"
    run = benchmark("convergence", "--peer", peer, "--dataset", digits.folder.uri)
    assert run.returncode == 1
    assert "only knows RGB: prepare it anew: python jobs/prepare.py" in run.stderr
    assert "--resolution 32 --mode rgb" in run.stderr


@pytest.mark.skipif(not PEER, reason="BIGGAN_PYTORCH names no checkout of ajbrock/BigGAN-PyTorch")
def test_against_biggan_pytorch(tmp_path):
    peer = f"biggan-pytorch={PEER}"
    figures, said = train_step(tmp_path, "--batch-size", 4, "--peer", peer)
    ours, theirs = (figures["trainers"][name] for name in ("ours", "biggan-pytorch"))
    assert theirs["error"] == ""
    assert theirs["parameters"] == ours["parameters"]
    assert theirs["flops_per_step"] > ours["flops_per_step"]  # Ours folds resampling.
    against = figures["ours_against"]["biggan-pytorch"]
    assert against["images_per_second"] == pytest.approx(
        theirs["seconds_per_step"] / ours["seconds_per_step"]
    )
    assert "ours : biggan-pytorch" in said
