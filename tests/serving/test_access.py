"""Who may use the endpoint, and how much of it, over its real operations; and other clients."""

import asyncio
import base64
import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import openai
import pytest
import requests
from conftest import add_imported
from local_endpoint import new_service, random_generator, served
from PIL import Image

import biggan
from biggan.client import EndpointError
from biggan.models import CARD, WEIGHTS
from biggan.pixels import sheet
from biggan.storage import storage_root
from serving.batching import Busy
from serving.encoding import encode_motion
from serving.ingress import TURNED_AWAY
from serving.keys import Keys, KeyStore, Limits
from serving.ledger import SILENT_SECONDS, Batch, Ledger
from serving.sampler import _make
from serving.schemas import GenerateRequest
from serving.service import Caller

PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def secrets(storage):
    store = KeyStore()
    limits = {
        "alice": Limits(),
        "grey-only": Limits(models=("grey",)),
        "few": Limits(quota=10),
        "slow": Limits(rate=60),
        "listening": Limits(quota=3),
        "leaving": Limits(quota=3),
        "verifying": Limits(quota=10),
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
    headers = {"X-API-Key": secrets["grey-only"]}

    def ask(path):
        return requests.get(closed + path, headers=headers, timeout=60)

    assert {entry["id"] for entry in ask("/v1/models").json()["data"]} == {"grey@v1"}
    assert ask("/v1/models/grey@best").json()["id"] == "grey@v1"
    for path in ("/v1/models/colour", "/v1/classes?model=colour", "/metrics"):
        assert ask(path).status_code == 403, path
    headers = {"X-API-Key": secrets["alice"]}
    assert {entry["id"] for entry in ask("/v1/models").json()["data"]} == {"grey@v1", "colour@v1"}


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
    assert ask(4, slow).status_code == 200  # 64 may be taken at once.
    waiting = ask(10, slow)
    assert waiting.status_code == 429
    assert 1 <= int(waiting.headers["Retry-After"]) <= 10
    # A search and frames count as well.
    stops = [{"class": 3, "seed": 1}, {"class": 3, "seed": 2}]
    body = {"stops": stops, "frames": 10, "format": "json"}
    answer = requests.post(f"{closed}/v1/interpolate", json=body, headers=slow, timeout=60)
    assert answer.status_code == 429


@pytest.mark.parametrize("stream", [True, False])
def test_a_search_counts_once_it_has_begun(closed, secrets, grey, stream):
    key = {"X-API-Key": secrets["leaving" if stream else "listening"]}
    file = io.BytesIO()
    Image.fromarray(grey.sample(3, seed=5)[0, ..., 0]).save(file, "PNG")
    body = {"image": base64.b64encode(file.getvalue()).decode(), "class": 3}
    body |= {"candidates": 2, "stream": stream}

    def ask(path, body):
        answer = requests.post(
            f"{closed}/v1/{path}", json=body, headers=key, timeout=60, stream=stream
        )
        if stream and path == "invert":  # Its client leaves, having seen an image.
            assert next(answer.iter_lines()) == b"event: progress"
            answer.close()
        return answer.status_code

    assert ask("generate", {"class": 3, "n": 1}) == 200
    assert ask("invert", body) == 200
    time.sleep(1)
    assert ask("generate", {"class": 3, "n": 1}) == 429


def test_a_model_that_a_key_is_not_for_is_not_even_loaded(closed, colour, secrets):
    service = new_service(["grey", "colour"])
    with served(service, Keys()) as url:
        headers = {"X-API-Key": secrets["grey-only"]}
        stops = [{"class": 3, "seed": 1}, {"class": 3, "seed": 2}]
        image = {"z": [0.0] * 24, "y": [0.0] * 128}
        asked = [
            ("get", "classes?model=colour", None),
            ("get", "directions?model=colour", None),
            ("post", "interpolate", {"model": "colour", "stops": stops}),
            ("post", "edit", {"model": "colour", "image": image, "morph": {"class": 3}}),
        ]
        for method, path, body in asked:
            answer = requests.request(
                method, f"{url}/v1/{path}", json=body, headers=headers, timeout=60
            )
            assert (answer.status_code, path) == (403, path)
        assert not service.painter._models


def test_a_model_is_judged_by_what_failed_too(grey, colour):
    service = new_service(["grey", "colour"])

    def broken(model, recipes, threads):
        raise RuntimeError("broken")

    with served(service) as url:
        for wanted in (200, 500, 500, 422):
            service.painter._batcher.run = broken if wanted == 500 else _make
            body = {"class": 3 if wanted != 422 else 99, "seed": 1}
            answer = requests.post(f"{url}/v1/generate", json=body, timeout=60)
            assert answer.status_code == wanted
        time.sleep(2)  # Events are sent once a second.
        models = requests.get(f"{url}/v1/models", timeout=60).json()["data"]
        [observed] = [m["observed"] for m in models if m["id"] == "grey@v1"]
        assert (observed["requests"], round(observed["error_rate"], 3)) == (3, 0.667)
        text = requests.get(f"{url}/metrics", timeout=60).text
    made = 'biggan_requests_total{key="",model="grey@v1",operation="/v1/generate",status='
    for line in ('"200"} 1.0', '"500"} 2.0', '"422"} 1.0'):
        assert made + line in text


def test_a_sampler_that_is_no_more_has_no_backlog(storage, monkeypatch):
    async def run():
        ledger = Ledger(str(storage))
        await ledger.record(
            [Batch("gone", "a@v1", 4, 7), Batch("here", "a@v1", 4, 3), Batch("here", "b@v1", 9, 2)]
        )
        told = (await ledger.metrics()).decode()
        assert 'biggan_backlog_images{model="a@v1",replica="gone"} 7.0' in told
        ledger._heard["a@v1", "gone"] -= SILENT_SECONDS + 1
        ledger._heard["b@v1", "here"] -= SILENT_SECONDS + 1  # It has made room for another model.
        told = (await ledger.metrics()).decode()
        assert [line for line in told.splitlines() if line.startswith("biggan_backlog_images")] == [
            'biggan_backlog_images{model="a@v1",replica="here"} 3.0'
        ]
        assert 'biggan_batch_images_sum{model="a@v1"} 8.0' in told
        assert 'biggan_batch_images_sum{model="b@v1"} 9.0' in told

    asyncio.run(run())


def test_metrics_tell_keys_and_models_apart(closed, secrets):
    client = biggan.Client(closed, key=secrets["alice"])
    client.generate(3, n=5)
    assert requests.post(f"{closed}/v1/generate", json={"class": 3}, timeout=60).status_code == 401
    headers = {"Authorization": f"Bearer {secrets['alice']}"}
    wanted = [
        'biggan_requests_total{key="",model="",operation="/v1/generate",status="401"}',
        'biggan_requests_total{key="alice",model="grey@v1",operation="/v1/generate"',
        'biggan_request_seconds_count{key="alice",model="grey@v1",operation="/v1/generate"}',
        'biggan_batch_images_count{model="grey@v1"}',
        'biggan_backlog_images{model="grey@v1",replica="',
    ]
    missing, deadline = wanted, time.monotonic() + 20
    while missing and time.monotonic() < deadline:
        time.sleep(0.2)  # Events are sent once a second.
        text = requests.get(f"{closed}/metrics", headers=headers, timeout=60).text
        missing = [series for series in wanted if series not in text]
    assert not missing
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
        for others in ("4", "3", "0", "-7", "x", "1e3", "99999999", "٣".encode().decode("latin-1")):
            headers = {TURNED_AWAY: others}
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


@pytest.mark.parametrize(
    "host,status",
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
def test_an_open_endpoint_answers_to_its_own_names_alone(grey, host, status):
    headers = {"Host": host}
    with served(new_service(["grey"])) as url:
        for path in ("/v1/classes", "/metrics", "/", "/docs", "/openapi.json"):
            answer = requests.get(url + path, headers=headers, timeout=60)
            assert answer.status_code == status, path
            assert status == 200 or "open as localhost alone" in answer.json()["detail"]
        for path in ("/healthz", "/readyz"):  # For balancers, which may have names of their own.
            assert requests.get(url + path, headers=headers, timeout=60).status_code == 200


def test_uploads_have_a_bound_of_number_and_of_time(grey, monkeypatch):
    monkeypatch.setattr("serving.problems.MAX_UPLOADS", 2)
    monkeypatch.setattr("serving.problems.BODY_SECONDS", 1.0)
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, "PNG")
    body = {"image": base64.b64encode(file.getvalue()).decode()}

    def begun(path):
        connection = slow.enter_context(socket.create_connection(place))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{{"
        connection.sendall(head.encode())
        return connection

    with served(new_service(["grey"])) as url, ExitStack() as slow:
        place = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        slots = [begun("/v1/verify"), begun("/v1/verify"), begun("/v1/generate")]
        time.sleep(0.3)
        refused = requests.post(f"{url}/v1/verify", json=body, timeout=60)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert requests.post(f"{url}/v1/generate", json={"class": 3}, timeout=60).ok
        for connection in slots:
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        for _ in range(4):
            assert requests.post(f"{url}/v1/verify", json=body, timeout=60).ok


def test_who_leaves_is_not_given_back_what_is_made_all_the_same(storage, grey):
    """Serve cancels the request of a client that leaves."""
    KeyStore().make("impatient", Limits(quota=10))
    [key] = [key for key in KeyStore().all() if key.name == "impatient"]
    service = new_service(["grey"])
    meter = service.counts.meter
    request = GenerateRequest.model_validate({"class": 3, "n": 8})

    async def leave():
        making = asyncio.Event()

        async def make(*_asked):
            making.set()
            await asyncio.sleep(60)

        service.painter.synthesize = make
        left = asyncio.create_task(service.generate(Caller(key), request))
        await making.wait()
        left.cancel()
        await asyncio.wait([left])
        assert meter.take(key, 3).retry_after  # 2 are left.

        async def fail(*_asked):
            raise ConnectionError

        service.painter.synthesize = fail
        with pytest.raises(ConnectionError):
            await service.generate(Caller(key), request.model_copy(update={"n": 2}))
        assert meter.take(key, 2).left == 0

    asyncio.run(leave())


def test_a_sampler_that_does_not_come_is_not_waited_for_for_ever(grey, monkeypatch):
    monkeypatch.setattr("serving.service.START_SECONDS", 0.2)
    service = new_service(["grey"])
    service.painter.synthesize = lambda *_asked: asyncio.sleep(60)
    with served(service) as url:
        answer = requests.post(f"{url}/v1/generate", json={"class": 3}, timeout=60)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


def test_what_waits_to_be_encoded_is_bounded(grey, monkeypatch):
    monkeypatch.setattr("serving.service.MAX_PENDING_PIXELS", 100 * 32**2)
    service = new_service(["grey"])
    encoding, done = threading.Event(), threading.Event()

    def slow(*given, **form):
        encoding.set()
        assert done.wait(30)
        return encode_motion(*given, **form)

    monkeypatch.setattr("serving.service.encode_motion", slow)
    body = {"stops": [{"class": 3, "seed": 0}, {"class": 4, "seed": 1}], "frames": 32, "scale": 2}
    with served(service) as url, ThreadPoolExecutor(1) as pool:

        def ask():
            return requests.post(f"{url}/v1/interpolate", json=body, timeout=60).status_code

        first = pool.submit(ask)
        assert encoding.wait(30)
        assert ask() == 503  # 64 frames twice.
        assert requests.post(f"{url}/v1/generate", json={"class": 3}, timeout=60).ok
        done.set()
        assert first.result() == 200
        assert ask() == 200


def test_a_verification_counts_for_the_key(closed, secrets):
    headers = {"X-API-Key": secrets["verifying"]}

    def verify(content):
        body = {"image": base64.b64encode(content).decode()}
        return requests.post(f"{closed}/v1/verify", json=body, headers=headers, timeout=60)

    body = {"class": 3, "n": 4}
    sheet = requests.post(f"{closed}/v1/generate", json=body, headers=headers, timeout=60).content
    assert verify(sheet).json()["status"] == "verified"  # Its 4 images, and 1 to read it.
    plain = io.BytesIO()
    Image.new("L", (16, 16)).save(plain, "PNG")
    assert verify(plain.getvalue()).json()["status"] == "no origin"
    assert verify(plain.getvalue()).status_code == 429


def test_a_model_that_left_the_store_is_told_as_such(storage):
    name = "leaver"
    folder = add_imported(name, random_generator(2))
    service = new_service([name])
    with served(service) as url:
        assert requests.get(f"{url}/v1/models/{name}@v1", timeout=60).status_code == 200
        for child in (CARD, WEIGHTS):
            folder.delete_file(child)
        for answer in (
            requests.get(f"{url}/v1/models/{name}@v1", timeout=60),
            requests.post(f"{url}/v1/generate", json={"class": 3}, timeout=60),
        ):
            assert answer.status_code == 404
            assert answer.headers["Content-Type"] == PROBLEM
            assert storage_root() not in answer.text


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
