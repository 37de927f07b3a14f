"""The whole path by `ray job submit` on three hosts, from images to an endpoint, all on S3."""

import re

import pytest
from conftest import TINY

import biggan
from biggan.client import EndpointError
from biggan.runs import read_metrics
from biggan.storage import Folder, locate, storage_root

FLAGS = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in TINY.items())


@pytest.fixture(scope="module")
def printed(on_prem, digits):
    """What was printed by the commands of the whole path, submitted in turn."""
    train = f"jobs/train.py --name two {FLAGS} --scaling.workers 2"
    commands = {
        "train": f"{train} --scaling.cpus-per-worker 2",  # A host's three have room for one.
        "sweep": f"jobs/sweep.py --name few {FLAGS} --num-trials 3",
        "promote": "jobs/promote.py --sweep few",
        "key": "-m serving.keys make tester",
        "serve": "-m serving --models digits@best --host 0.0.0.0 --detach",
    }
    yield {verb: on_prem.submit(command) for verb, command in commands.items()}
    on_prem.head.run("serve shutdown --yes")


def test_two_workers_train_on_two_hosts(on_prem, digits, printed):
    assert "prepared 1,797/1,797 images" in digits
    assert "best checkpoint: s3://bucket/biggan/runs/two/checkpoint_" in printed["train"]
    nodes = on_prem.alive()
    workers = on_prem.state("actors", class_name="RayTrainWorker")
    assert {nodes[worker["node_id"]] for worker in workers} == {w.address for w in on_prem.workers}
    rows = read_metrics(locate("runs", "two"))
    assert [row["kimg"] for row in rows if "fid" in row] == [0.256, 0.512]


def test_a_sweep_is_promoted_and_served(on_prem, printed):
    assert "model digits@v1: FID" in printed["promote"]
    url = f"http://{on_prem.head.address}:8000"
    with pytest.raises(EndpointError, match="401"):
        biggan.Client(url).classes()
    [key] = re.findall(r"^bg_\w+$", printed["key"], re.MULTILINE)
    image = biggan.Client(url, key=key).arrays(7, seed=1)
    expected = biggan.load_generator("digits@best").sample([7], seed=1)
    assert abs(image.astype(int) - expected.astype(int)).max() <= 1


def test_everything_lies_in_s3(on_prem, printed):
    assert Folder(storage_root()).children() == ["datasets", "keys", "models", "runs", "sweeps"]
    assert {"config.json", "metrics.jsonl", "samples"} <= {*locate("runs", "two").children()}
    assert {"trials.csv", "best.yaml"} <= {*locate("sweeps", "few").children()}
    for host in on_prem.head, *on_prem.workers:
        assert host.run("ls -d ~/storage ~/ray_results ~/s3*", check=False).stdout == ""
