"""cluster.yaml, by Ray's own offline validation."""

import pytest
import yaml
from conftest import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config


@pytest.fixture
def described():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(described):
    validate_config(prepare_config(described))


def test_head_without_gpu_and_workers_on_spot_that_scale_from_zero(described):
    types = described["available_node_types"]
    head = types.pop(described["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    spot = {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert (spot, set(types)) == ({"gpu-spot"}, {"gpu-spot", "gpu-on-demand"})
    for kind in types.values():
        assert kind["min_workers"] == 0
        assert kind["resources"]["GPU"] > 0
    assert types["gpu-spot"]["max_workers"] * types["gpu-spot"]["resources"]["GPU"] == 64


def test_it_is_closed_to_strangers(described):
    [start] = [line for line in described["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "RAY_AUTH_MODE=token" in described["setup_commands"][1]
    assert "~/.ray/auth_token" in described["file_mounts"]


def test_a_wrong_file_is_not_accepted(described):
    described["available_node_types"]["gpu-spot"]["resources"] = {"GPU": "four"}
    with pytest.raises(Exception, match="four"):
        validate_config(prepare_config(described))
