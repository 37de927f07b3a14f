"""The endpoint's operations over HTTP, held against the generator's own images."""

import asyncio
import base64
import gzip
import io
import random
import re
import string
import threading
import zipfile

import numpy as np
import pytest
import requests
import torch
from conftest import add_imported
from local_endpoint import new_service, served
from PIL import Image

import biggan
from biggan.client import EndpointError
from biggan.config import ModelConfig
from biggan.directions import find_directions
from biggan.networks import Generator
from biggan.pixels import sheet
from biggan.provenance import read_origin, save
from biggan.recipe import Origin, Recipe
from biggan.reproduction import verify
from biggan.synthesis import synthesize
from serving.encoding import MAX_SIDES
from serving.keys import Keys
from serving.schemas import MAX_UPLOAD_BYTES

PROBLEM = "application/problem+json"


def post(endpoint, path, body, **options):
    return requests.post(f"{endpoint}/v1/{path}", json=body, timeout=60, **options)


def pixels(content):
    """A picture's pixels, [H, W, C]."""
    image = np.asarray(Image.open(io.BytesIO(content)))
    return image if image.ndim == 3 else image[..., None]


def frames(content):
    """All frames of a moving picture, [N, H, W]."""
    picture, found = Image.open(io.BytesIO(content)), []
    for i in range(picture.n_frames):
        picture.seek(i)
        found.append(np.asarray(picture.convert("L")))
    return np.stack(found)


def listed(answer):
    """The pixels of a JSON answer's images, [N, H, W, C]."""
    return np.stack([pixels(base64.b64decode(item["image"])) for item in answer["images"]])


def grey_levels(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.mark.parametrize(
    "image_format,apart", [("png", 1), ("webp", 1), ("jpeg", 30), ("numpy", 1), ("json", 1)]
)
def test_every_format_carries_the_models_images(endpoint, grey, image_format, apart):
    expected = grey.sample([3] * 4, seed=7, truncation=0.5)
    body = {"class": 3, "n": 4, "seed": 7, "truncation": 0.5, "format": image_format}
    response = post(endpoint, "generate", body)
    assert response.status_code == 200, response.text
    if image_format == "numpy":
        found = np.load(io.BytesIO(response.content), allow_pickle=False)
    elif image_format == "json":
        found = listed(response.json())
    else:
        assert response.headers["Content-Type"] == f"image/{image_format}"
        expected = np.asarray(sheet(expected, 2, min_side=1))[..., None]
        found = np.asarray(Image.open(io.BytesIO(response.content)).convert("L"))[..., None]
    assert grey_levels(found, expected) <= apart
    assert response.headers["X-Model"] == "grey@v1"
    assert response.headers["X-Seed"] == "7"


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_layouts(endpoint, colour, image_format):
    expected = colour.sample([2] * 6, seed=5)
    body = {"model": "colour", "class": "digit 2", "n": 6, "seed": 5, "format": image_format}
    apart = 60 if image_format == "jpeg" else 1
    grid = pixels(post(endpoint, "generate", body | {"columns": 6}).content)
    assert grey_levels(grid, np.asarray(sheet(expected, 6, min_side=1))) <= apart
    archive = zipfile.ZipFile(
        io.BytesIO(post(endpoint, "generate", body | {"layout": "zip"}).content)
    )
    assert archive.namelist() == [f"{i:03d}.{image_format}" for i in range(6)]
    zipped = np.stack([pixels(archive.read(name)) for name in archive.namelist()])
    assert grey_levels(zipped, expected) <= apart
    answer = post(endpoint, "generate", body | {"layout": "list"}).json()
    assert answer["media_type"] == f"image/{image_format}"
    assert [item["seed"] for item in answer["images"]] == [5, 6, 7, 8, 9, 10]
    assert grey_levels(listed(answer), expected) <= apart


def test_a_mixture_of_classes(endpoint, grey):
    mixture = torch.zeros(2, 10)
    mixture[:, [0, 4]] = torch.tensor([0.25, 0.75])
    expected = grey.render(grey.latents([9, 10]), mixture, [None] * 2)
    for weights in ({"digit 0": 1.0, "4": 3.0}, {"0": 0.25, "digit 4": 0.75}):
        body = {"class": weights, "n": 2, "seed": 9, "format": "json"}
        answer = post(endpoint, "generate", body).json()
        assert grey_levels(listed(answer), expected) <= 1
        assert answer["images"][0]["latent"]["class"] == {"digit 0": 0.25, "digit 4": 0.75}


def test_a_random_seed_is_told(endpoint):
    first = post(endpoint, "generate", {"class": "digit 9"})
    assert pixels(first.content).shape == (16, 16, 1)
    again = post(endpoint, "generate", {"class": 9, "seed": int(first.headers["X-Seed"])})
    assert grey_levels(pixels(again.content), pixels(first.content)) <= 1
    assert post(endpoint, "generate", {"class": 9}).headers["X-Seed"] != first.headers["X-Seed"]


def test_edits_are_steps_along_directions(endpoint, grey):
    directions = find_directions(grey)
    told = requests.get(f"{endpoint}/v1/directions", timeout=60).json()
    assert [d["index"] for d in told["directions"]] == list(range(24))
    assert [d["effect"] for d in told["directions"]] == pytest.approx(directions.effects.tolist())
    z = grey.latents([3])
    moved = z + 2.5 * directions.vectors[0] - 1.0 * directions.vectors[5]
    expected = grey.render(torch.cat([z, moved]), torch.tensor([7, 7]), [None] * 2)
    body = {"image": {"class": 7, "seed": 3}, "edits": {"0": 2.5, "5": -1}, "format": "json"}
    answer = post(endpoint, "edit", body).json()
    assert grey_levels(listed(answer), expected[1:]) <= 1
    strip = post(endpoint, "edit", body | {"steps": 5}).json()
    assert grey_levels(listed(strip)[[0, 4]], expected) <= 1
    half = [item["latent"]["edits"] for item in strip["images"]][2]
    assert half == {"0": 1.25, "5": -0.5}
    sent_back = post(endpoint, "edit", {"image": answer["images"][0]["latent"], "format": "json"})
    assert grey_levels(listed(sent_back.json()), expected[1:]) <= 1


def test_a_morph_mixes_classes(endpoint, grey):
    body = {"image": {"class": 1, "seed": 3}, "morph": {"class": 8, "amount": 0.5}, "steps": 3}
    found = listed(post(endpoint, "edit", body | {"format": "json"}).json())
    mixtures = torch.zeros(3, 10)
    mixtures[:, 1], mixtures[:, 8] = torch.tensor([1, 0.75, 0.5]), torch.tensor([0, 0.25, 0.5])
    expected = grey.render(grey.latents([3]).repeat(3, 1), mixtures, [None] * 3)
    assert grey_levels(found, expected) <= 1
    # An embedding of its own is mixed with that of the class.
    y = grey.embed(mixtures[[0]])[0]
    image = {"z": grey.latents([3])[0].tolist(), "y": y.tolist()}
    found = listed(post(endpoint, "edit", body | {"image": image, "format": "json"}).json())
    assert grey_levels(found, expected) <= 1


@pytest.mark.parametrize("image_format", ["webp", "gif"])
def test_an_animation_loops_without_a_jump(endpoint, grey, image_format):
    body = {
        "stops": [{"class": 3, "seed": 1}, {"class": 8, "seed": 2}],
        "frames": 12,
        "format": image_format,
    }
    response = post(endpoint, "interpolate", body)
    assert response.headers["Content-Type"] == f"image/{image_format}"
    found = frames(response.content)
    assert len(found) == 24
    ends = grey.sample([3, 8], seed=[1, 2])[..., 0]
    assert grey_levels(found[[0, 12]], ends) <= 1
    steps = np.abs(np.diff(found[[*range(24), 0]].astype(float), axis=0)).mean((1, 2))
    assert steps[-1] <= 2 * np.median(steps)
    assert steps.max() <= 3 * np.median(steps)


def test_frames_in_other_formats(endpoint, grey):
    body = {"stops": [{"class": 3, "seed": 1}, {"class": 8, "seed": 2}], "frames": 5}
    body |= {"loop": False}
    answer = post(endpoint, "interpolate", body | {"format": "json"}).json()
    expected = listed(answer)
    assert len(expected) == 6
    assert grey_levels(expected[[0, -1]], grey.sample([3, 8], seed=[1, 2])) <= 1
    array = post(endpoint, "interpolate", body | {"format": "numpy"}).content
    assert grey_levels(np.load(io.BytesIO(array)), expected) <= 1
    page = pixels(post(endpoint, "interpolate", body | {"format": "png"}).content)
    assert page.shape == (2 * 18 + 2, 5 * 18 + 2, 1)
    movie = post(endpoint, "interpolate", body | {"format": "mp4", "scale": 4})
    assert movie.headers["Content-Type"] == "video/mp4"
    assert movie.content[4:8] == b"ftyp"
    latent = answer["images"][2]["latent"]
    again = post(endpoint, "edit", {"image": latent, "format": "json"}).json()
    assert grey_levels(listed(again), expected[[2]]) <= 1


@pytest.fixture(scope="module")
def many(storage):
    """The address of an endpoint for a model of many classes."""
    torch.manual_seed(2)
    config = ModelConfig(ch_g=8, z_dim=24, attention=())
    G = Generator(config, resolution=16, channels=1, n_classes=300).eval().requires_grad_(False)
    G.class_names = [f"thing {i}" for i in range(300)]
    add_imported("many", G)
    with served(new_service(["many"])) as url:
        yield url


def mixed(*classes, weight=1.0):
    return {str(i): weight for i in range(*classes)}


Y = {"y": [0.1] * 128, "seed": 3}
STRONG = mixed(8, weight=1e4)


@pytest.mark.parametrize(
    "path,body",
    [
        ("edit", {"image": Y, "morph": {"class": 7}, "steps": 3}),
        ("interpolate", {"stops": [Y, {"class": 7, "seed": 4}, Y | {"seed": 5}]}),
        ("generate", {"class": {"3": 5e-324, "4": 1e4}, "seed": 2**53 - 2, "n": 2}),
        ("edit", {"image": {"class": mixed(16), "seed": 3}, "morph": {"class": mixed(16, 32)}}),
        (
            "interpolate",
            {"stops": [{"class": mixed(100), "seed": 3}, {"class": mixed(100, 250), "seed": 4}]},
        ),
        ("edit", {"image": {"class": 3, "seed": 3, "edits": mixed(16)}, "edits": mixed(9, 24)}),
        (
            "interpolate",
            {"stops": [{"class": i, "seed": i, "edits": STRONG} for i in range(2)]},
        ),
    ],
)
def test_every_latent_that_is_told_is_taken_again(many, path, body):
    frames = {"frames": 3, "loop": False} if path == "interpolate" else {}
    answer = post(many, path, body | frames | {"format": "json"}).json()
    latents = [item["latent"] for item in answer["images"]]
    made = listed(answer)
    for latent, image in zip(latents, made, strict=True):
        again = post(many, "edit", {"image": latent, "format": "json"})
        assert again.status_code == 200, again.text
        assert grey_levels(listed(again.json()), image[None]) <= 1
    stops = {"stops": [latents[0], latents[-1]], "frames": 2, "loop": False, "format": "json"}
    again = post(many, "interpolate", stops)
    assert again.status_code == 200, again.text
    assert grey_levels(listed(again.json())[[0, -1]], made[[0, -1]]) <= 1


def test_an_image_by_its_own_embedding_tells_the_class_that_it_comes_to(endpoint):
    own = {"class": "digit 0", "seed": 3, "y": [0.5] * 128}
    body = {"image": own, "morph": {"class": 8, "amount": 1}, "steps": 3, "format": "json"}
    images = post(endpoint, "edit", body).json()["images"]
    assert [item["latent"]["class"] for item in images] == [
        {"digit 0": 1.0}, {"digit 0": 0.5, "digit 8": 0.5}, {"digit 8": 1.0}
    ]  # fmt: skip
    none = {"seed": 3, "y": [0.5] * 128}
    stops = {"stops": [none, {"class": 8, "seed": 1}], "frames": 2, "loop": False}
    images = post(endpoint, "interpolate", stops | {"format": "json"}).json()["images"]
    assert [item["latent"]["class"] for item in images] == [None, None, {"digit 8": 1.0}]


def test_as_many_stops_as_there_may_be_fit_into_a_request(many):
    z, y = [1.2345678901234567] * 24, [-1.2345678901234567e-5] * len(Y["y"])
    stop = {"class": mixed(256), "z": z, "y": y, "edits": mixed(24, weight=1.2345678901234567)}
    answer = post(many, "interpolate", {"stops": 16 * [stop], "frames": 2, "format": "json"})
    assert answer.status_code == 200, answer.text


def test_classes_that_could_not_be_sent_back_together_are_refused(many):
    some, others = ({"class": mixed(*part), "seed": 3} for part in ((150,), (150, 300)))
    for path, body in (
        ("interpolate", {"stops": [some, others]}),
        ("edit", {"image": some, "morph": {"class": others["class"]}}),
    ):
        answer = post(many, path, body)
        assert answer.status_code == 422
        assert "300: classes in all: 256 at most" in answer.json()["detail"]


def test_a_seed_gives_the_same_image_whatever_it_is_batched_with(endpoint, grey):
    expected = grey.sample([5], seed=11)[0]
    results = []

    def ask(i):
        body = {"class": 5, "seed": 11 - i, "n": i + 1, "format": "numpy"}
        while (response := post(endpoint, "generate", body)).status_code == 503:
            assert response.headers["Retry-After"] == "1"
        results.append(np.load(io.BytesIO(response.content))[i])

    threads = [threading.Thread(target=ask, args=(i % 12,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    for image in results:
        assert grey_levels(image, expected) <= 1


@pytest.mark.parametrize(
    "path,body,field,said",
    [
        ("generate", {}, "class", "required"),
        ("generate", {"class": "cat"}, "class", "no class is named 'cat'"),
        ("generate", {"class": 10}, "class", "ids go from 0 to 9"),
        ("generate", {"class": -1}, "class", "greater than or equal to 0"),
        ("generate", {"class": 1.5}, "class", "integer"),
        ("generate", {"class": True}, "class", "valid"),
        ("generate", {"class": None}, "class", "valid"),
        ("generate", {"class": ""}, "class", "at least 1"),
        ("generate", {"class": "x" * 300}, "class", "at most 200"),
        ("generate", {"class": {}}, "class", "at least 1"),
        ("generate", {"class": {"0": 0}}, "class", "greater than 0"),
        ("generate", {"class": {"0": 1.0, "cat": 1.0}}, "class", "cat"),
        ("generate", {"class": "\ud800"}, "class", ""),
        ("generate", {"class": 3, "n": 0}, "n", "greater than or equal to 1"),
        ("generate", {"class": 3, "n": 65}, "n", "less than or equal to 64"),
        ("generate", {"class": 3, "n": "4"}, "n", "integer"),
        ("generate", {"class": 3, "seed": -1}, "seed", "greater than or equal to 0"),
        ("generate", {"class": 3, "seed": 2**53}, "seed", "less than or equal to"),
        ("generate", {"class": 3, "seed": 10**400}, "seed", ""),
        ("generate", {"class": 3, "seed": 2**53 - 1, "n": 2}, "seed", "beyond"),
        ("generate", {"class": 3, "truncation": 0}, "truncation", "greater than 0"),
        ("generate", {"class": 3, "truncation": "high"}, "truncation", "number"),
        ("generate", {"class": 3, "format": "bmp"}, "format", "'png'"),
        ("generate", {"class": 3, "layout": "pile"}, "layout", "'grid'"),
        ("generate", {"class": 3, "columns": 0}, "columns", "greater than or equal to 1"),
        ("generate", {"class": 3, "edits": {"24": 1.0}}, "edits", "0 to 23"),
        ("generate", {"class": 3, "edits": {"smile": 1.0}}, "edits", "0 to 23"),
        ("generate", {"class": 3, "trunc": 1}, "trunc", "no such field"),
        ("generate", {"class": 3, "model": "../../etc/passwd"}, "model", "match pattern"),
        ("generate", {"class": 3, "model": "grey@../../x"}, "model", "match pattern"),
        ("generate", [], "body", "dictionary"),
        ("generate", "text", "body", "dictionary"),
        ("generate", None, "body", ""),
        ("edit", {"image": {"class": 3}}, "image", "either seed or z"),
        ("edit", {"image": {"seed": 3}}, "image", "give a class, or y"),
        ("edit", {"image": {"class": 3, "z": [1.0]}}, "image.z", "24 numbers"),
        ("edit", {"image": {"class": 3, "z": []}}, "image.z", "24 numbers"),
        ("edit", {"image": {"y": [1.0], "seed": 1}}, "image.y", "128 numbers"),
        ("edit", {"image": {"class": 3, "z": [1e7]}}, "image.z", "less than or equal to"),
        (
            "edit",
            {"image": {"class": 3, "seed": 1, "edits": {"0": 9000}}, "edits": {"0": 2000}},
            "edits",
            "at most 10000",
        ),
        ("edit", {"image": {"class": 3, "seed": 1}, "morph": {}}, "morph.class", "required"),
        ("interpolate", {"stops": [{"class": 1, "seed": -1}] * 2}, "stops.1.seed", "or equal to 0"),
        ("interpolate", {"stops": [{"clas": 1, "seed": 1}] * 2}, "stops.0.clas", "no such field"),
        ("interpolate", {"stops": [{"class": 1}] * 2}, "stops.1", "either seed or z"),
        ("interpolate", {"stops": [{"class": 3, "seed": 1}]}, "stops", "at least 2"),
        (
            "interpolate",
            {"stops": [{"class": 3, "seed": 1}] * 3, "frames": 200},
            "frames",
            "more than 256 in all",
        ),
        (
            "interpolate",
            {"stops": [{"class": 3, "seed": 1}, {"class": "cat", "seed": 1}]},
            "stops.1.class",
            "cat",
        ),
        ("images/generations", {"prompt": "a polar bear"}, "prompt", "no class"),
        ("images/generations", {"prompt": "digit 3", "size": "2000x2"}, "size", "1024"),
        ("images/generations", {"prompt": "digit 3", "n": 11}, "n", "less than or equal"),
    ],
)
def test_a_wrong_field_is_named_with_its_limit(endpoint, path, body, field, said):
    response = post(endpoint, path, body)
    assert response.status_code == 422
    assert response.headers["Content-Type"] == PROBLEM
    problem = response.json()
    assert problem["status"] == 422
    assert field in [error["field"] for error in problem["errors"]]
    assert said in str(problem["errors"])


@pytest.mark.parametrize(
    "path,body,said",
    [
        ("invert", {f"{i:05x}": 0 for i in range(100_000)}, "100,000 fields"),
        ("generate", {f"no{i}": 0 for i in range(40)}, "; and 21 more"),
        ("generate", {"no" * 20_000: 0}, "no such field"),
        ("generate", {"class": {f"{i}": "" for i in range(5000)}}, "a valid number"),
        ("generate", {"class": 3, "edits": {f"{i}": "" for i in range(5000)}}, "a valid number"),
        ("edit", {"image": {"class": 3, "z": ["x"] * 12_000}}, "a valid number"),
        ("interpolate", {"stops": [{f"no{i}": 0 for i in range(60)}] * 16}, "no such field"),
        ("invert", {"image": [0] * 1_000_000}, "a valid string"),
    ],
)
def test_a_heap_of_mistakes_gets_a_short_answer(endpoint, path, body, said):
    response = post(endpoint, path, body)
    assert response.status_code == 422
    assert len(response.content) < 5000
    problem = response.json()
    assert said in problem["detail"]
    assert len(problem["errors"]) <= 20


@pytest.mark.parametrize(
    "model,said",
    [("digits", "served are: grey, colour"), ("grey@v7", "grey@v7"), ("grey@old", "grey@old")],
)
def test_a_model_that_is_not_served(endpoint, model, said):
    for response in (
        post(endpoint, "generate", {"class": 3, "model": model}),
        requests.get(f"{endpoint}/v1/classes", params={"model": model}, timeout=60),
        requests.get(f"{endpoint}/v1/models/{model}", timeout=60),
    ):
        assert response.status_code == 404
        assert response.headers["Content-Type"] == PROBLEM
        assert said in str(response.json())


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
        (b'{"class": "' + b"x" * 530_000 + b'"}', 413),
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
        ("GET", "/page/..%2fapi.py", 404),
        ("GET", "/page/nothing.js", 404),
        ("GET", "/redoc", 404),
    ):
        response = requests.request(method, endpoint + path, timeout=60)
        assert response.status_code == status
        assert response.headers["Content-Type"] == PROBLEM
        assert response.json()["status"] == status


def test_pages_are_open_to_all_and_load_nothing_from_elsewhere(service):
    with served(service, Keys()) as url:
        for path in ("/", "/docs"):
            answer = requests.get(url + path, timeout=60)
            assert answer.status_code == 200
            rules = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'; script-src 'self'; style-src 'self';" in rules
            for file in re.findall('(?:src|href)="(page/[^"]+)"', answer.text):
                assert requests.get(f"{url}/{file}", timeout=60).status_code == 200


def test_every_example_of_the_openapi_document_works(endpoint):
    document = requests.get(f"{endpoint}/openapi.json", timeout=60).json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    [[kind, content]] = answer["content"].items()
                    assert (kind, content["example"]["status"]) == (PROBLEM, int(status))
            examples = [
                (kind, content["example"])
                for kind, content in operation["responses"]["200"]["content"].items()
                if "example" in content
            ]
            [(kind, example)] = examples
            assert isinstance(example, dict if kind == "application/json" else str), path
            if method != "post":
                continue
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            name = schema["$ref"].rsplit("/", 1)[-1]
            for example in document["components"]["schemas"][name]["examples"]:
                response = requests.post(endpoint + path, json=example, timeout=60)
                assert response.status_code == 200, (path, example, response.text)


def test_models_and_how_they_fare(endpoint, service):
    post(endpoint, "generate", {"class": 3, "n": 3, "model": "colour"})
    found = {m["id"]: m for m in requests.get(f"{endpoint}/v1/models", timeout=60).json()["data"]}
    assert set(found) == {"grey@v1", "colour@v1"}
    entry = found["grey@v1"]
    assert (entry["aliases"], entry["share"], entry["resolution"]) == (["best"], 1.0, 16)
    for reference in ("colour", "colour@best", "colour@v1"):
        entry = requests.get(f"{endpoint}/v1/models/{reference}", timeout=60).json()
        assert (entry["id"], entry["channels"], entry["fid"]) == ("colour@v1", 3, None)


def as_base64(content):
    return base64.b64encode(content).decode()


def verified(endpoint, content):
    response = post(endpoint, "verify", {"image": as_base64(content)})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "headers,said",
    [
        ({"Content-Type": "text/plain"}, "Content-Type = 'text/plain': must be application/json"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, "'multipart/form-data': must be"),
        ({}, "Content-Type = '': must be application/json"),
        (
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            "Content-Encoding = 'gzip': must be left out",
        ),
    ],
)
def test_a_body_that_is_no_json_is_told_to_be_none(endpoint, headers, said):
    content = b'{"class": 3}'
    if "Content-Encoding" in headers:
        content = gzip.compress(content)
    answer = requests.post(f"{endpoint}/v1/generate", data=content, headers=headers, timeout=60)
    assert answer.status_code == 415
    assert said in answer.json()["detail"]


def test_numbers_are_told_back_as_numbers(endpoint):
    answer = post(endpoint, "generate", {"class": 3, "seed": 1, "truncation": -0.5})
    assert answer.json()["errors"][0]["value"] == -0.5
    [missing] = post(endpoint, "images/generations", {}).json()["errors"]
    assert (missing["field"], missing["value"]) == ("prompt", None)


@pytest.mark.parametrize("model", ["grey", "colour"])
@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_images_say_where_they_came_from_and_can_be_verified(endpoint, model, image_format):
    body = {"model": model, "class": 3, "seed": 4, "truncation": 0.9, "format": image_format}
    for more in ({}, {"n": 5}, {"edits": {"1": 2.0}}):
        content = post(endpoint, "generate", body | more).content
        answer = verified(endpoint, content)
        assert (answer["status"], answer["model"]) == ("verified", f"{model}@v1"), answer
        assert answer["synthetic"] is True
    assert "digit 3, seed 4, truncation 0.9, edited, by" in answer["description"]
    changed = Image.open(io.BytesIO(content))
    kept = {"xmp": changed.info["xmp"]} if "xmp" in changed.info else {}
    changed.paste(255 if changed.getpixel((3, 3)) != 255 else 0, (2, 2, 6, 6))
    file = io.BytesIO()
    changed.save(file, image_format, **kept)
    assert verified(endpoint, file.getvalue())["status"] in ("altered", "no origin")


@pytest.mark.parametrize("model", ["grey", "colour"])
@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("size", ["auto", "40x40", "7x1024"])
def test_a_resized_image_is_verified_as_any_other(
    endpoint, request, storage, model, image_format, size
):
    body = {"model": model, "prompt": "digit 3", "size": size, "output_format": image_format}
    body |= {"n": 2, "response_format": "b64_json"}
    for item in post(endpoint, "images/generations", body).json()["data"]:
        content = base64.b64decode(item["b64_json"])
        answer = verified(endpoint, content)
        assert (answer["status"], answer["model"]) == ("verified", f"{model}@v1"), answer
        assert verify(content).status == "verified"
        origin, image = read_origin(content), Image.open(io.BytesIO(content))
        # Made by hand.
        [made] = synthesize(request.getfixturevalue(model), origin.recipes, None)
        expected = Image.fromarray(made.squeeze())
        if size == "auto":
            assert "resized" not in answer["description"]
        else:
            assert f"; resized to {size}; synthetic" in answer["description"]
            expected = expected.resize(image.size, Image.Resampling.BICUBIC)
            assert f"{image.width}x{image.height}" == size
        both = [np.asarray(picture.convert("RGB")) for picture in (image, expected)]
        assert grey_levels(*both) <= (60 if image_format == "jpeg" else 2)
        image.paste(255 if image.getpixel((3, 3)) != 255 else 0, (2, 2, 6, 6))
        doctored = save(image, image_format, origin)
        assert verified(endpoint, doctored)["status"] == "altered"


@pytest.mark.parametrize("image_format", ["webp", "gif"])
def test_an_animation_can_be_verified(endpoint, image_format):
    body = {"stops": [{"class": 3, "seed": 1}, {"class": 8, "seed": 2}], "frames": 4}
    content = post(endpoint, "interpolate", body | {"format": image_format, "scale": 2}).content
    assert verified(endpoint, content)["status"] == "verified"


@pytest.mark.parametrize(
    "recipe",
    [
        {"classes": {99: 1.0}, "seed": 1},
        {"classes": {1: 1.0}, "z": [0.0] * 3},
        {"classes": {1: 1.0}, "seed": 1, "edits": {500: 1.0}},
        {"classes": {1: 1.0}, "seed": 1, "y": [1.0]},
    ],
)
def test_a_file_that_names_what_no_model_can_make(endpoint, service, grey, recipe):
    model = asyncio.run(service.catalogue.find("grey"))
    origin = Origin(
        model="grey@v1", weights=model.weights, class_names={}, recipes=(Recipe(**recipe),)
    )
    content = save(Image.new("L", (16, 16)), "PNG", origin)
    answer = verified(endpoint, content)
    assert answer["status"] == "altered"
    assert "cannot have made it" in answer["detail"]


def test_a_sheet_is_as_wide_and_high_as_its_format_can_be(endpoint, monkeypatch):
    monkeypatch.setitem(MAX_SIDES, "webp", 100)  # 5 images of 16 pixels, and 2 around each.
    body = {"class": 3, "seed": 1, "n": 12, "format": "webp"}
    for columns, status in ((2, 422), (3, 200), (5, 200), (6, 422)):
        answer = post(endpoint, "generate", body | {"columns": columns})
        assert answer.status_code == status
        if status == 422:
            assert "columns" in answer.json()["detail"]
            assert "12 images of 16 pixels as webp go into 3 to 5 columns" in answer.text
    for more in ({"format": "png"}, {"layout": "zip"}):
        answer = post(endpoint, "generate", body | {"columns": 12} | more)
        assert answer.status_code == 200
    edit = {"image": {"class": 3, "seed": 1}, "edits": {"0": 2}, "steps": 12, "format": "webp"}
    picture = Image.open(io.BytesIO(post(endpoint, "edit", edit).content))
    assert picture.size == (5 * 18 + 2, 3 * 18 + 2)


def test_an_animation_has_a_bound_of_pixels(endpoint, monkeypatch):
    monkeypatch.setattr("serving.service.MAX_MOTION_PIXELS", 8 * 32**2)
    body = {"stops": [{"class": 3, "seed": 1}, {"class": 8, "seed": 2}], "frames": 4}
    assert post(endpoint, "interpolate", body | {"scale": 2}).status_code == 200
    answer = post(endpoint, "interpolate", body | {"scale": 3})
    assert answer.status_code == 422
    assert answer.json()["detail"] == "scale = 3: 8 frames have more than 8,192 pixels in all"


def test_a_small_picture_is_turned_as_it_says(endpoint):
    pixels = np.repeat([255, 0], 4).astype(np.uint8)[:, None] * np.ones((1, 8), np.uint8)
    brightness = {}
    for turned in (False, True):
        picture, file = Image.fromarray(np.flipud(pixels) if turned else pixels), io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 3 if turned else 1  # Upside down.
        picture.save(file, "PNG", exif=exif)
        body = {"image": as_base64(file.getvalue()), "factor": 2, "candidates": 1, "class": 3}
        [found] = post(endpoint, "upscale", body).json()["candidates"]
        brightness[turned] = listed({"images": [found]})
    assert grey_levels(brightness[True], brightness[False]) <= 1


def test_an_image_of_nobodys(endpoint):
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, "PNG")
    assert verified(endpoint, file.getvalue())["status"] == "no origin"
    for content, status in ((b"not an image", 415), (file.getvalue()[:45], 422)):
        response = post(endpoint, "verify", {"image": as_base64(content)})
        assert response.status_code == status
        assert response.headers["Content-Type"] == PROBLEM
    response = post(endpoint, "verify", {"image": "?"})
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "image")


@pytest.mark.parametrize("path", ["invert", "upscale", "verify"])
@pytest.mark.parametrize("more", [1, 300, 40_000])
def test_an_upload_that_is_too_long_is_told_so(endpoint, path, more):
    response = post(endpoint, path, {"image": as_base64(bytes(MAX_UPLOAD_BYTES + more))})
    assert response.status_code == 413
    assert response.headers["Content-Type"] == PROBLEM
    response = post(endpoint, path, {"image": as_base64(bytes(MAX_UPLOAD_BYTES))})
    assert response.status_code == 415
    [found] = response.json()["errors"]
    assert "PNG, JPEG, WebP or GIF" in found["limit"]
    document = requests.get(f"{endpoint}/openapi.json", timeout=60).json()
    name = f"{path.title()}Request"
    told = document["components"]["schemas"][name]["properties"]["image"]["description"]
    assert "(PNG, JPEG, WebP, GIF)" in told


def test_the_client(endpoint, grey):
    client = biggan.Client(endpoint)
    assert client.healthy()
    assert client.classes() == [f"digit {i}" for i in range(10)]
    assert client.model()["id"] == "grey@v1"
    images = client.generate("digit 4", n=3, seed=20, truncation=0.8)
    assert [image.seed for image in images] == [20, 21, 22]
    assert {(image.class_name, image.truncation, image.model) for image in images} == {
        ("digit 4", 0.8, "grey@v1")
    }
    assert images[0].image.size == (16, 16)
    arrays = client.arrays(4, n=3, seed=20, truncation=0.8)
    assert grey_levels(arrays, grey.sample([4] * 3, seed=20, truncation=0.8)) <= 1
    moving = client.interpolate([images[0].latent, {"class": 3, "seed": 1}], frames=4)
    assert len(frames(moving)) == 8
    [edited] = client.edit(images[0].latent, {"0": 3.0}, truncation=0.8)
    recipe = Recipe(classes={4: 1.0}, seed=20, truncation=0.8, edits={0: 3.0})
    expected = synthesize(grey, [recipe], find_directions(grey))[0, ..., 0]
    assert grey_levels(np.asarray(edited.image), expected) <= 1
    with pytest.raises(EndpointError, match=r"422 Unprocessable.*class = 'cat'") as caught:
        client.generate("cat")
    assert caught.value.status == 422
    coloured = biggan.Client(endpoint, model="colour").arrays("digit 1", n=2, seed=1)
    assert coloured.shape == (2, 16, 16, 3)
