"""Put the weights of another implementation into the model store."""

from __future__ import annotations

from dataclasses import dataclass

from biggan.commands import parse, run_command
from biggan.exchange import Format, WeightFiles, import_weights


@dataclass(frozen=True)
class ImportWeights:
    """Make a model of weights of BigGAN-PyTorch or pytorch-pretrained-BigGAN.

    Resolution, width, classes, attention and conditioning are read off the weights. The first
    version becomes `best`.

    python jobs/import_weights.py --format biggan-pytorch --weights G_ema.pth --name imagenet128

    python jobs/import_weights.py --format biggan-deep-hf --weights pytorch_model.bin --name deep256
    """

    format: Format
    """biggan-pytorch: ajbrock/BigGAN-PyTorch, BigGAN and BigGAN-deep; biggan-deep-hf:
    huggingface/pytorch-pretrained-BigGAN."""
    weights: str
    """The generator's file (G_ema.pth, G.pth or pytorch_model.bin), path or URI."""
    name: str
    """Name of the model."""
    config: str | None = None
    """Of biggan-deep-hf: its configuration; by default config.json beside the weights."""
    discriminator: str | None = None
    """Of biggan-pytorch: D.pth, to be kept with the model."""
    classes: str | None = None
    """Text file with a class name a line; by default classes are named by their numbers."""
    bn_eps: float | None = None
    """Of biggan-pytorch: its --BN_eps, by default 1e-5; 1e-4 for what TFHub/converter.py wrote."""
    force: bool = False
    """Point `best` to this version even if there are others."""
    licence: str = ""
    """Licence of the weights, for the model's card."""
    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def main() -> None:
    """Import what the command line names."""
    command = parse(ImportWeights)
    done = import_weights(
        WeightFiles(
            format=command.format,
            weights=command.weights,
            config=command.config,
            discriminator=command.discriminator,
            classes=command.classes,
            bn_eps=command.bn_eps,
        ),
        command.name,
        licence=command.licence,
        force=command.force,
        root=command.storage,
    )
    G, card = done.G, done.card
    print(
        f"model {card.name}@{card.version}: {G.config.architecture} of {G.resolution} pixels,"
        f" ch {G.config.ch_g}, z {G.z_dim}, {G.n_classes} classes,"
        f" {'with' if done.D else 'without'} its discriminator"
    )
    print(f"best {'points to it' if done.is_best else 'stays; --force moves it'}")
    print(f"samples: {done.folder}/samples.png")
    print(f"next: make serve MODEL={card.name}@{'best' if done.is_best else card.version}")


if __name__ == "__main__":
    run_command(main)
