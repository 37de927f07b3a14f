"""What a submitted job knows of the code that it runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from biggan.code_version import sources_sha256

RAY = Path(sys.executable).with_name("ray")
# As where runs are recorded: in the job's driver, and in a worker elsewhere in the file system.
JOB = """
import json, os, ray
from biggan.code_version import code_version

@ray.remote
def there():
    os.chdir("/")
    return code_version()

ray.init(log_to_driver=False)
print("VERSIONS", json.dumps([code_version(), ray.get(there.remote())]))
"""


def git(tree, *arguments):
    options = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    command = ["git", *options, *arguments]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A committed copy of what a job needs."""
    tree = tmp_path_factory.mktemp("tree")
    for part in ("platform", "jobs"):
        shutil.copytree(
            ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    (tree / "job.py").write_text(JOB)
    git(tree, "init", "--initial-branch", "main")
    git(tree, "add", ".")
    git(tree, "commit", "--message", "As it was")
    return tree


def submitted(cluster, tree):
    """The versions that a job of this tree finds, in its driver and in a worker."""
    command = f"""job submit --address {cluster.dashboard} --working-dir .
        --runtime-env jobs/runtime_env.yaml -- python job.py"""
    done = subprocess.run([RAY, *command.split()], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("VERSIONS")]
    return json.loads(line.removeprefix("VERSIONS"))


def checkout(tree):
    """The version that the command in the docs gives for a checkout."""
    command = [sys.executable, "-m", "biggan.code_version"]
    done = subprocess.run(
        command,
        cwd=tree,
        env={"PYTHONPATH": "platform", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("packed", [False, True])
def test_a_job_records_its_commit_and_what_differs(cluster, tree, packed):
    if packed:
        git(tree, "pack-refs", "--all")
    git(tree, "checkout", ".")
    commit = git(tree, "rev-parse", "HEAD").strip()
    clean = checkout(tree)
    assert clean["commit"] == commit
    assert "diff_sha256" not in clean

    with (tree / "platform/biggan/errors.py").open("a") as source:
        source.write(f"\n# Changed: {packed}\n")
    changed = checkout(tree)
    assert changed["commit"] == commit
    assert changed["diff_sha256"]

    driver, worker = submitted(cluster, tree)
    assert driver == worker
    assert driver["commit"] == commit
    assert driver["sources_sha256"] == changed["sources_sha256"] != clean["sources_sha256"]
    assert driver["sources_sha256"] == sources_sha256(tree / "platform/biggan")


def test_another_checkout_around_the_package_is_not_taken_for_its_own(tree, tmp_path):
    git(tmp_path, "init")
    installed = tmp_path / "venv/biggan"
    shutil.copytree(tree / "platform/biggan", installed)
    (tmp_path / "own.txt").touch()
    git(tmp_path, "add", "own.txt")
    git(tmp_path, "commit", "--message", "Somebody else's")
    code = "from biggan.code_version import code_version; print(code_version())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": "venv", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "sources_sha256" in done.stdout
    assert "commit" not in done.stdout
