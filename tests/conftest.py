"""What tests share: one Ray cluster, and a storage root with the digits prepared in it.

Two processes run the tests (pytest-xdist), a file in one of them; they share the cluster, and each
has a storage root of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# The processes that run tests have the first one's environment.
if "BIGGAN_TEST_SESSIONS" not in os.environ:
    os.environ["BIGGAN_TEST_SESSIONS"] = tempfile.mkdtemp(prefix="ray")
    Path(os.environ["BIGGAN_TEST_SESSIONS"], "token").write_text(secrets.token_hex(32))
    os.environ["BIGGAN_TEST_PROCESS"] = str(os.getpid())
SESSIONS = Path(os.environ["BIGGAN_TEST_SESSIONS"])
# Ray reads these when it is imported.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = str(SESSIONS / "token")
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
os.environ["OMP_NUM_THREADS"] = "1"  # Workers outnumber the cores.
# As in an activated environment: submitted jobs run the `python` that the cluster finds first.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

import pytest
import ray
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from biggan.config import RunConfig
from biggan.data.dataset import Dataset
from biggan.data.preparation import Preparation, prepare
from biggan.loop import KeepCheckpoints, TrainingLoop
from biggan.models import ModelCard, ModelStore
from biggan.networks import Generator
from biggan.parallel import CPU, Workers
from biggan.promotion import promote
from biggan.runs import open_run
from biggan.storage import Folder, locate

ROOT = Path(__file__).parents[1]

TINY = {
    "dataset": "digits",
    "total_kimg": 0.512,
    "model.ch_g": 2,
    "model.ch_d": 2,
    "model.z_dim": 12,
    "model.shared_dim": 8,
    "optim.batch_size": 32,
    "optim.lr_g": 1e-3,
    "optim.lr_d": 1e-3,
    "ema.decay": 0.9,
    "eval.every_kimg": 0.256,
    "eval.num_samples": 64,
    "checkpoint.every_kimg": 0.128,
}
"""A run of 16 steps that takes a second."""


def tiny(**changes: object) -> RunConfig:
    """The tiny configuration, changed: ``tiny(total_kimg=1, optim__lr_g=0.1)``."""
    return RunConfig().override(TINY | {k.replace("__", "."): v for k, v in changes.items()})


def free_port() -> int:
    """A port that nobody has, and that neither Ray nor the system gives away meanwhile."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster on this machine, with token authentication."""

    address: str
    dashboard: str


@pytest.fixture(scope="session")
def cluster():
    """`ray start --head` with token authentication, and this process connected to it."""
    described = SESSIONS / "cluster.json"
    with FileLock(SESSIONS / "lock"):
        if not described.exists():
            described.write_text(json.dumps(_start_cluster()))
        cluster = Cluster(**json.loads(described.read_text()))
    ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)
    os.environ["RAY_ADDRESS"] = cluster.address  # For the commands that tests run.
    return cluster


def _start_cluster():
    """Start it and wait until it is up; the `Cluster` that it is.

    Its logical CPUs let tests schedule more than the machine has cores.
    """
    from serving import ingress  # Programs of tests have this file, but no serving.

    port, dashboard, agent, client = (free_port() for _ in range(4))
    options = f"""--head --block --num-cpus=4 --port={port} --node-ip-address=127.0.0.1
        --include-dashboard=true --dashboard-port={dashboard} --temp-dir={SESSIONS}
        --dashboard-agent-listen-port={agent} --ray-client-server-port={client}
        --disable-usage-stats --object-store-memory=500000000"""
    with (SESSIONS / "head.log").open("w") as log:
        head = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", *options.split()],
            stdout=log,
            stderr=log,
            env=os.environ | ingress.environment(str(port)),
            start_new_session=True,
        )
    # Ends the cluster once the process that runs all tests is gone, however it went.
    first = int(os.environ["BIGGAN_TEST_PROCESS"])
    subprocess.Popen(
        ["sh", "-c", f"while kill -0 {first} 2>/dev/null; do sleep 1; done; kill -9 -{head.pid}"],
        start_new_session=True,
    )
    address = f"127.0.0.1:{port}"
    ray_command = [Path(sys.executable).with_name("ray"), "status", "--address", address]
    for _ in range(120):
        assert head.poll() is None, (SESSIONS / "head.log").read_text()
        if subprocess.run(ray_command, capture_output=True).returncode == 0:
            break
        time.sleep(0.5)
    return {"address": address, "dashboard": f"http://127.0.0.1:{dashboard}"}


class Shares(LoadScopeScheduling):
    """A file's tests run in one process, those that look at the whole cluster all in one."""

    def _split_scope(self, nodeid):
        return "integration" if "/integration/" in nodeid else nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config, log):
    return Shares(config, log)


def pytest_collection_modifyitems(items):
    """What takes longest comes first."""
    items.sort(key=lambda item: "integration" not in item.path.parts)


def pytest_sessionfinish(session, exitstatus):
    session.config.status = int(exitstatus)


def pytest_unconfigure(config):
    """Leave without Ray's shutdown, which now and then ends the process with an error of its own:
    a thread of its libraries may still ask for the cluster ("core worker has already been
    shutdown", seen in one run of a dozen)."""
    if ray.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.status)


@pytest.fixture(scope="session")
def storage(tmp_path_factory):
    """The storage root of all tests; also where commands look by themselves."""
    root = tmp_path_factory.mktemp("storage")
    os.environ["BIGGAN_STORAGE"] = str(root)
    return root


@pytest.fixture(scope="session")
def digits(cluster, storage):
    """The digits, prepared: by the process that comes first, for the other too."""
    shared, mine = SESSIONS / "digits", storage / "datasets" / "digits"
    with FileLock(SESSIONS / "digits.lock"):
        if shared.exists():
            shutil.copytree(shared, mine)
        else:
            prepare(Preparation(source="digits", resolution=16, channels=1), "digits")
            shutil.copytree(mine, shared)
    return Dataset.open("digits")


def train_here(
    config: RunConfig,
    run: Folder,
    dataset: Dataset,
    stop_after: int = 0,
    say=None,
    stream=None,
    must_leave=lambda: False,
) -> str:
    """Train in this process, resuming from the run's latest checkpoint; no Ray.

    `stop_after` reports, the run breaks off as if it had been killed.
    """
    config = open_run(run, config, dataset.info)
    keeper = KeepCheckpoints(run, config.checkpoint.keep)
    reports = []

    def report(metrics, folder):
        keeper(metrics, folder)
        reports.append(metrics)
        if len(reports) == stop_after:
            raise InterruptedError

    alone = Workers(0, 1, CPU)
    loop = TrainingLoop(
        config, dataset, run, alone, report, say=say, stream=stream, must_leave=must_leave
    )
    return loop.run()


@pytest.fixture(scope="session")
def tiny_run(digits):
    """A finished tiny run."""
    run = locate("runs", "tiny")
    assert train_here(tiny(), run, digits) == "finished"
    return run


@pytest.fixture(scope="session")
def tiny_model(tiny_run):
    """The tiny run's best generator in the store, as `tiny@best` = `tiny@v1`."""
    return promote(run="tiny", name="tiny")


def add_imported(name: str, G: Generator) -> Folder:
    """A version of model `name` as an import leaves it: best, with no run behind it, and no FID."""
    store = ModelStore(name)
    card = ModelCard(
        name=name,
        version=store.next_version(),
        created="2026-01-01T00:00:00+00:00",
        imported={"format": "somebody's"},
        code={},
        licence="",
    )
    folder = store.add(G, card, G.sample(range(G.n_classes)), G.n_classes)
    store.set_alias("best", card.version)
    return folder


@pytest.fixture
def job_here(monkeypatch, capsys):
    """Run a command of jobs/ in this process, which takes seconds less than to begin another.

    Gives its exit status, and what it said.
    """

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / f"jobs/{name}.py"), run_name="__main__")
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    return run


def job(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command of jobs/ as a user would; asserts its exit status."""
    name, *rest = arguments
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", *rest], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done
