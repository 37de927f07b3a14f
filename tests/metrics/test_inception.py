"""Inception against the originals: golden values, and checkouts of them where there are any.

`inception.json` holds what the originals' own code computes, under the weights of `random_state`,
for the images of `pictures`. It was written, at pytorch-fid b9c1811 and torch-fidelity 5e211a9,
by

    PYTORCH_FID=CHECKOUT TORCH_FIDELITY=CHECKOUT PYTHONPATH=platform \
      python tests/metrics/test_inception.py

which needs torchvision, as pytorch-fid does. With these variables the comparison is made anew.
"""

import hashlib
import importlib
import io
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from biggan.metrics.extractors import load_extractor
from biggan.metrics.inception import Inception, resize_like_tensorflow
from biggan.metrics.weights import ExtractorError
from biggan.parallel import CPU
from biggan.storage import Folder

GOLDEN = Path(__file__).with_name("inception.json")
SIDES = (16, 32, 64, 128, 299, 512)
NETWORKS = ("inception", "inception-tf")
KEPT = slice(None, None, 32)
"""Features and logits that the golden file keeps."""


def uniform(key, shape):
    """Numbers in [-1, 1): Philox's raw output, which no version of numpy may change."""
    n = int(np.prod(shape))
    bits = np.random.Philox(key=[2015, key]).random_raw((n + 1) // 2).view(np.uint32)[:n]
    return torch.from_numpy((bits / 2.0**31 - 1).astype(np.float32)).view(shape)


def random_state():
    """A state dict under which activations neither vanish nor grow, and every number counts."""
    state = {}
    for i, (name, like) in enumerate(sorted(Inception().state_dict().items())):
        drawn = uniform(i, like.shape) if like.dim() else like
        if name.endswith("running_var"):
            drawn = 1 + drawn / 2
        elif name.endswith("bn.weight"):
            drawn = 1 + drawn / 4
        elif name.endswith(("bias", "running_mean")):
            drawn = drawn / 4
        elif like.dim() > 1:
            drawn = drawn * (6 / like[0].numel()) ** 0.5
        if like.dim():  # Not the counters of batches.
            state[name] = drawn
    return state


def pictures(side):
    """Two uint8 RGB images, smooth and noisy: `[2, 3, side, side]`."""
    x = torch.linspace(-1, 1, side)
    waves = torch.sin(x[:, None] * 3 + torch.cos(x * 5) + torch.arange(3).view(3, 1, 1))
    noise = uniform(10_000 + side, (3, side, side))
    return (torch.stack([waves, noise]) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def save(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def extractors(state, tmp_path_factory):
    """Both of ours, as users load them."""
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    file.write_bytes(save(state))
    spec = f"{file}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}"
    return {
        name: load_extractor(name, Folder("/nowhere"), CPU, inception_weights=spec)
        for name in NETWORKS
    }


# The originals.


def original_pytorch_fid(checkout, state):
    """Features of uint8 images by pytorch-fid's own network."""
    sys.path.insert(0, f"{checkout}/src")
    # Its compiled operators, which need the build of torch that it was made for, are not needed.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("none"))
    pytest.importorskip("torchvision", reason="pytorch-fid needs torchvision")
    module = importlib.import_module("pytorch_fid.inception")
    module.load_state_dict_from_url = lambda *args, **kwargs: state
    network = module.InceptionV3([3]).eval()
    return lambda images: {"features": network(images.float() / 255)[0][:, :, 0, 0]}


def original_torch_fidelity(checkout, state):
    """Features and logits of uint8 images by torch-fidelity's own network."""
    package = types.ModuleType("torch_fidelity")  # Its __init__ wants what images are read with.
    package.__path__ = [f"{checkout}/torch_fidelity"]
    sys.modules["torch_fidelity"] = package
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    module.load_state_dict_from_url = lambda *args, **kwargs: state
    outputs = ["2048", "logits_unbiased"]
    network = module.FeatureExtractorInceptionV3("inception", outputs)
    return lambda images: dict(zip(("features", "logits"), network(images), strict=True))


ORIGINALS = {
    "inception": ("PYTORCH_FID", original_pytorch_fid),
    "inception-tf": ("TORCH_FIDELITY", original_torch_fidelity),
}


def assert_close(ours, theirs):
    """To 1e-4 of the value, and where a value is nearly 0, of the values' size."""
    size = theirs.square().mean().sqrt()
    worst = ((ours - theirs).abs() / theirs.abs().clamp(min=0.1 * size)).max().item()
    norm = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"apart by {norm:.1e} in the norm, {worst:.1e} at worst")
    assert worst < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_against_golden_values(extractors, name):
    golden = json.loads(GOLDEN.read_text())[name]
    for side in SIDES:
        found = extractors[name](pictures(side))
        for what, theirs in golden[str(side)].items():
            assert_close(getattr(found, what)[:, KEPT], torch.tensor(theirs))


@pytest.mark.parametrize("name", NETWORKS)
def test_against_the_original(extractors, state, name):
    variable, load = ORIGINALS[name]
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name a checkout of the original")
    original = load(os.environ[variable], state)
    for side in SIDES:
        with torch.inference_mode():
            theirs = original(pictures(side))
        found = extractors[name](pictures(side))
        for what, values in theirs.items():
            assert_close(getattr(found, what), values)


def write_golden():
    """Write `inception.json` from the originals."""
    golden, state = {}, random_state()
    for name, (variable, load) in ORIGINALS.items():
        original = load(os.environ[variable], state)
        golden[name] = {}
        for side in SIDES:
            with torch.inference_mode():
                found = original(pictures(side))
            golden[name][side] = {
                what: [[float(f"{x:.8g}") for x in row] for row in values[:, KEPT].tolist()]
                for what, values in found.items()
            }
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


# Ours by itself.


def test_what_an_extractor_says_of_itself(extractors):
    ours, tensorflows = (extractors[name] for name in NETWORKS)
    assert (ours.name, ours.dim) == ("inception", 2048)
    assert ours.resize == "bilinear to 299 (half-pixel centres)"
    assert tensorflows.resize == "bilinear to 299 (TensorFlow 1)"
    assert ours.fingerprint == tensorflows.fingerprint
    features = [extractor(pictures(32)).features for extractor in (ours, tensorflows)]
    assert not torch.allclose(*features, rtol=1e-3)


def test_grey_images_are_repeated(extractors):
    grey = pictures(32)[:, :1]
    colour = grey.expand(-1, 3, -1, -1)
    for extractor in extractors.values():
        assert torch.equal(extractor(grey).features, extractor(colour).features)
    with pytest.raises(ExtractorError, match=r"images have 4 channels.*--extractor classifier"):
        extractors["inception"](torch.zeros(1, 4, 32, 32, dtype=torch.uint8))


def test_resize_like_tensorflow_by_hand():
    # From 2 pixels to 4: pixel i is read at i / 2, and the last has no right neighbour.
    row = torch.tensor([0.0, 8.0])
    image = row.view(1, 1, 1, 2).expand(-1, -1, 2, -1)
    assert resize_like_tensorflow(image, 4)[0, 0, 0].tolist() == [0, 4, 8, 8]
    assert resize_like_tensorflow(image.mT, 4)[0, 0, :, 0].tolist() == [0, 4, 8, 8]
    assert resize_like_tensorflow(image, 1).tolist() == [[[[0.0]]]]


def test_counters_of_batches_may_be_there(state):
    network = Inception()
    network.load_weights(save(state), "without")
    counters = {n: v for n, v in network.state_dict().items() if n.endswith("batches_tracked")}
    assert counters
    network.load_weights(save(state | counters), "with")
    assert torch.equal(network.Mixed_7c.branch_pool.bn.running_var,
                       state["Mixed_7c.branch_pool.bn.running_var"])  # fmt: skip


@pytest.mark.parametrize(
    "change,message",
    [
        ({"fc.bias": None}, r"file lacks fc.bias \(the first of 1\)"),
        ({"AuxLogits.fc.bias": torch.zeros(1)}, r"unexpected AuxLogits.fc.bias \(the first of 1\)"),
        ({"fc.bias": torch.zeros(1000)}, r"fc.bias has shape \[1000\], must be \[1008\]"),
        ({"fc.bias": "text"}, r"fc.bias has shape None, must be \[1008\]"),
    ],
)
def test_weights_that_do_not_fit(state, change, message):
    changed = {k: v for k, v in (state | change).items() if v is not None}
    with pytest.raises(ExtractorError, match=message):
        Inception().load_weights(save(changed), "file")


def test_files_that_are_no_weights():
    for content, message in ((b"noise", "no PyTorch weights file"), (save([1]), "holds a list")):
        with pytest.raises(ExtractorError, match=message):
            Inception().load_weights(content, "file")


if __name__ == "__main__":
    write_golden()
