"""The endpoint on Ray Serve: models, aliases and canaries, over HTTP."""

import base64
import importlib
import io
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import requests
import yaml
from conftest import ROOT, add_imported, tiny, train_here
from PIL import Image
from pydantic import ValidationError
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

import biggan
from biggan.errors import UserError
from biggan.models import ModelStore
from biggan.storage import locate
from biggan.truncation import TruncationTables
from serving.app import build
from serving.config import EndpointConfig


def post(endpoint, body):
    return requests.post(f"{endpoint}/v1/generate", json=body, timeout=120)


def arrays(response):
    assert response.status_code == 200, response.text
    return np.load(io.BytesIO(response.content), allow_pickle=False)


def grey_levels(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b.astype(int)).max()


def test_every_operation_goes_through_serve(endpoint, tiny_model):
    G = biggan.load_generator("tiny@v1")
    client = biggan.Client(endpoint)
    assert client.healthy()
    assert client.model()["fid"] == tiny_model.card.fid
    arrays = client.arrays(4, n=3, seed=20, truncation=0.8)
    assert grey_levels(arrays, G.sample([4] * 3, seed=20, truncation=0.8)) <= 1
    [first, _] = client.edit({"class": 4, "seed": 20}, {"0": 2.0}, steps=2)
    assert grey_levels(np.asarray(first.image)[..., None], G.sample(4, seed=20)[0]) <= 1
    moving = client.interpolate([first.latent, {"class": 5, "seed": 3}], frames=3)
    assert Image.open(io.BytesIO(moving)).n_frames == 6
    assert len(client.directions()) == G.z_dim
    assert client.verify(first.file)["status"] == "verified"
    made = requests.post(f"{endpoint}/v1/images/generations", json={"prompt": "7"}, timeout=60)
    assert base64.b64decode(made.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")
    assert "text/html" in requests.get(endpoint, timeout=60).headers["Content-Type"]


def test_a_seed_gives_the_same_image_whatever_it_is_batched_with(endpoint):
    expected = biggan.load_generator("tiny@v1").sample(5, seed=11)[0]

    def ask(i):
        body = {"class": 5, "seed": 11 - i % 12, "n": i % 12 + 1, "format": "numpy"}
        while (response := post(endpoint, body)).status_code == 503:
            assert int(response.headers["Retry-After"]) >= 1
        return arrays(response)[i % 12]

    with ThreadPoolExecutor(24) as pool:
        for image in pool.map(ask, range(24)):
            assert grey_levels(image, expected) <= 1


def test_an_answer_of_many_bytes_goes_through(endpoint, wide):
    stops = [{"class": 1, "seed": 0}, {"class": 2, "seed": 1}]
    body = {"model": "wide", "stops": stops, "frames": 64, "format": "numpy"}
    frames = arrays(requests.post(f"{endpoint}/v1/interpolate", json=body, timeout=120))
    assert frames.nbytes == 128 * 128**2 * 3  # gRPC would take 4 MiB by itself.
    assert grey_levels(frames[0], wide.sample(1, seed=0)[0]) <= 1
    assert grey_levels(frames[64], wide.sample(2, seed=1)[0]) <= 1


def test_haproxy_listens_where_the_endpoint_does_and_nowhere_else(endpoint, cluster):
    place = f"haproxy-{os.getuid()}-" + cluster.address.rpartition(":")[2]
    listening = set()
    for process in psutil.process_iter():
        if process.name() == "haproxy" and any(place in word for word in process.cmdline()):
            connections = process.net_connections()
            listening |= {c.laddr for c in connections if c.status == psutil.CONN_LISTEN}
    url = urlsplit(endpoint)
    assert listening == {(url.hostname, url.port)}


def test_models_take_turns_in_a_sampler_that_holds_one(endpoint, pair):
    tiny_G = biggan.load_generator("tiny@v1")
    for seed in range(3):
        for model, G in (("tiny", tiny_G), ("pair@v1", pair[0]), ("pair@v2", pair[1])):
            body = {"model": model, "class": 1, "seed": seed, "format": "numpy"}
            assert grey_levels(arrays(post(endpoint, body)), G.sample(1, seed=seed)) <= 1


def test_a_canary_gets_its_share_and_is_held_against_the_other(endpoint, pair):
    def served(seed):
        body = {"model": "pair", "class": 1, "seed": seed, "format": "numpy"}
        response = post(endpoint, body)
        G = pair[0] if response.headers["X-Model"] == "pair@v1" else pair[1]
        assert grey_levels(arrays(response), G.sample(1, seed=seed)) <= 1
        return response.headers["X-Model"]

    first = [served(seed) for seed in range(20)]
    assert {first.count("pair@v1"), first.count("pair@v2")} <= set(range(4, 17))
    assert [served(seed) for seed in range(20)] == first  # A repeated request goes the same way.
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        models = requests.get(f"{endpoint}/v1/models", timeout=60).json()["data"]
        pairs = {m["id"]: m for m in models if m["id"].startswith("pair")}
        if sum(m["observed"]["requests"] for m in pairs.values()) >= 40:
            break
        time.sleep(0.2)
    for model, alias in (("pair@v1", "best"), ("pair@v2", "candidate")):
        entry, observed = pairs[model], pairs[model]["observed"]
        assert (entry["aliases"], entry["share"], observed["error_rate"]) == ([alias], 0.5, 0)
        assert 0 < observed["p50_ms"] <= observed["p95_ms"]
    lines = requests.get(f"{endpoint}/metrics", timeout=60).text.splitlines()
    [made] = [
        line for line in lines if line.startswith('biggan_images_total{key="",model="pair@v1"')
    ]
    assert float(made.split()[-1]) >= 2 * first.count("pair@v1")
    assert any(line.startswith("biggan_batch_images_count") for line in lines)


def test_promotion_changes_what_is_served_without_a_dropped_request(endpoint, digits):
    run = locate("runs", "tiny-second")
    train_here(tiny(seed=1), run, digits)
    statuses, models, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            response = post(endpoint, {"class": 3, "n": 8})
            if response.status_code == 503 and "Retry-After" in response.headers:
                continue  # Turned away, as one more than there is room for; clients try again.
            statuses.append(response.status_code)
            models.append(response.headers.get("X-Model"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        promotion = biggan.promote(run="tiny-second", name="tiny", force=True)
        assert promotion.card.version == "v2"
        deadline = time.monotonic() + 60
        while "tiny@v2" not in models[-4:] and time.monotonic() < deadline:
            time.sleep(0.1)
        ModelStore("tiny").roll_back("best")
        since = len(models)
        while "tiny@v1" not in models[since:][-4:] and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        ModelStore("tiny").set_alias("best", "v1")
    assert set(models) == {"tiny@v1", "tiny@v2"}
    assert models[-1] == "tiny@v1"
    assert set(statuses) == {200}
    assert len(statuses) > 30


def test_an_imported_model_that_scales_its_latents(endpoint):
    G = biggan.load_generator("tiny@v1")
    G.add_tables(TruncationTables(truncations=(0.0, 0.5, 1.0), convention="scale"))
    version = add_imported("tiny", G).name
    ModelStore("tiny").set_alias("best", "v1")
    model = f"tiny@{version}"
    for truncation in (0.5, 0.7, 1.0, None):
        body = {"model": model, "class": 3, "seed": 1, "truncation": truncation, "format": "numpy"}
        expected = G.sample(3, seed=1, truncation=truncation)
        assert grey_levels(arrays(post(endpoint, body)), expected) <= 1
    refused = post(endpoint, {"model": model, "class": 3, "truncation": 1.5})
    assert refused.status_code == 422
    [error] = refused.json()["errors"]
    assert (error["field"], error["value"]) == ("truncation", 1.5)
    assert "at most by 1" in error["limit"]


def test_a_model_that_is_not_there_is_said_at_once(digits):
    command = [sys.executable, "-m", "serving", "--models", "nothing@best", "--no-auth"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: model nothing@best is not in the store" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_there_is_not_is_said_at_once(tiny_model):
    command = [sys.executable, "-m", "serving", "--models", "tiny@best", "--no-auth"]
    done = subprocess.run([*command, "--port", "99999"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--port 99999: must be 1 to 65535" in done.stderr


def test_an_open_endpoint_listens_on_this_machine_alone(tiny_model):
    command = [sys.executable, "-m", "serving", "--models", "tiny", "--no-auth"]
    done = subprocess.run([*command, "--host", "0.0.0.0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: --no-auth --host 0.0.0.0" in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", None])
def test_nor_does_one_that_is_deployed_by_a_file(cluster, monkeypatch, host):
    controller = SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr("serving.app._get_global_client", lambda **_: controller)
    with pytest.raises(UserError, match="could use the endpoint"):
        build(EndpointConfig(no_auth=True))
    controller.http_config.host = "127.0.0.1"
    build(EndpointConfig(no_auth=True))


def test_a_file_for_serve_deploy_builds_an_endpoint(cluster):
    [application] = yaml.safe_load((ROOT / "serving/serve.yaml").read_text())["applications"]
    module, name = application["import_path"].split(":")
    builder = getattr(importlib.import_module(module), name)
    # As Serve calls it, which looks at its annotations.
    built = call_user_app_builder_with_args_if_necessary(builder, application["args"])
    assert isinstance(built, serve.Application)
    wrong = application["args"] | {"min_replicas": 9}
    with pytest.raises(ValidationError, match="must not exceed max_replicas"):
        call_user_app_builder_with_args_if_necessary(builder, wrong)
