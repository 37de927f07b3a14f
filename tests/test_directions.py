"""Directions against the generator's own Jacobian; their names; the command that shows them."""

import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, add_imported, job
from PIL import Image

from biggan.config import ModelConfig
from biggan.directions import find_directions, read_names, write_names
from biggan.errors import UserError
from biggan.layers import SNLinear
from biggan.models import load_generator
from biggan.networks import Generator
from biggan.storage import StorageError

ARCHITECTURES = {
    "hierarchical": {},
    "flat": {"hierarchical": False},
    "unshared": {"hierarchical": False, "shared": False},
    "deep": {"architecture": "biggan-deep", "ch_g": 4, "ch_d": 4},
}


def generator(**config):
    torch.manual_seed(0)
    shape = {"ch_g": 2, "ch_d": 2, "z_dim": 12, "shared_dim": 8} | config
    G = Generator(ModelConfig(**shape), resolution=8, channels=3, n_classes=4)
    return G.eval().requires_grad_(False)


@pytest.fixture(params=ARCHITECTURES)
def G(request):
    return generator(**ARCHITECTURES[request.param])


def first_matrix(G):
    """A: the Jacobian of all that the latent's linear layers give, its rows of unit length."""
    outputs = []
    layers = [m for m in G.modules() if isinstance(m, SNLinear)]
    hooks = [m.register_forward_hook(lambda *call: outputs.append(call[2][0])) for m in layers]

    def seen(z):
        outputs.clear()
        G(z[None], torch.tensor([1]))
        return torch.cat(outputs)

    A = torch.autograd.functional.jacobian(seen, torch.randn(G.z_dim)).double()
    for hook in hooks:
        hook.remove()
    return F.normalize(A, dim=1)


def test_directions_are_an_orthonormal_basis(G):
    vectors = find_directions(G).vectors
    assert vectors.shape == (12, 12)
    assert torch.allclose(vectors @ vectors.T, torch.eye(12), atol=1e-6)
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_directions_are_the_eigenvectors_of_what_the_latent_goes_into(G):
    A, found = first_matrix(G), find_directions(G)
    vectors, effects = found.vectors.double(), found.effects.double()
    assert torch.allclose((A @ vectors.T).norm(dim=0), effects, atol=1e-5)
    assert torch.allclose(vectors @ A.T @ A, effects[:, None] ** 2 * vectors, atol=1e-5)
    assert (effects[:-1] >= effects[1:]).all()


def test_no_unit_vector_has_more_effect_than_the_first(G):
    others = F.normalize(torch.randn(20_000, 12, dtype=torch.double), dim=1)
    most = (first_matrix(G) @ others.T).norm(dim=0).max()
    assert 0.8 * find_directions(G).effects[0] < most < find_directions(G).effects[0]


def test_directions_of_hierarchical_z_lie_in_the_chunk_of_their_stage():
    found = find_directions(generator())
    assert sorted(found.stages) == [0] * 6 + [1] * 6
    for vector, stage in zip(found.vectors, found.stages, strict=True):
        others = torch.cat([vector[: 6 * stage], vector[6 * (stage + 1) :]])
        assert (others == 0).all()


@pytest.mark.parametrize("name", ["flat", "unshared", "deep"])
def test_where_all_is_seen_at_once_there_is_one_stage(name):
    assert find_directions(generator(**ARCHITECTURES[name])).stages == (0,) * 12


def test_strong_directions_change_images_more_than_weak_ones(G):
    # Weights as if training had made much of some latents, and little of others.
    chunk = 12 // G.chunks
    turn = torch.linalg.qr(torch.randn(chunk, chunk))[0]
    stretch = turn @ torch.diag(torch.logspace(0.5, -1, chunk)) @ turn.T
    seen = G if G.config.deep or G.chunks > 1 else G.linear
    for layer in seen.modules():
        if isinstance(layer, SNLinear):
            layer.weight[:, -chunk:] @= stretch
    found = find_directions(G)
    z, ids = torch.randn(64, 12), torch.arange(64) % 4
    changes = torch.stack([(G(z + v, ids) - G(z - v, ids)).square().mean() for v in found.vectors])
    for stage in set(found.stages):
        falling = changes[torch.tensor(found.stages) == stage]
        third = chunk // 3
        assert falling[:third].min() > 4 * falling[-third:].max()


def test_edits_add_up_in_units_of_the_latent(G):
    found, z = find_directions(G), torch.randn(12)
    moved = found.apply(z, {0: 2.0, 5: -1.0})
    assert torch.allclose(
        found.vectors @ (moved - z), torch.eye(12)[0] * 2 - torch.eye(12)[5], atol=1e-5
    )
    for index in (-1, 12):
        with pytest.raises(UserError, match=f"direction {index}: .* directions 0 to 11"):
            found.apply(z, {index: 1.0})


def test_finding_changes_nothing_and_finds_the_same_again(G, storage):
    state = {key: value.clone() for key, value in G.state_dict().items()}
    found = find_directions(G)
    assert all((value == state[key]).all() for key, value in G.state_dict().items())
    folder = add_imported("again", G)
    for _ in range(2):
        again = find_directions(load_generator(folder.uri))
        assert (again.vectors == found.vectors).all()
        assert (again.effects == found.effects).all()
        assert again.stages == found.stages


def test_folded_spectral_norms_leave_directions_alone(G):
    found = find_directions(G)
    G.fold_spectral_norms()
    folded = find_directions(G)
    assert torch.allclose(folded.vectors, found.vectors, atol=1e-4)
    assert torch.allclose(folded.effects, found.effects, atol=1e-5)


@pytest.fixture
def version(storage):
    """A new model version in the store."""
    return add_imported("named", generator())


def test_names_are_kept_beside_the_weights(version):
    assert read_names(version) == {i: str(i) for i in range(12)}
    write_names(version, {3: "tilt", 0: "thickness"})
    assert version.read_json("directions.json") == {"0": "thickness", "3": "tilt"}
    write_names(version, {11: "größer", 3: "lean"})
    names = read_names(version)
    assert [names[i] for i in (0, 3, 11, 5)] == ["thickness", "lean", "größer", "5"]
    write_names(version, {0: "", 4: "thickness"})
    assert version.read_json("directions.json") == {"3": "lean", "4": "thickness", "11": "größer"}


@pytest.mark.parametrize(
    "names,said",
    [
        ({12: "tilt"}, "direction 12: this model has directions 0 to 11"),
        ({-1: "tilt"}, "direction -1"),
        ({2: "thickness"}, "2 directions would be named 'thickness'"),
        ({2: "a", 3: "a"}, "2 directions would be named 'a'"),
        ({2: "7"}, "direction 2 cannot be named '7': a number means an index"),
        ({2: "-1.5"}, "cannot be named '-1.5'"),
        ({2: "x" * 41}, "1 to 40 characters"),
        ({2: " "}, "spaces at its ends"),
        ({2: "tilt "}, "spaces at its ends"),
        ({2: "a\nb"}, "without line breaks"),
    ],
)
def test_names_that_cannot_be_are_refused_and_the_others_stay(version, names, said):
    write_names(version, {0: "thickness"})
    with pytest.raises(UserError, match=said):
        write_names(version, names)
    assert read_names(version)[0] == "thickness"
    assert read_names(version)[2] == "2"
    write_names(version, {2: "x" * 40})


@pytest.mark.parametrize("content", [["tilt"], {"12": "tilt"}, {"x": "tilt"}, {"0": "a", "1": "a"}])
def test_damaged_names_are_told(version, content):
    version.write_json("directions.json", content)
    with pytest.raises(StorageError, match=r"names of directions in .* are damaged"):
        read_names(version)


def test_the_command_draws_lists_and_names(version, tmp_path):
    picture = tmp_path / "new" / "directions.png"
    done = job("directions", "--model", "named", "--output", str(picture), "--count", "2",
               "--seeds", "5", "6", "7", "--classes", "2", "--strength", "6",
               "--names", "0=thickness", "3=tilt")  # fmt: skip
    assert version.read_json("directions.json") == {"0": "thickness", "3": "tilt"}
    G = load_generator("named")
    found = find_directions(G)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["0", str(found.stages[0]), f"{found.effects[0]:.3f}", "thickness"] in lines
    assert ["1", str(found.stages[1]), f"{found.effects[1]:.3f}"] in lines
    assert not any(line[:1] == ["2"] for line in lines)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    z, ids = G.latents([5, 6, 7]), torch.tensor([2] * 3)
    lefts = set(range(pixels.shape[1] - 7 * 66))  # The margin fits the longest label.
    for direction in range(2):
        for column, strength in enumerate((-6, -4, -2, 0, 2, 4, 6)):
            moved = G.render(z + strength * found.vectors[direction], ids, [None] * 3)
            for row, image in enumerate(moved.astype(int)):
                top = 34 + direction * (3 * 66 + 14) + row * 66
                strip = pixels[top : top + 64 : 8]  # Every pixel is eight by eight.
                places = {left: strip[:, left + 66 * column :][:, :64:8] for left in lefts}
                lefts = {i for i, tile in places.items() if np.abs(tile - image).max() <= 1}
    assert lefts
    assert max(lefts) - min(lefts) < 8


def test_the_command_names_without_a_picture(version, capsys):
    assert run("--model", "named", "--names", "5=width", "--count", "5") == 0
    assert read_names(version)[5] == "width"
    assert "width" not in capsys.readouterr().out  # It is not among the first 5.
    assert run("--model", "named", "--count", "12") == 0
    assert "width" in capsys.readouterr().out


def test_the_command_lists_a_stage_alone(version, capsys):
    assert run("--model", "named", "--stages", "1") == 0
    shown = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.strip()]
    found = find_directions(load_generator("named"))
    assert shown[3:] == [[str(i), "1"] for i, stage in enumerate(found.stages) if stage == 1]


def run(*flags):
    """The command in this process: its exit status."""
    before = sys.argv
    sys.argv = ["directions.py", *flags]
    try:
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "jobs" / "directions.py"), run_name="__main__")
    finally:
        sys.argv = before
    return left.value.code


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--names", "tilt"], "--names tilt: must be INDEX=NAME"),
        (["--names", "1=a", "01=b"], "--names 01=b: direction 1 has a name already"),
        (["--names", "1=a", "2=a"], "2 directions would be named 'a'"),
        (["--names", "12=a"], "direction 12: this model has directions 0 to 11"),
        (["--names", "1=a", "--output", "x.txt"], "--output x.txt: name a picture"),
        (["--names", "1=a", "--count", "0"], "--count 0: must be 1 or more"),
        (["--names", "1=a", "--stages", "0", "2"], "--stages 0 2: this model has stages 0 to 1"),
        (["--names", "1=a", "--strength", "nan"], "--strength nan: must be a finite number"),
        (["--names", "1=a", "--seeds", "-1"], "seed -1"),
        (["--names", "1=a", "--truncation", "0"], "truncation is 0.0"),
        (["--names", "1=a", "--classes", "cat"], "cat"),
    ],
)
def test_mistakes_name_nothing(version, capsys, flags, said):
    assert run("--model", "named", *flags) == 2
    assert said in capsys.readouterr().err
    assert not version.exists("directions.json")
