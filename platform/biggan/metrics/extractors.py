"""Feature extractors: networks whose features FID compares.

FID names its features. `classifier` is the built-in default: a small convolutional network trained
on the dataset's own labels when it is prepared, so that FID works offline and on data that no
ImageNet network knows. Its FID is not comparable with the published Inception FID, and is never
shown without the extractor's name.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from biggan.config import ConfigError
from biggan.data.dataset import Dataset, DatasetInfo, Progress
from biggan.latents import Stream, rng
from biggan.pixels import from_uint8
from biggan.storage import Folder, StorageError


class Classifier(nn.Module):
    """A small convolutional classifier whose pooled last feature map is the feature vector."""

    FEATURES = 128

    def __init__(self, resolution: int, channels: int, n_classes: int) -> None:
        super().__init__()
        width = 32
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        side = resolution
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

    def forward(self, images: Tensor) -> Tensor:
        """Class logits `[N, n_classes]`."""
        logits: Tensor = self.head(self.features(images))
        return logits


@dataclass(frozen=True)
class Extractor:
    """A named feature network in evaluation mode, with the fingerprint of its weights."""

    name: str
    fingerprint: str
    dim: int
    network: Classifier

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Feature vectors `[N, dim]` of uint8 images `[N, C, H, W]` on any device."""
        device = next(self.network.parameters()).device
        return self.network.features(from_uint8(images.to(device)))


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
        loss = F.cross_entropy(network(images), dataset.labels[index].to(device))
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
    train, held_out = [], []
    for class_id in range(len(dataset.info.classes)):
        members = shuffled[dataset.labels[shuffled] == class_id]
        n = min(max(1, len(members) // 10), len(members) - 1)
        held_out.append(members[:n])
        train.append(members[n:])
    return torch.cat(train), torch.cat(held_out)


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
        logits = network(from_uint8(dataset.images[index].to(device)))
        right += int((logits.argmax(1).cpu() == dataset.labels[index]).sum())
    return right / max(1, len(indices))


CLASSIFIER_FILE = "reference/classifier.safetensors"


def save_classifier(network: Classifier, accuracy: float, dataset: Dataset, folder: Folder) -> None:
    """Write the extractor into a dataset's folder."""
    shape = {key: str(value) for key, value in dataset.info.shape.items()}
    metadata = {**shape, "held_out_accuracy": f"{accuracy:.4f}"}
    tensors = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    folder.write_bytes(CLASSIFIER_FILE, save(tensors, metadata))


def check_extractor(name: str) -> None:
    """Raise `ConfigError` unless there is an extractor of that name."""
    if name != "classifier":
        raise ConfigError(f"extractor {name!r} is not known; known: classifier")


def load_extractor(name: str, dataset_folder: Folder, device: torch.device) -> Extractor:
    """The extractor `name` for a dataset; raises `UserError` if there is none such."""
    check_extractor(name)
    try:
        content = dataset_folder.read_bytes(CLASSIFIER_FILE)
    except FileNotFoundError:
        raise StorageError(
            f"{dataset_folder}/{CLASSIFIER_FILE} is missing: prepare the dataset again with"
            " --overwrite"
        ) from None
    network = Classifier(**DatasetInfo.read(dataset_folder).shape)
    network.load_state_dict(load(content))
    network.to(device).eval().requires_grad_(False)
    fingerprint = hashlib.sha256(content).hexdigest()
    return Extractor(name, fingerprint, Classifier.FEATURES, network)
