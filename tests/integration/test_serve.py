"""The endpoint over HTTP: formats, errors, the client, and promotion under load."""

import base64
import io
import random
import string
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import requests
from conftest import ROOT, add_imported, free_port, tiny, train_here
from PIL import Image

import biggan
from biggan.client import EndpointError
from biggan.models import ModelStore
from biggan.pixels import sheet
from biggan.storage import locate
from biggan.truncation import TruncationTables

PROBLEM = "application/problem+json"


def post(endpoint, body, **options):
    return requests.post(f"{endpoint}/v1/generate", json=body, timeout=60, **options)


def decode(response):
    """The pixels of a response: [n, H, W, C] of an .npy file or of JSON, [H, W] of a picture."""
    kind = response.headers["Content-Type"]
    if kind == "application/x-npy":
        return np.load(io.BytesIO(response.content), allow_pickle=False)
    if kind == "application/json":
        files = [base64.b64decode(item["png"]) for item in response.json()["images"]]
        return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])[..., None]
    picture = Image.open(io.BytesIO(response.content))
    assert kind == f"image/{picture.format.lower()}"
    return np.asarray(picture.convert("L"))


def grey_levels(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.mark.parametrize(
    "image_format,apart", [("png", 1), ("webp", 1), ("jpeg", 40), ("numpy", 1), ("json", 1)]
)
def test_every_format_carries_the_models_images(endpoint, image_format, apart):
    expected = biggan.load_generator("tiny@best").sample([3] * 4, seed=7, truncation=0.5)
    body = {"class": 3, "n": 4, "seed": 7, "truncation": 0.5, "format": image_format}
    response = post(endpoint, body)
    assert response.status_code == 200
    if image_format in ("png", "webp", "jpeg"):  # A grid of two by two.
        expected = np.asarray(sheet(expected, 2, min_side=1))
    assert grey_levels(decode(response), expected) <= apart
    told = {name: response.headers[f"X-{name}"] for name in ("Model", "Class-Id", "Seed")}
    assert told == {"Model": "tiny@v1", "Class-Id": "3", "Seed": "7"}


def test_one_image_is_a_picture_of_its_own_size(endpoint):
    response = post(endpoint, {"class": "9"})
    assert decode(response).shape == (16, 16)
    again = post(endpoint, {"class": "9", "seed": int(response.headers["X-Seed"])})
    assert grey_levels(decode(again), decode(response)) <= 1


def test_a_seed_gives_the_same_image_whatever_it_is_batched_with(endpoint):
    alone = decode(post(endpoint, {"class": 5, "seed": 11, "format": "numpy"}))
    results = []

    def ask(i):
        body = {"class": 5, "seed": 11 - i, "n": i + 1, "format": "numpy"}
        results.append(decode(post(endpoint, body))[i])

    threads = [threading.Thread(target=ask, args=(i % 12,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 24
    for image in results:
        assert grey_levels(image, alone[0]) <= 1


@pytest.mark.parametrize(
    "body,field,said",
    [
        ({}, "class", "required"),
        ({"class": "cat"}, "class", "class"),
        ({"class": 10}, "class", "10"),
        ({"class": -1}, "class", "greater than or equal to 0"),
        ({"class": 1.5}, "class", "integer"),
        ({"class": True}, "class", "valid"),
        ({"class": None}, "class", "valid"),
        ({"class": ""}, "class", "at least 1"),
        ({"class": "x" * 300}, "class", "at most 200"),
        ({"class": "\ud800"}, "class", ""),
        ({"class": 3, "n": 0}, "n", "greater than or equal to 1"),
        ({"class": 3, "n": 65}, "n", "less than or equal to 64"),
        ({"class": 3, "n": "4"}, "n", "integer"),
        ({"class": 3, "seed": -1}, "seed", "greater than or equal to 0"),
        ({"class": 3, "seed": 2**53}, "seed", "less than or equal to"),
        ({"class": 3, "seed": 10**400}, "seed", ""),
        ({"class": 3, "truncation": 0}, "truncation", "greater than 0"),
        ({"class": 3, "truncation": "high"}, "truncation", "number"),
        ({"class": 3, "format": "gif"}, "format", "'png'"),
        ({"class": 3, "trunc": 1}, "trunc", "no such field"),
        ([], "body", "dictionary"),
        ("text", "body", "dictionary"),
        (None, "body", ""),
    ],
)
def test_a_wrong_field_is_named_with_its_limit(endpoint, body, field, said):
    response = post(endpoint, body)
    assert response.status_code == 422
    assert response.headers["Content-Type"] == PROBLEM
    problem = response.json()
    assert problem["status"] == 422
    assert field in [error["field"] for error in problem["errors"]]
    assert said in str(problem["errors"])


@pytest.mark.parametrize(
    "content,status",
    [
        (b"", 422),
        (b"{", 422),
        (b"\xff\xfe", 422),
        (b'{"class": NaN}', 422),
        (b'{"class": 3, "truncation": Infinity}', 422),
        (b'{"class": 3, "truncation": 1e999}', 422),
        (b"[" * 30_000, 400),
        (b'{"class": "' + b"x" * 70_000 + b'"}', 413),
    ],
)
def test_a_body_that_is_no_request(endpoint, content, status):
    headers = {"Content-Type": "application/json"}
    response = requests.post(f"{endpoint}/v1/generate", data=content, headers=headers, timeout=60)
    assert response.status_code == status
    assert response.headers["Content-Type"] == PROBLEM


def test_no_random_body_fails_the_endpoint(endpoint):
    draw = random.Random(0)

    def value(depth=0):
        return draw.choice(
            [
                lambda: draw.choice([None, True, False, "3", 3, "png", "numpy", "", "json"]),
                lambda: draw.randint(-(2**70), 2**70),
                lambda: draw.uniform(-200, 200),
                lambda: "".join(draw.choices(string.printable + "ÿ\0√", k=draw.randint(0, 30))),
                lambda: [value(depth + 1) for _ in range(draw.randint(0, 2))] if depth < 3 else 0,
                lambda: {"class": value(depth + 1)} if depth < 3 else {},
            ]
        )()

    names = ["class", "class_", "n", "seed", "truncation", "format", "", "extra"]
    session, statuses = requests.Session(), []
    for _ in range(400):
        body = {"class": 3} | {draw.choice(names): value() for _ in range(draw.randint(0, 3))}
        response = session.post(f"{endpoint}/v1/generate", json=body, timeout=60)
        statuses.append(response.status_code)
    assert set(statuses) == {200, 422}


def test_other_errors_are_problems_too(endpoint):
    for method, path, status in (
        ("GET", "/v1/generate", 405),
        ("GET", "/v2", 404),
        ("POST", "/v1/classes", 405),
        ("GET", "/../../etc/passwd", 404),
    ):
        response = requests.request(method, endpoint + path, timeout=60)
        assert response.status_code == status
        assert response.headers["Content-Type"] == PROBLEM
        assert response.json()["status"] == status


def test_the_openapi_document_describes_requests_that_work(endpoint):
    assert "swagger" in requests.get(f"{endpoint}/docs", timeout=60).text
    document = requests.get(f"{endpoint}/openapi.json", timeout=60).json()
    assert set(document["paths"]) == {"/v1/generate", "/v1/classes", "/v1/model", "/healthz"}
    [example] = document["components"]["schemas"]["GenerateRequest"]["examples"]
    assert post(endpoint, example).status_code == 200
    answers = document["paths"]["/v1/generate"]["post"]["responses"]
    assert {"200", "413", "422", "503"} <= set(answers)


def test_the_client(endpoint, tiny_model):
    client = biggan.Client(endpoint)
    assert client.healthy()
    assert client.classes() == [str(i) for i in range(10)]
    served = client.model()
    assert served["model"] == "tiny@v1"
    assert served["fid"] == tiny_model.card.fid
    assert served["fid_protocol"] == tiny_model.card.fid_protocol
    images = client.generate("4", n=3, seed=20, truncation=0.8)
    assert [image.seed for image in images] == [20, 21, 22]
    assert {(image.class_name, image.truncation, image.model) for image in images} == {
        ("4", 0.8, "tiny@v1")
    }
    assert images[0].image.size == (16, 16)
    arrays = client.arrays(4, n=3, seed=20, truncation=0.8)
    expected = biggan.load_generator("tiny@v1").sample([4] * 3, seed=20, truncation=0.8)
    assert grey_levels(arrays, expected) <= 1
    with pytest.raises(EndpointError, match=r"422 Unprocessable.*class = 'cat'") as caught:
        client.generate("cat")
    assert caught.value.status == 422
    assert not biggan.Client(f"http://127.0.0.1:{free_port()}", retries=0).healthy()


def test_promotion_changes_what_is_served_without_a_dropped_request(endpoint, digits):
    run = locate("runs", "tiny-second")
    train_here(tiny(seed=1), run, digits)
    statuses, models, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            response = post(endpoint, {"class": 3, "n": 8})
            statuses.append(response.status_code)
            models.append(response.headers.get("X-Model"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        promotion = biggan.promote(run="tiny-second", name="tiny", force=True)
        assert promotion.card.version == "v2"
        deadline = time.monotonic() + 30
        while "tiny@v2" not in models[-4:] and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        ModelStore("tiny").set_alias("best", "v1")
    assert set(models) == {"tiny@v1", "tiny@v2"}
    assert set(statuses) == {200}
    assert len(statuses) > 50


def follow(endpoint, version):
    """Point `best` at a version, and wait until it is what is served."""
    ModelStore("tiny").set_alias("best", version)
    deadline = time.monotonic() + 30
    while requests.get(f"{endpoint}/healthz", timeout=60).json()["model"] != f"tiny@{version}":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_imported_model_that_scales_its_latents(endpoint):
    G = biggan.load_generator("tiny@v1")
    G.add_tables(TruncationTables(truncations=(0.0, 0.5, 1.0), convention="scale"))
    version = add_imported("tiny", G).name
    try:
        follow(endpoint, version)
        served = biggan.Client(endpoint).model()
        assert [served[field] for field in ("fid", "run", "dataset", "kimg")] == [None] * 4
        truncations = [0.5, 1.5, None, 0.7, 1.2, 1.0] * 4
        answers = {}

        def ask(i):
            body = {"class": 3, "seed": i, "truncation": truncations[i], "format": "numpy"}
            answers[i] = post(endpoint, body)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(truncations))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        follow(endpoint, "v1")
    for i, truncation in enumerate(truncations):
        if truncation is None or truncation <= 1:
            expected = G.sample(3, seed=i, truncation=truncation)
            assert grey_levels(decode(answers[i]), expected) <= 1
            continue
        assert answers[i].status_code == 422
        assert answers[i].headers["Content-Type"] == PROBLEM
        [error] = answers[i].json()["errors"]
        assert (error["field"], error["value"]) == ("truncation", truncation)
        assert "at most by 1" in error["limit"]


def test_a_model_that_is_not_there_is_said_at_once(digits):
    command = [sys.executable, "-m", "serving", "--model", "nothing@best"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: model nothing@best is not in the store" in done.stderr
    assert "Traceback" not in done.stderr
