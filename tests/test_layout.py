"""The repository's shape, and what may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "biggan"
WITH_RAY = {
    "cluster",
    "commands",
    "data.preparation",
    "data.stream",
    "distributed",
    "evaluation",
    "generation",
    "preemption",
    "search",
    "trials",
}
"""Modules that run things on Ray; all others are science, and work without it."""


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def test_the_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    named = {name.split(".")[0] for name in modules()}
    for name in named - {"data", "metrics"}:
        assert f"{name}.py" in readme, name


def test_platform_is_no_package():
    # A package named platform would hide the standard library's module and break Python.
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform; print(platform.python_version())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip().startswith("3."), run.stderr


@pytest.mark.parametrize("name", sorted(set(modules()) - WITH_RAY - {"__init__", "promotion"}))
def test_science_does_not_import_ray(name):
    tree = ast.parse(modules()[name].read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    heads = {module.split(".")[0] for module in imported}
    assert "ray" not in heads
    assert not imported & {f"biggan.{name}" for name in WITH_RAY}


def test_training_runs_where_ray_is_not_installed(digits, tmp_path):
    code = f"""
import sys
sys.modules["ray"] = None  # Any import of Ray now fails.
import biggan, torch
from biggan.config import RunConfig
from biggan.data.dataset import Dataset
from biggan.loop import TrainingLoop
from biggan.parallel import CPU, Workers
from biggan.storage import Folder
config = RunConfig().override({{
    "total_kimg": 0.064, "optim.batch_size": 32, "model.ch_g": 1, "model.ch_d": 1,
    "eval.num_samples": 64,
}})
reports = []
loop = TrainingLoop(
    config, Dataset.open({digits.folder.uri!r}), Folder({str(tmp_path)!r}),
    Workers(0, 1, CPU), lambda metrics, checkpoint: reports.append(metrics),
)
print(loop.run(), len(reports))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "finished 1", run.stderr


def test_client_loads_neither_torch_nor_ray():
    code = "import sys; from biggan import Client; print({'torch', 'ray'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


def test_public_api_is_documented():
    import biggan

    for name in biggan.__all__:
        assert getattr(biggan, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        biggan.trian  # noqa: B018
