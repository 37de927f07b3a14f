"""Named recipes: for what data and hardware each is meant, what it costs, and the FID it reached.

A preset is a function that returns a `RunConfig`. Change fields with `RunConfig.override`, by flags
of a command, or in YAML. A figure marked "not measured here" is somebody else's, for orientation.
"""

from __future__ import annotations

from collections.abc import Callable

from biggan.config import RunConfig
from biggan.errors import UserError


def digits() -> RunConfig:
    """scikit-learn's digits: 1,797 scans in ten classes, at 16 pixels in grey.

    Hardware: 2 CPU cores. Cost: about 3 minutes. Reached: FID 3.5 to 5 (classifier features, 2,000
    samples; `benchmarks/README.md`).
    """
    return laptop().override(
        {"dataset": "digits", "total_kimg": 70, "eval.every_kimg": 10, "eval.num_samples": 2000}
    )


def laptop() -> RunConfig:
    """Small networks for small images, to see a first result on a CPU: 8 to 32 pixels.

    Hardware: a few CPU cores. Cost: at 16 pixels 500 to 600 images a second on 2 cores. G is kept
    narrower than D, which on the digits gave the lower FID and the more varied samples.
    """
    return RunConfig().override(
        {
            "total_kimg": 200,
            "model.ch_g": 4,
            "model.ch_d": 8,
            "model.z_dim": 120,
            "model.shared_dim": 32,
            "optim.batch_size": 32,
            "optim.lr_g": 7e-4,
            "optim.lr_d": 2.8e-3,
            "ema.decay": 0.995,
            "eval.num_samples": 5000,
        }
    )


def standard(resolution: int = 128) -> RunConfig:
    """Images of one's own on one GPU, where no other recipe is named. Not measured here.

    BigGAN-PyTorch's learning rates and single D step, with a batch that one GPU holds.
    """
    z_dim = {256: 140, 512: 128}.get(resolution, 120)
    attention = [64] if resolution >= 128 else []
    return RunConfig().override(
        {
            "total_kimg": 5_000,
            "model.z_dim": z_dim,
            "model.attention": attention,
            "ema.decay": 0.999,
            "ema.start_kimg": 50,
            "eval.every_kimg": 50,
        }
    )


def cifar10() -> RunConfig:
    """The CIFAR recipe: 32 pixels, 50,000 images in ten classes.

    Hardware: one GPU. Cost: 100,000 steps of 5 D updates, 32,000 kimg. StudioGAN reports FID 4.16
    (Inception, train reference, 50,000 samples) with it; not measured here.
    """
    return RunConfig().override(
        {
            "total_kimg": 32_000,
            "model.ch_g": 96,
            "model.ch_d": 96,
            "model.z_dim": 80,
            "optim.lr_g": 2e-4,
            "optim.lr_d": 2e-4,
            "optim.num_D_steps": 5,
            "loss.ortho_g": 0.0,
            "ema.start_kimg": 320,
            "data.flip": True,
            "eval.every_kimg": 500,
        }
    )


def imagenet64() -> RunConfig:
    """64 pixels with the networks of the 128-pixel recipe less one block.

    Hardware: 8 GPUs. Not measured here.
    """
    return imagenet128().override({"model.ch_g": 64, "model.ch_d": 64, "optim.batch_size": 512})


def imagenet128() -> RunConfig:
    """The paper's ImageNet at 128 pixels (arXiv 1809.11096, table 1): ch 96, batch 2048.

    Hardware: the paper's 128 TPU cores; 64 GPUs of this kind of cluster. Cost: 150,000 steps of 2 D
    updates, 614,400 kimg. The paper reports FID 8.51 (Inception); not measured here.
    """
    return RunConfig().override(
        {
            "total_kimg": 614_400,
            "model.ch_g": 96,
            "model.ch_d": 96,
            "model.z_dim": 120,
            "model.attention": [64],
            "optim.batch_size": 2048,
            "optim.lr_g": 5e-5,
            "optim.lr_d": 2e-4,
            "optim.num_D_steps": 2,
            "ema.start_kimg": 20_000,
            "data.flip": True,
            "eval.every_kimg": 4_000,
            "eval.num_samples": 50_000,
        }
    )


def imagenet128_deep() -> RunConfig:
    """BigGAN-deep at 128 pixels (table 7): ch 128, z of 128. Not measured here."""
    return imagenet128().override(
        {
            "model.architecture": "biggan-deep",
            "model.ch_g": 128,
            "model.ch_d": 128,
            "model.z_dim": 128,
        }
    )


def imagenet256() -> RunConfig:
    """The paper's 256 pixels. The paper reports FID 8.7 (Inception); not measured here."""
    return imagenet128().override({"model.z_dim": 140})


def imagenet512() -> RunConfig:
    """The paper's 512 pixels: narrower, ch 64. Not measured here."""
    return imagenet128().override({"model.z_dim": 128, "model.ch_g": 64, "model.ch_d": 64})


PRESETS: dict[str, Callable[[], RunConfig]] = {
    preset.__name__: preset
    for preset in (
        digits,
        laptop,
        standard,
        cifar10,
        imagenet64,
        imagenet128,
        imagenet128_deep,
        imagenet256,
        imagenet512,
    )
}


def get(name: str) -> RunConfig:
    """The preset of that name; raises `UserError` if there is none."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is not known; there are: {', '.join(PRESETS)}")
    return PRESETS[name]()
