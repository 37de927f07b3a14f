"""How well held-out images are found in a generator's latent space, and small ones enlarged.

    python jobs/prepare.py --source digits --name digits --resolution 16 --held-out 0.1
    python jobs/train.py --preset digits --name quickstart
    python jobs/promote.py --run quickstart --name digits
    python benchmarks/inversion.py --model digits@best --dataset digits --threads 1

Held-out images are made small and enlarged, with their class given and without, and inverted;
images of G, whose latents are known to exist, are inverted too. Prints a table in Markdown, of each
image's best candidate: the part that the dataset's classifier (which no search looks at) gives the
class of the original, PSNR to what was given, SSIM to the original, and seconds an image.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from machine import BenchmarkError, choose_device, describe
from train_step import positive

from biggan.data.dataset import Dataset, DatasetInfo
from biggan.errors import UserError
from biggan.inversion import Inversion, downsample, invert, ssim, upscale
from biggan.metrics.extractors import Extractor, load_extractor
from biggan.models import load_generator
from biggan.networks import Generator
from biggan.pixels import from_uint8
from biggan.storage import locate

Search = Callable[[np.ndarray, int], Inversion]
"""What is done with an image, uint8 `[H, W, C]`, and its class."""
MATCHED = 30.0
"""PSNR in dB from which on an image counts as matched."""
COLUMNS = ("", "classified as it", "PSNR: median", "a tenth below", "least", "30 dB or more",
           "SSIM", "s an image")  # fmt: skip


@dataclass
class Found:
    """What became of the images of one row, in their order."""

    kept: list[bool] = field(default_factory=list)
    """Whether the classifier gives the class of the original."""
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def row(self, name: str) -> str:
        """A row of the table."""
        least, tenth, median = np.quantile(self.psnr, [0, 0.1, 0.5])
        return (
            f"| {name} | {np.mean(self.kept):.1%} | {median:.1f} | {tenth:.1f} | {least:.1f} |"
            f" {np.mean(np.array(self.psnr) >= MATCHED):.1%} | {np.mean(self.ssim):.3f} |"
            f" {np.median(self.seconds):.2f} |"
        )


def measure(search: Search, judge: Extractor, images: np.ndarray, labels: Sequence[int]) -> Found:
    """Do `search` with each image, and judge the best candidate."""
    found = Found()
    for image, label in zip(images, labels, strict=True):
        begin = time.perf_counter()
        result = search(image, label)
        found.seconds.append(time.perf_counter() - begin)
        best, original = (torch.tensor(x).permute(2, 0, 1)[None] for x in (result.images[0], image))
        logits = judge(best).logits
        assert logits is not None
        found.kept.append(int(logits.argmax()) == label)
        found.psnr.append(result.psnr[0])
        found.ssim.append(float(ssim(from_uint8(best), from_uint8(original))))
    return found


def searches(G: Generator, factors: Sequence[int], **options: int) -> Iterator[tuple[str, Search]]:
    """The searches for held-out images, by what they are called in the table."""

    def enlarged(factor: int, given: bool) -> Search:
        return lambda image, label: upscale(
            G,
            downsample(image, factor),
            factor=factor,
            class_ids=[label] if given else None,
            **options,
        )

    for factor in factors:
        yield f"enlarged {factor} times, class given", enlarged(factor, True)
        yield f"enlarged {factor} times, class found", enlarged(factor, False)
    yield "inverted, class found", lambda image, _label: invert(G, image, **options)


def held_out(name: str, root: str | None, most: int) -> tuple[Dataset, np.ndarray, list[int]]:
    """The dataset's held-out images `[N, H, W, C]` and their classes, at most so many."""
    if not DatasetInfo.read(locate("datasets", name, root)).held_out:
        raise BenchmarkError(f"dataset {name} holds no images out: prepare it with --held-out 0.1")
    dataset = Dataset.open(name, root, split="held_out")
    images = dataset.images[:most].permute(0, 2, 3, 1).numpy()  # type: ignore[union-attr]
    return dataset, images, dataset.labels[:most].tolist()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How well held-out images are found in a generator's latent space.",
        epilog="example: python benchmarks/inversion.py --model digits@best --dataset digits",
    )
    parser.add_argument("--model", required=True, help="NAME@ALIAS or NAME@VERSION")
    parser.add_argument("--dataset", required=True, help="one prepared with --held-out")
    parser.add_argument("--storage", help="storage root, path or URI; by default $BIGGAN_STORAGE,"
                        " else ./storage")  # fmt: skip
    parser.add_argument("--images", type=positive, default=1_000_000, help="at most; default: all")
    parser.add_argument("--factors", type=int, nargs="*", default=[2, 4], help="default: 2 4")
    parser.add_argument("--candidates", type=positive, default=4)
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    G = load_generator(args.model, root=args.storage, device=device)
    dataset, images, labels = held_out(args.dataset, args.storage, args.images)
    judge = load_extractor("classifier", dataset.folder, torch.device("cpu"))
    print(f"torch {torch.__version__}, {describe(device)}; {len(images)} held-out images,"
          f" {args.candidates} candidates, {args.steps} steps")  # fmt: skip
    print("\n|" + "".join(f" {name} |" for name in COLUMNS) + "\n|" + "---|" * len(COLUMNS))
    figures = {}
    options = {"candidates": args.candidates, "steps": args.steps}
    for name, search in searches(G, args.factors, **options):
        figures[name] = measure(search, judge, images, labels)
        print(figures[name].row(name), flush=True)
    # From seeds that no search draws its starts with.
    name = "G's own, inverted, class found"
    figures[name] = measure(search, judge, G.sample(labels, seed=0), labels)
    print(figures[name].row(name))
    if args.json:
        args.json.write_text(json.dumps({name: asdict(one) for name, one in figures.items()}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
