"""The commands: help that teaches, and mistakes told in a line."""

import socket
import subprocess
import sys
import time

import pytest
import yaml
from conftest import free_port, tiny

from biggan.commands import base_config
from biggan.config import ConfigError
from biggan.presets import digits
from serving.__main__ import _taken

COMMANDS = [
    *("prepare", "train", "sweep", "promote", "evaluate", "generate"),
    *("import_weights", "export_weights"),
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(job_here, name):
    status, said = job_here(name, "--help")
    assert not status
    assert f"python jobs/{name}.py --" in said
    assert "--storage" in said


def test_where_a_commands_settings_start_from(monkeypatch, tmp_path, tiny_run):
    def given(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        return base_config("runs")

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"total_kimg": 3, "optim": {"lr_g": 1e-5}}))
    assert given("--config", str(file)).optim.lr_g == 1e-5
    assert given("--preset", "digits") == digits()
    assert given("--name", "tiny") == tiny()  # The run that is there.
    assert given("--name", "unheard-of", "--dataset", "digits").model.attention == ()
    with pytest.raises(ConfigError, match="no such file"):
        given("--config", str(tmp_path / "nope.yaml"))


def test_a_port_that_another_program_has_is_noticed():
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert _taken("127.0.0.1", other.getsockname()[1])
        assert _taken("0.0.0.0", other.getsockname()[1])
    assert not _taken("127.0.0.1", free_port())


def test_an_endpoint_ends_in_order_when_a_service_manager_asks():
    code = "from serving.__main__ import _wait; print('waits', flush=True); _wait(); print('ended')"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "waits\n"
        time.sleep(0.2)
        process.terminate()
        assert process.communicate(timeout=30) == ("ended\n", None)
    assert process.returncode == 0
