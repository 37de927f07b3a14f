"""Inversion and super-resolution over HTTP: what is found, progress, deadlines, clients that go."""

import base64
import io
import json
import time
from xml.etree import ElementTree

import numpy as np
import pytest
import requests
from PIL import Image

import biggan
from biggan.client import EndpointError
from biggan.inversion import downsample, psnr


def png(pixels):
    """A uint8 [H, W, C] image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def body(image, **more):
    return {"image": base64.b64encode(image).decode()} | more


def pixels(text):
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    return image if image.ndim == 3 else image[..., None]


@pytest.mark.parametrize("model", ["grey", "colour"])
def test_a_generated_image_is_found_again_and_can_be_edited(endpoint, request, model):
    G = request.getfixturevalue(model)
    wanted = G.sample(3, seed=5)[0]
    client = biggan.Client(endpoint, model=model)
    progress = []
    [found] = client.invert(png(wanted), "digit 3", progress=progress.append)
    assert found.class_name == "digit 3"
    assert psnr(np.asarray(found.image).reshape(wanted.shape), wanted) == pytest.approx(found.psnr)
    assert found.psnr > 25
    steps = [event["step"] for event in progress]
    assert steps == sorted(steps)
    assert len(steps) >= 2
    assert progress[-1]["psnr"] >= progress[0]["psnr"]
    assert pixels(progress[0]["image"]).shape == wanted.shape
    assert client.verify(found.file)["status"] == "verified"
    [same] = client.edit(found.latent)
    difference = np.abs(np.asarray(same.image).astype(int) - np.asarray(found.image)).max()
    assert difference <= 1
    moving = client.interpolate([found.latent, {"class": 4, "seed": 1}], frames=4)
    assert Image.open(io.BytesIO(moving)).n_frames == 8


def test_an_image_is_enlarged_to_ones_that_it_is_the_small_picture_of(endpoint, grey):
    small = downsample(grey.sample(6, seed=2)[0], 2)
    answer = requests.post(
        f"{endpoint}/v1/upscale", json=body(png(small), **{"class": 6, "candidates": 3}), timeout=60
    ).json()
    assert answer["finished"]
    assert len(answer["candidates"]) == 3
    matches = []
    for candidate in answer["candidates"]:
        image = pixels(candidate["image"])
        assert image.shape == (16, 16, 1)
        assert candidate["class"] == "digit 6"
        matches.append(candidate["psnr"])
        assert psnr(downsample(image, 2), small) == pytest.approx(candidate["psnr"])
    assert matches[0] > 25


def test_a_deadline_ends_a_search_with_the_best_by_then(endpoint, grey):
    image = png(grey.sample(3, seed=5)[0])
    began = time.monotonic()
    answer = requests.post(
        f"{endpoint}/v1/invert", json=body(image, deadline=0.001, candidates=8), timeout=60
    ).json()
    assert time.monotonic() - began < 10
    assert not answer["finished"]
    assert 1 <= answer["steps"] < 200
    assert len(answer["candidates"]) == 8


def seconds(action):
    began = time.monotonic()
    action()
    return time.monotonic() - began


@pytest.mark.parametrize("stream", [True, False])
def test_a_search_ends_when_its_client_goes_away(endpoint, grey, stream):
    image, url = png(grey.sample(3, seed=5)[0]), f"{endpoint}/v1/invert"
    long = body(image, candidates=8, deadline=120.0)
    whole = seconds(lambda: requests.post(url, json=long, timeout=60))
    if stream:
        with requests.post(url, json=long | {"stream": True}, stream=True, timeout=60) as answer:
            assert next(answer.iter_lines()) == b"event: progress"
    else:
        with pytest.raises(requests.Timeout):
            requests.post(url, json=long, timeout=whole / 10)
    # One search at a time: this one would not have begun.
    short = body(image, candidates=1, deadline=whole / 2)
    assert requests.post(url, json=short, timeout=60).status_code == 200


def test_a_search_that_waits_for_another_until_its_deadline_is_told_so(endpoint, grey):
    image, url = png(grey.sample(3, seed=5)[0]), f"{endpoint}/v1/invert"
    long = body(image, candidates=8, deadline=120.0, stream=True)
    with requests.post(url, json=long, stream=True, timeout=60) as answer:
        lines = answer.iter_lines()  # With which it would end.
        assert next(lines) == b"event: progress"
        began = time.monotonic()
        late = requests.post(url, json=body(image, deadline=0.05), timeout=60)
        assert time.monotonic() - began < 8  # `GRACE_SECONDS` would be 10.
    assert (late.status_code, late.headers["Retry-After"]) == (503, "1")
    assert "no searcher was free within the deadline of 0.05 s" in late.json()["detail"]


def test_an_event_tells_what_went_wrong(endpoint, grey):
    image = png(grey.sample(3, seed=5)[0])
    with pytest.raises(EndpointError, match=r"422.*no class is named 'cat'"):
        biggan.Client(endpoint).invert(image, "cat", progress=print)
    for path, more, field in (
        ("upscale", {"factor": 3}, "factor"),
        ("upscale", {"candidates": 9}, "candidates"),
        ("invert", {"deadline": 1e9}, "deadline"),
    ):
        answer = requests.post(f"{endpoint}/v1/{path}", json=body(image, **more), timeout=60)
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == field


def test_events_are_those_of_the_standard(endpoint, grey):
    image = png(grey.sample(3, seed=5)[0])
    answer = requests.post(
        f"{endpoint}/v1/invert", json=body(image, **{"class": 3, "stream": True}), timeout=60
    )
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    assert {first for first, _ in events[:-1]} == {"event: progress"}
    assert events[-1][0] == "event: result"
    for _, data in events:
        json.loads(data.removeprefix("data: "))


def source_type(file):
    """What a PNG says of where it came from, to anybody's tools."""
    xmp = ElementTree.fromstring(Image.open(io.BytesIO(file)).info["xmp"])
    space = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    return next(xmp.iter(f"{space}DigitalSourceType")).text.rsplit("/")[-1]


@pytest.mark.parametrize("path,factor", [("invert", 1), ("upscale", 2)])
@pytest.mark.parametrize("model", ["grey", "colour"])
def test_every_image_of_a_search_says_where_it_came_from(endpoint, request, path, factor, model):
    small = downsample(request.getfixturevalue(model).sample(6, seed=2)[0], factor)
    wanted = body(png(small), model=model, candidates=3, stream=True)
    answer = requests.post(f"{endpoint}/v1/{path}", json=wanted, timeout=60)
    *progress, last = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: ")
    ]
    assert len(progress) >= 2
    assert len(last["candidates"]) == 3
    for told in [*progress, *last["candidates"]]:
        file = base64.b64decode(told["image"])
        assert source_type(file) == "trainedAlgorithmicMedia"
        answer = requests.post(f"{endpoint}/v1/verify", json=body(file), timeout=60).json()
        assert (answer["status"], answer["model"]) == ("verified", f"{model}@v1"), answer
