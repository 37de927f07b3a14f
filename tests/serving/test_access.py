"""Who may use the endpoint, and how much of it, over its real operations; and other clients."""

import base64
import io
import socket
import time

import numpy as np
import openai
import pytest
import requests
from local_endpoint import new_service, served
from PIL import Image

import biggan
from biggan.client import EndpointError
from biggan.pixels import sheet
from serving.batching import Busy
from serving.ingress import TURNED_AWAY
from serving.keys import Keys, KeyStore, Limits

PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def secrets(storage):
    store = KeyStore()
    limits = {
        "alice": Limits(),
        "grey-only": Limits(models=("grey",)),
        "few": Limits(quota=10),
        "slow": Limits(rate=60),
    }
    return {name: store.make(name, given) for name, given in limits.items()}


@pytest.fixture(scope="module")
def closed(grey, colour, secrets):
    """The address of an endpoint that wants keys."""
    with served(new_service(["grey", "colour"]), Keys()) as url:
        yield url


def test_without_a_key_there_is_nothing_but_the_page_and_health(closed):
    document = requests.get(f"{closed}/openapi.json", timeout=60).json()
    assert document["components"]["securitySchemes"] == {
        "HTTPBearer": {"type": "http", "scheme": "bearer"},
        "APIKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    assert document["paths"]["/v1/generate"]["post"]["security"] == [
        {"HTTPBearer": []},
        {"APIKeyHeader": []},
    ]
    for path, operations in document["paths"].items():
        for method in operations:
            answer = requests.request(method, closed + path, timeout=60)
            if path in ("/healthz", "/readyz"):
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, path
            assert answer.headers["Content-Type"] == PROBLEM
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert requests.get(closed, timeout=60).status_code == 200
    for wrong in ("bg_0", "x" * 1000):
        with pytest.raises(EndpointError, match="401"):
            biggan.Client(closed, key=wrong).classes()


def test_a_key_opens_the_models_that_it_is_for(closed, secrets, monkeypatch):
    assert len(biggan.Client(closed, key=secrets["alice"], model="colour").generate(3)) == 1
    monkeypatch.setenv("BIGGAN_API_KEY", secrets["grey-only"])
    assert len(biggan.Client(closed).generate(3)) == 1
    with pytest.raises(EndpointError, match=r"403.*may not use model colour"):
        biggan.Client(closed, model="colour").generate(3)


def test_whom_a_full_endpoint_turns_away_has_nothing_counted(storage, grey):
    secret = KeyStore().make("early", Limits(quota=10))
    service = new_service(["grey"])
    asked = []
    service.counts.take = lambda *wanted: asked.append(wanted)
    service.painter.full = lambda _version, images, _others: Busy(1.5) if images == 3 else None
    with served(service, Keys()) as url:
        body, headers = {"class": 3, "n": 3}, {"X-API-Key": secret}
        answer = requests.post(f"{url}/v1/generate", json=body, headers=headers, timeout=60)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "2"
    assert not asked


def test_a_quota_and_a_rate(closed, secrets):
    headers = {"X-API-Key": secrets["few"]}

    def ask(n, headers=headers):
        body = {"class": 3, "n": n}
        return requests.post(f"{closed}/v1/generate", json=body, headers=headers, timeout=60)

    assert ask(4).status_code == 200
    assert ask(65).status_code == 422  # What is refused is not counted,
    assert ask(6).status_code == 200
    over = ask(1)
    assert (over.status_code, over.headers["Content-Type"]) == (429, PROBLEM)
    assert 0 < int(over.headers["Retry-After"]) <= 24 * 3600
    slow = {"Authorization": f"Bearer {secrets['slow']}"}
    assert ask(60, slow).status_code == 200
    assert ask(4, slow).status_code == 200  # 64 may be taken at once: a largest request.
    waiting = ask(10, slow)
    assert waiting.status_code == 429
    assert 1 <= int(waiting.headers["Retry-After"]) <= 10
    # A search and frames count as well.
    stops = [{"class": 3, "seed": 1}, {"class": 3, "seed": 2}]
    body = {"stops": stops, "frames": 10, "format": "json"}
    answer = requests.post(f"{closed}/v1/interpolate", json=body, headers=slow, timeout=60)
    assert answer.status_code == 429


def test_metrics_tell_keys_and_models_apart(closed, secrets):
    client = biggan.Client(closed, key=secrets["alice"])
    client.generate(3, n=5)
    headers = {"Authorization": f"Bearer {secrets['alice']}"}
    wanted = 'biggan_requests_total{key="alice",model="grey@v1",operation="/v1/generate"'
    text, deadline = "", time.monotonic() + 20
    while wanted not in text and time.monotonic() < deadline:
        time.sleep(0.2)  # Events are sent once a second.
        text = requests.get(f"{closed}/metrics", headers=headers, timeout=60).text
    [images] = [
        line
        for line in text.splitlines()
        if line.startswith("biggan_images_total{") and 'key="alice",model="grey@v1"' in line
    ]
    assert float(images.split()[-1]) >= 5
    assert secrets["alice"] not in text


@pytest.mark.parametrize("gated", [True, False])
def test_metrics_count_whom_the_gate_turned_away_if_there_is_one(grey, monkeypatch, gated):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", str(int(gated)))
    wanted = 'biggan_requests_total{key="",model="",operation="/v1/generate",status="503"} 7.0'
    with served(new_service(["grey"])) as url:
        for others in (4, 3, 0):
            headers = {TURNED_AWAY: str(others)}
            answer = requests.post(
                f"{url}/v1/generate", json={"class": 3}, headers=headers, timeout=60
            )
            assert answer.status_code == 200
        time.sleep(2)  # Events are sent once a second.
        assert (wanted in requests.get(f"{url}/metrics", timeout=60).text) == gated


def test_an_open_endpoint_is_open_to_this_machine_alone(grey):
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as away:
            away.connect(("192.0.2.1", 9))  # Sends nothing; finds this machine's own address.
            own = away.getsockname()[0]
    except OSError:
        pytest.skip("this machine has no address besides the loopback's")
    with served(new_service(["grey"]), host="0.0.0.0") as url:
        assert requests.get(f"{url}/v1/classes", timeout=60).status_code == 200
        outside = requests.get(f"http://{own}:{url.rsplit(':', 1)[1]}/v1/classes", timeout=60)
    assert outside.status_code == 403
    assert "its own machine" in outside.json()["detail"]


def test_the_openai_client_works_unchanged(closed, secrets, grey):
    client = openai.OpenAI(base_url=f"{closed}/v1", api_key=secrets["alice"], max_retries=0)
    made = client.images.generate(
        prompt="a nice digit 7, please", n=2, size="64x64", response_format="b64_json"
    )
    assert [image.revised_prompt for image in made.data] == ["digit 7"] * 2
    for image in made.data:
        picture = Image.open(io.BytesIO(base64.b64decode(image.b64_json)))
        assert (picture.format, picture.size) == ("PNG", (64, 64))
    own = client.images.generate(prompt="digit 3", model="colour").data[0]
    picture = Image.open(io.BytesIO(base64.b64decode(own.b64_json)))
    assert (picture.mode, picture.size) == ("RGB", (16, 16))
    url = client.images.generate(prompt="digit 3", response_format="url").data[0].url
    assert url.startswith("data:image/png;base64,")
    assert {model.id for model in client.models.list()} == {"grey@v1", "colour@v1"}
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.generate(prompt="a polar bear")
    assert "no class is named" in caught.value.response.json()["detail"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{closed}/v1", api_key="bg_0").images.generate(prompt="digit 3")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="digit 3", model="dall-e-3")


def test_other_origins_are_not_let_in(closed, secrets):
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    answer = requests.options(f"{closed}/v1/generate", headers=headers, timeout=60)
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_a_sheet_is_what_the_models_sheet_is(closed, secrets, grey):
    body = {"class": 3, "n": 4, "seed": 7}
    headers = {"X-API-Key": secrets["alice"]}
    answer = requests.post(f"{closed}/v1/generate", json=body, headers=headers, timeout=60)
    found = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
    assert np.abs(found - np.asarray(sheet(grey.sample([3] * 4, seed=7), 2, min_side=1))).max() <= 1
