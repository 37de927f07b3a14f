"""Feature extractors: networks whose features FID and its companions compare.

A figure names its features. `classifier` is the built-in default: a small convolutional network
trained on the dataset's own labels when it is prepared, so that FID works offline and on data that
no ImageNet network knows. `inception` gives the published FID's features, and `inception-tf` the
same network's with TensorFlow 1's resize. The path or URI of a TorchScript or exported file names
a network of one's own. Figures of different extractors do not compare.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from biggan.config import ConfigError
from biggan.data.dataset import Dataset, DatasetInfo, Progress
from biggan.latents import Stream, rng
from biggan.metrics.inception import FEATURES, Inception, Resize
from biggan.metrics.weights import ExtractorError, WeakClassifierError, inception_weights, read_file
from biggan.pixels import from_uint8
from biggan.storage import Folder, StorageError, absolute

INCEPTIONS: dict[str, Resize] = {
    "inception": "half-pixel centres",  # As pytorch-fid has it.
    "inception-tf": "TensorFlow 1",  # As torch-fidelity has it.
}
KNOWN = ("classifier", *INCEPTIONS)
TORCHSCRIPT = (".pt", ".pth", ".ts", ".torchscript")
EXPORTED = ".pt2"
CLASSIFIER_FILE = "reference/classifier.safetensors"


@dataclass(frozen=True)
class Activations:
    """What an extractor finds in a batch of images."""

    features: Tensor
    """float32 `[N, dim]`."""
    logits: Tensor | None
    """float32 `[N, K]`; None where the network has no classes."""


@dataclass(frozen=True)
class Extractor:
    """A named feature network in evaluation mode, with the fingerprint of its weights."""

    name: str
    """One of `KNOWN`, or the stem of a file's name."""
    fingerprint: str
    """SHA-256 of its weights file."""
    dim: int
    """Length of a feature vector."""
    resize: str
    """How images reach the size of its input."""
    network: nn.Module
    """Gives features, or features and logits, of uint8 images `[N, C, H, W]`."""

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Activations:
        """Features and logits of uint8 images `[N, C, H, W]` on any device."""
        held = chain(self.network.parameters(), self.network.buffers())
        device = next((tensor.device for tensor in held), images.device)
        # TensorFloat-32, which training may have switched on, is off by up to 1e-3.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return _activations(self.network(images.to(device)))


def _activations(out: Any) -> Activations:
    features, logits = out if isinstance(out, tuple) else (out, None)
    return Activations(features.float(), None if logits is None else logits.float())


class Classifier(nn.Module):
    """A small convolutional classifier whose pooled last feature map is the feature vector."""

    FEATURES = 128
    WORKING_SIDE = 128

    def __init__(self, resolution: int, channels: int, n_classes: int) -> None:
        """The first convolution brings images of more than `WORKING_SIDE` pixels down to those."""
        super().__init__()
        width = 32
        stride = max(1, resolution // self.WORKING_SIDE)
        first = nn.Conv2d(channels, width, stride + 2, stride=stride, padding=1)
        layers: list[nn.Module] = [first, nn.ReLU()]
        side = resolution // stride
        while side > 4:
            wider = min(width * 2, self.FEATURES)
            layers += [
                nn.Conv2d(width, wider, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.ReLU(),
            ]
            width, side = wider, side // 2
        layers += [nn.Conv2d(width, self.FEATURES, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.FEATURES, n_classes)

    def features(self, images: Tensor) -> Tensor:
        """Feature vectors `[N, FEATURES]` of images in [-1, 1]."""
        pooled: Tensor = self.body(images).mean((2, 3))
        return pooled

    def logits(self, images: Tensor) -> Tensor:
        """Class logits `[N, n_classes]` of images in [-1, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and class logits of uint8 images."""
        features = self.features(from_uint8(images))
        return features, self.head(features)


def train_classifier(
    dataset: Dataset, device: torch.device, progress: Progress
) -> tuple[Classifier, float]:
    """Train the built-in extractor; returns it with its accuracy on held-out images, in [0, 1].

    A tenth of the images, drawn by class, is held out. The others are seen about 12 times, shifted
    by up to a sixteenth of their side, in no fewer than 100 and no more than 4,000 batches.
    """
    train, held_out = _stratified_split(dataset)
    batch = min(64, len(train))
    steps = min(max(12 * len(train) // batch, 100), 4000)
    draws = rng(0, Stream.CLASSIFIER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(**dataset.info.shape).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        index = train[torch.from_numpy(draws.integers(len(train), size=batch))]
        images = _shift(from_uint8(dataset.images[index].to(device)), draws)
        loss = F.cross_entropy(network.logits(images), dataset.labels[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 5) == 0:
            progress(f"classifier for FID: step {step + 1}/{steps}, loss {loss.item():.3f}")
    network.eval().requires_grad_(False)
    return network, _accuracy(network, dataset, held_out, device)


def _stratified_split(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out: a tenth of each class, at least one where it has two."""
    shuffled = torch.from_numpy(rng(0, Stream.SPLIT).permutation(len(dataset)))
    labels = dataset.labels[shuffled]
    train, held_out = [], []
    for class_id in range(len(dataset.info.classes)):
        members = shuffled[labels == class_id]
        n = _held_out(len(members))
        held_out.append(members[:n])
        train.append(members[n:])
    return torch.cat(train), torch.cat(held_out)


def _held_out(count: int) -> int:
    """How many of a class's `count` images are held out."""
    return max(0, min(max(1, count // 10), count - 1))


def _shift(images: Tensor, draws: np.random.Generator) -> Tensor:
    reach = max(1, images.shape[-1] // 16)
    dy, dx = draws.integers(-reach, reach + 1, size=2)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    side = images.shape[-1]
    return padded[:, :, reach + dy : reach + dy + side, reach + dx : reach + dx + side]


@torch.inference_mode()
def _accuracy(
    network: Classifier, dataset: Dataset, indices: Tensor, device: torch.device
) -> float:
    right = 0
    for index in indices.split(512):
        logits = network.logits(from_uint8(dataset.images[index].to(device)))
        right += int((logits.argmax(1).cpu() == dataset.labels[index]).sum())
    return right / max(1, len(indices))


ENOUGH_TO_TELL = 30
"""Held-out images from which on a classifier's accuracy says something about its features."""


def check_accuracy(accuracy: float, counts: Sequence[int], floor: float | None = None) -> None:
    """Raise `WeakClassifierError` if a classifier of held-out `accuracy` has features of no use.

    `counts` are the images of each class. The default floor lies above the share p of the largest
    class, which needs no look at the images, by p (1 - p) but at most half way to 1, less the two
    standard errors by which the accuracy over so few images may be off. With one class, or fewer
    than `ENOUGH_TO_TELL` images held out, there is nothing to refuse by default.
    """
    if floor is not None and not 0 <= floor <= 1:
        raise ExtractorError(f"--min-accuracy is {floor}, must be from 0 (never refuse) to 1")
    held_out = sum(map(_held_out, counts))
    if sum(count > 0 for count in counts) < 2 or held_out == 0:
        return
    p = max(counts) / sum(counts)
    if floor is None:
        if held_out < ENOUGH_TO_TELL:
            return
        floor = max(p, p + min(p, 0.5) * (1 - p) - 2 * math.sqrt(p * (1 - p) / held_out))
    if accuracy < floor:
        raise WeakClassifierError(
            f"the classifier whose features FID would compare gets {accuracy:.1%} of {held_out:,}"
            f" held-out images right, must be {floor:.1%} or more (always the largest class:"
            f" {p:.1%}): check that the labels fit the images, give more images, or lower"
            " --min-accuracy and compare other features (--eval.extractor inception)"
        )


def save_classifier(network: Classifier, accuracy: float, dataset: Dataset, folder: Folder) -> None:
    """Write the extractor into a dataset's folder."""
    shape = {key: str(value) for key, value in dataset.info.shape.items()}
    metadata = {**shape, "held_out_accuracy": f"{accuracy:.4f}"}
    tensors = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    folder.write_bytes(CLASSIFIER_FILE, save(tensors, metadata))


def held_out_accuracy(folder: Folder) -> float:
    """Accuracy, in [0, 1], of a dataset's classifier on the images held out of its training."""
    content = _classifier_file(folder)
    size = int.from_bytes(content[:8], "little")  # safetensors: a length, then JSON.
    return float(json.loads(content[8 : 8 + size])["__metadata__"]["held_out_accuracy"])


def _classifier_file(folder: Folder) -> bytes:
    try:
        return folder.read_bytes(CLASSIFIER_FILE)
    except FileNotFoundError:
        raise StorageError(
            f"{folder}/{CLASSIFIER_FILE} is missing: prepare the dataset again with --overwrite"
        ) from None


def check_extractor(name: str) -> None:
    """Raise `ConfigError` unless `name` is known, or a file that `load_extractor` would read."""
    if name in KNOWN:
        return
    suffix, stem = _suffix(name), _stem(name)
    files = ", ".join((*TORCHSCRIPT, EXPORTED))
    if suffix not in (*TORCHSCRIPT, EXPORTED):
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"extractor {name!r} is not known; known: {', '.join(KNOWN)}, or the path of a network"
            f" file of your own ({files}){hint}"
        )
    if stem in KNOWN:
        raise ConfigError(
            f"extractor {name!r}: a file of your own cannot have the built-in name {stem!r};"
            " rename it"
        )
    place = Folder(absolute(name))
    if not place.parent.exists(place.name):
        raise ConfigError(f"extractor {name!r}: there is no such file")


def _suffix(name: str) -> str:
    return PurePosixPath(urlsplit(name).path).suffix.lower()


def _stem(name: str) -> str:
    return PurePosixPath(urlsplit(name).path).stem


def load_extractor(
    name: str,
    dataset_folder: Folder,
    device: torch.device,
    *,
    inception_weights: str | None = None,
) -> Extractor:
    """The extractor `name` for a dataset; raises `UserError` if there is none such.

    `inception_weights` are as in `biggan.metrics.weights.inception_weights`.
    """
    check_extractor(name)
    if name == "classifier":
        return _load_classifier(dataset_folder, device)
    if name in INCEPTIONS:
        return load_inception(name, device, inception_weights)
    return _load_own(name, DatasetInfo.read(dataset_folder), device)


def _load_classifier(folder: Folder, device: torch.device) -> Extractor:
    content = _classifier_file(folder)
    network = Classifier(**DatasetInfo.read(folder).shape)
    network.load_state_dict(load(content))
    network.to(device).eval().requires_grad_(False)
    fingerprint = hashlib.sha256(content).hexdigest()
    return Extractor("classifier", fingerprint, Classifier.FEATURES, "none", network)


def load_inception(name: str, device: torch.device, spec: str | None = None) -> Extractor:
    """`inception` or `inception-tf`; raises `ExtractorError` if its weights are not to be had."""
    weights = inception_weights(spec)
    network = Inception(INCEPTIONS[name])
    network.load_weights(weights.content, weights.source)
    network.eval().requires_grad_(False).fold()
    resize = f"bilinear to 299 ({INCEPTIONS[name]})"
    return Extractor(name, weights.sha256, FEATURES, resize, network.to(device))


def _load_own(name: str, info: DatasetInfo, device: torch.device) -> Extractor:
    """The network of a file of the user's own, tried on images of the dataset's shape."""
    content = read_file(name, "give the path of a TorchScript or exported file")
    read = _read_exported if _suffix(name) == EXPORTED else _read_torchscript
    network = read(name, content, device)
    dim = _try(name, network, info, device)
    fingerprint = hashlib.sha256(content).hexdigest()
    return Extractor(_stem(name), fingerprint, dim, "its own", network)


def _read_torchscript(name: str, content: bytes, device: torch.device) -> nn.Module:
    try:
        network: nn.Module = torch.jit.load(io.BytesIO(content), map_location=device)
    except RuntimeError as error:
        raise ExtractorError(
            f"{name} is not TorchScript ({str(error).splitlines()[0]}): a state dict or a pickled"
            " module will not do, because it does not say what to compute; write it with"
            " torch.jit.script(network).save(PATH), or torch.jit.trace, or with torch.export to a"
            f" {EXPORTED} file"
        ) from None
    return network.eval()


def _read_exported(name: str, content: bytes, device: torch.device) -> nn.Module:
    try:
        program = torch.export.load(io.BytesIO(content))
    except Exception as error:  # Of many kinds, as what is in the file.
        raise ExtractorError(
            f"{name} is no exported program ({str(error).splitlines()[0]}): write it with"
            " torch.export.save(torch.export.export(network, (images,), dynamic_shapes=...), PATH)"
        ) from None
    network: nn.Module = program.module().to(device)
    return network


def _try(name: str, network: nn.Module, info: DatasetInfo, device: torch.device) -> int:
    """The length of the network's feature vectors; raises `ExtractorError` if it is unfit.

    Two batch sizes are tried: a traced or exported network may have its example's baked in.
    """
    dims = set()
    for n in (2, 3):
        shape = (n, info.channels, info.resolution, info.resolution)
        pixels = rng(0, Stream.MEASURES).integers(256, size=shape, dtype=np.uint8)
        try:
            with torch.inference_mode():
                out = network(torch.from_numpy(pixels).to(device))
        except Exception as error:  # Whatever somebody's network raises.
            raise ExtractorError(
                f"{name} fails on uint8 images {list(shape)}: {_last_line(error)}. A network takes"
                " any number of such images; export it with a dynamic first dimension:"
                " dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
            ) from None
        dims.add(_check_output(name, out, n))
    if len(dims) > 1:
        raise ExtractorError(f"{name} gives feature vectors of different lengths: {sorted(dims)}")
    return dims.pop()


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _check_output(name: str, out: Any, n: int) -> int:
    parts = out if isinstance(out, tuple) else (out,)
    for what, part in zip(("features", "logits"), parts, strict=False):
        if what == "logits" and part is None:
            continue
        if not isinstance(part, Tensor) or part.dim() != 2 or len(part) != n or not part.numel():
            got = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ExtractorError(
                f"{name} gives {what} {got} for {n} images, must be [{n}, dim]: a network returns"
                " features, or a pair of features and logits"
            )
        if not part.isfinite().all():
            raise ExtractorError(
                f"{name} gives {what} that are not finite: it gets uint8 images from 0 to 255, and"
                " has to scale them itself"
            )
    if len(parts) not in (1, 2):
        raise ExtractorError(f"{name} returns {len(parts)} values, must be features or a pair")
    return int(parts[0].shape[1])
