"""Extractors: the built-in classifier and its floor, Inception's file, networks of one's own."""

import hashlib
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch import nn

from biggan.config import ConfigError
from biggan.errors import UserError
from biggan.metrics import weights
from biggan.metrics.extractors import (
    Classifier,
    check_accuracy,
    check_extractor,
    held_out_accuracy,
    load_extractor,
    train_classifier,
)
from biggan.metrics.weights import ExtractorError, inception_weights
from biggan.parallel import CPU
from biggan.pixels import from_uint8
from biggan.storage import Folder, StorageError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
CONTENT = b"weights" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


# The classifier.


def test_the_classifier_is_deterministic_and_accurate(digits):
    first, accuracy = train_classifier(digits, CPU, progress=lambda line: None)
    assert accuracy > 0.97
    again, _ = train_classifier(digits, CPU, progress=lambda line: None)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert held_out_accuracy(digits.folder) == pytest.approx(accuracy, abs=5e-5)


def test_features_and_logits_of_the_classifier(digits):
    extractor = load_extractor("classifier", digits.folder, CPU)
    found = extractor(digits.images[:9])
    network = extractor.network
    assert torch.equal(found.features, network.features(from_uint8(digits.images[:9])))
    assert torch.equal(found.logits, network.logits(from_uint8(digits.images[:9])))
    assert (found.logits.argmax(1) == digits.labels[:9]).all()
    assert found.features.shape == (9, extractor.dim)
    assert (extractor.name, extractor.resize) == ("classifier", "none")


@pytest.mark.parametrize("resolution", [8, 32, 128, 256, 512])
def test_the_classifier_takes_all_sizes(resolution):
    network = Classifier(resolution, 3, 1000).eval()
    images = torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8)
    features, logits = network(images)
    assert (features.shape, logits.shape) == ((2, 128), (2, 1000))
    side = network.body[0](from_uint8(images)).shape[-1]
    assert side == min(resolution, 128)


def test_a_dataset_without_its_classifier(tmp_path):
    with pytest.raises(StorageError, match=r"classifier.safetensors is missing: prepare"):
        held_out_accuracy(Folder(str(tmp_path)))


@pytest.mark.parametrize(
    "counts,floor",
    [
        # p + p (1 - p) less two standard errors over a tenth of the images.
        ([500] * 2, 0.75 - 2 * (0.25 / 100) ** 0.5),
        ([500] * 10, 0.19 - 2 * (0.09 / 500) ** 0.5),
        ([5400, 600], 0.95 - 2 * (0.09 / 600) ** 0.5),  # Half way to 1.
        ([1300] * 1000, 0.001999 - 2 * (0.000999 / 130_000) ** 0.5),
        ([30] * 10, 0.1),  # Never under the largest class's share.
    ],
)
def test_the_floor_of_accuracy(counts, floor):
    check_accuracy(floor + 1e-6, counts)
    with pytest.raises(ExtractorError, match=f"must be {floor:.1%} or more"):
        check_accuracy(floor - 1e-6, counts)


def test_a_classifier_that_is_refused_says_what_to_do():
    with pytest.raises(UserError) as error:
        check_accuracy(0.12, [100] * 10)
    for part in ("12.0% of 100 held-out", "labels", "extractor inception", "--min-accuracy"):
        assert part in str(error.value)
    check_accuracy(0.12, [100] * 10, floor=0.1)
    check_accuracy(0, [100] * 10, floor=0)
    with pytest.raises(ExtractorError, match=r"must be 90.0% or more"):
        check_accuracy(0.8, [100] * 10, floor=0.9)
    with pytest.raises(ExtractorError, match=r"--min-accuracy is 90, must be from 0"):
        check_accuracy(0.8, [100] * 10, floor=90)


@pytest.mark.parametrize("counts", [[100], [100, 0], [1, 1, 1], [145, 145]])
def test_where_there_is_nothing_to_refuse(counts):
    check_accuracy(0.0, counts)


def test_shuffled_labels_are_refused(digits, monkeypatch):
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(digits, "labels", digits.labels[order])
    _, accuracy = train_classifier(digits, CPU, progress=lambda line: None)
    with pytest.raises(ExtractorError, match="check that the labels fit the images"):
        check_accuracy(accuracy, digits.info.counts)


# Names.


@pytest.mark.parametrize(
    "name,message",
    [
        ("vgg", "'vgg' is not known; known: classifier, inception, inception-tf, or the path"),
        ("inceptoin", "did you mean 'inception'?"),
        ("mine.onnx", r"a network file of your own (.pt, .pth, .ts, .torchscript, .pt2)"),
        ("nowhere/mine.pt", "there is no such file"),
        ("somewhere/inception.pt", "cannot have the built-in name 'inception'; rename it"),
    ],
)
def test_unknown_extractors(digits, name, message):
    for check in (check_extractor, lambda name: load_extractor(name, digits.folder, CPU)):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check(name)


# Inception's weights file.


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT whole, cut off, altered, or not at all, and counts."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/absent":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        body = {"/cut": CONTENT[:999], "/other": CONTENT[::-1]}.get(self.path, CONTENT)
        return self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for variable in (weights.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("BIGGAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_weights_are_fetched_once(server, cache, monkeypatch, capsys):
    monkeypatch.setattr(weights, "SHA256", HASH)
    monkeypatch.setattr(weights, "URL", f"{server}/{weights.FILE}")
    first, again = inception_weights(), inception_weights()
    assert first.content == again.content == CONTENT
    assert first.sha256 == HASH
    assert Server.asked == [f"/{weights.FILE}"]
    assert [file.name for file in cache.iterdir()] == [weights.FILE]
    assert "fetching http://127.0.0.1" in capsys.readouterr().err
    (cache / weights.FILE).write_bytes(b"half")
    assert inception_weights().content == CONTENT
    assert "is damaged, fetching it again" in capsys.readouterr().err


def test_weights_of_a_url_of_ones_own(server, cache):
    spec = f"{server}/mine#sha256={HASH.upper()}"
    assert inception_weights(spec).content == inception_weights(spec).content == CONTENT
    assert len(Server.asked) == 1


@pytest.mark.parametrize(
    "path,message",
    [
        ("cut", "cannot be fetched from"),
        ("other", f"has SHA-256 .*, you expect {HASH}"),
        ("absent", "404"),
    ],
)
def test_a_download_that_fails_leaves_nothing(server, cache, path, message):
    with pytest.raises(ExtractorError, match=message):
        inception_weights(f"{server}/{path}#sha256={HASH}")
    assert list(cache.iterdir()) == []


def test_without_a_network(cache, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # Nobody listens.
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/{weights.FILE}"
        monkeypatch.setattr(weights, "URL", url)
        with pytest.raises(UserError) as error:
            load_extractor("inception", Folder("/nowhere"), CPU)
    said = str(error.value)
    for part in (weights.FILE, f"put the file at {cache / weights.FILE}", "Connection refused",
                 "--inception-weights PATH", "--extractor classifier"):  # fmt: skip
        assert part in said
    assert "0x" not in said


def test_weights_from_a_path_a_uri_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "mine.pth"
    file.write_bytes(CONTENT)
    for source in (str(file), file.as_uri()):
        assert inception_weights(f"{source}#sha256={HASH}").content == CONTENT
    monkeypatch.setenv(weights.VARIABLE, f"{file}#sha256={HASH}")
    assert inception_weights().content == CONTENT


def test_other_weights_than_the_published_are_refused(tmp_path):
    file = tmp_path / "mine.pth"
    file.write_bytes(CONTENT)
    with pytest.raises(ExtractorError) as error:
        inception_weights(str(file))
    assert f"has SHA-256 {HASH}, the published" in str(error.value)
    assert weights.SHA256 in str(error.value)
    mend = re.search("--inception-weights '(.*)'", str(error.value))[1]
    assert inception_weights(mend).content == CONTENT
    with pytest.raises(ExtractorError, match="64 hexadecimal digits"):
        inception_weights(f"{file}#sha256=6726825d")
    with pytest.raises(ExtractorError, match=r"none is there.*--inception-weights PATH"):
        inception_weights(str(tmp_path / "absent.pth"))


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("BIGGAN_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(weights.cache_folder()) == "/home/me/.cache/biggan"
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert str(weights.cache_folder()) == "/shared/biggan"


# Networks of one's own.


class Mine(nn.Module):
    """Average colour of quarters as features; a logit of each channel."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        x = nn.functional.adaptive_avg_pool2d(images.float() * self.scale, 2).flatten(1)
        return x, x[:, :2]


class Bare(Mine):
    """Features alone."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def scripted(network, path):
    torch.jit.script(network).save(path)
    return str(path)


def exported(network, path, shapes=({0: torch.export.Dim.DYNAMIC},)):
    images = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), path)
    return str(path)


@pytest.mark.parametrize("save,suffix", [(scripted, "pt"), (exported, "pt2")])
@pytest.mark.parametrize("kind", [Mine, Bare])
def test_a_network_of_ones_own(digits, tmp_path, save, suffix, kind):
    file = save(kind(), tmp_path / f"mine.{suffix}")
    check_extractor(file)
    extractor = load_extractor(file, digits.folder, CPU)
    content = (tmp_path / f"mine.{suffix}").read_bytes()
    assert (extractor.name, extractor.dim) == ("mine", 4)
    assert extractor.fingerprint == hashlib.sha256(content).hexdigest()
    for n in (1, 2, 7, 512):
        found = extractor(digits.images[:n])
        x = digits.images[:n].float().view(n, 2, 8, 2, 8).mean((2, 4)).view(n, 4)
        assert torch.allclose(found.features, x, rtol=1e-5)
        assert (found.logits is None) == (kind is Bare)


class Nothing(nn.Module):
    def forward(self, images):
        return images.float()


class Short(nn.Module):
    def forward(self, images):
        return images[:1].flatten(1).float()


class Infinite(nn.Module):
    def forward(self, images):
        return images.flatten(1).float() / 0


class Three(nn.Module):
    def forward(self, images):
        x = images.flatten(1).float()
        return x, x, x


class Colour(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.conv(images.float()).mean((2, 3))


@pytest.mark.parametrize(
    "network,message",
    [
        (Nothing(), r"gives features \[2, 1, 16, 16\] for 2 images, must be \[2, dim\]"),
        (Short(), r"gives features \[1, 256\] for 2 images"),
        (Infinite(), "gives features that are not finite"),
        (Three(), "returns 3 values, must be features or a pair"),
        (Colour(), r"fails on uint8 images \[2, 1, 16, 16\].*channels"),
    ],
)
def test_networks_that_will_not_do(digits, tmp_path, network, message):
    file = scripted(network, tmp_path / "bad.pt")
    with pytest.raises(ExtractorError, match=message):
        load_extractor(file, digits.folder, CPU)


def test_an_export_with_a_fixed_number_of_images(digits, tmp_path):
    file = exported(Bare(), tmp_path / "fixed.pt2", shapes=None)
    with pytest.raises(ExtractorError, match="export it with a dynamic first dimension"):
        load_extractor(file, digits.folder, CPU)


def test_files_that_are_no_networks(digits, tmp_path):
    torch.save(Mine().state_dict(), tmp_path / "state.pth")
    for name, text in (("noise.pt", "TorchScript"), ("noise.pt2", "exported program")):
        (tmp_path / name).write_bytes(b"noise")
        with pytest.raises(ExtractorError, match=f"{name} is no[t]? .*{text}"):
            load_extractor(str(tmp_path / name), digits.folder, CPU)
    with pytest.raises(ExtractorError, match="a state dict or a pickled module will not do"):
        load_extractor(str(tmp_path / "state.pth"), digits.folder, CPU)
