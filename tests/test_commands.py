"""The commands: help that teaches, and mistakes told in a line."""

import importlib
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
    *("prepare", "train", "sweep", "promote", "evaluate", "generate", "directions"),
    *("quickstart", "import_weights", "export_weights"),
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(job_here, name):
    status, said = job_here(name, "--help")
    assert not status
    options = "\n" if name == "quickstart" else " --"  # It needs none.
    assert f"\npython jobs/{name}.py{options}" in said
    assert "--storage" in said


@pytest.mark.parametrize("module", ["serving.__main__", "serving.keys"])
def test_help_of_the_endpoint_names_the_command(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [__file__, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m {module.removesuffix('.__main__')} [")
    assert "--no-no-" not in said


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
