"""cluster.yaml and clusters/*.yaml, by Ray's own offline validation."""

import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config

FILES = [ROOT / "cluster.yaml", *sorted(ROOT.glob("clusters/*.yaml"))]
CLOUDS = [path for path in FILES if "available_node_types:" in path.read_text()]


def over(paths):
    """Run a test over these files, `described` being what a file says."""
    names = [str(path.relative_to(ROOT)) for path in paths]
    return pytest.mark.parametrize("described", paths, ids=names, indirect=True)


@pytest.fixture
def described(request):
    return yaml.safe_load(request.param.read_text())


@over(FILES)
def test_ray_accepts_it(described):
    validate_config(prepare_config(described))


@over(CLOUDS)
def test_head_without_gpu_and_workers_on_spot_that_scale_from_zero(described):
    types = described["available_node_types"]
    head = types[described["head_node_type"]]
    workers = {kind: types[kind] for kind in types if types[kind] is not head}
    assert head["resources"] == {"CPU": 0}
    assert set(workers) == {"gpu-spot", "gpu-on-demand"}
    assert {kind["min_workers"] for kind in workers.values()} == {0}
    assert workers["gpu-spot"]["priority"] > workers["gpu-on-demand"].get("priority", 0)
    assert described["idle_timeout_minutes"] <= 15
    assert "biggan.preemption" in start(described, "worker")


@over(FILES)
def test_it_is_closed_to_strangers(described):
    assert "--dashboard-host=127.0.0.1" in start(described, "head")
    assert "RAY_AUTH_MODE=token" in str(described["setup_commands"])
    assert "~/.ray/auth_token" in described["file_mounts"]


@over(FILES)
def test_what_is_shipped_is_there_and_can_be_installed(described, monkeypatch):
    monkeypatch.chdir(ROOT)
    shipped = {there: Path(here) for there, here in described["file_mounts"].items()}
    del shipped["~/.ray/auth_token"]
    assert all(path.exists() for path in shipped.values())
    if "~/biggan" not in shipped:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        needed = {"pyproject.toml", "platform", project["readme"], *project["license-files"]}
        assert {f"~/biggan/{name}" for name in needed} <= set(shipped)


@over(FILES)
def test_it_holds_no_key_and_pins_what_it_installs(described):
    assert "aws_credentials" not in described["provider"]
    assert "gcp_credentials" not in described["provider"]
    commands = described["setup_commands"] + described.get("head_setup_commands", [])
    for command in commands:
        if "pip install" in command:
            assert "--constraint ~/biggan/constraints.txt" in command


def start(described, kind):
    """The commands that start Ray on the head or on a worker."""
    commands = described[f"{kind}_start_ray_commands"]
    assert any("ray start" in command for command in commands)
    return "\n".join(commands)


@over(CLOUDS)
def test_a_wrong_file_is_not_accepted(described):
    described["available_node_types"]["gpu-spot"]["min_workers"] = "four"
    with pytest.raises(Exception, match="four"):
        validate_config(prepare_config(described))
