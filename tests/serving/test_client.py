"""The client against a server that breaks off in every way that a dying one does."""

import base64
import io
import json
import os
import pickle
import socket
import ssl
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import requests
from conftest import add_imported
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from local_endpoint import new_service, random_generator, served
from PIL import Image

import biggan
from biggan.client import LONGEST_WAIT, EndpointError, GeneratedImage
from biggan.models import ModelStore


def answer(status, content, *headers):
    """An answer as bytes. The client does not ask again over a connection that is to be closed."""
    length = f"Content-Length: {len(content)}"
    lines = [f"HTTP/1.1 {status} Said", "Connection: close", length, *headers, "", content]
    return "\r\n".join(lines).encode()


def stream(*events):
    """Server-sent events, each an HTTP chunk as from an endpoint; nothing says that they end."""
    sent = [f"event: {name}\ndata: {json.dumps(content)}\n\n" for name, content in events]
    chunks = "".join(f"{len(event):x}\r\n{event}\r\n" for event in sent)
    head = "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    return (head + chunks).encode()


END = b"0\r\n\r\n"
WHOLE = answer(200, '{"classes":[{"name":"cat"}]}')
BROKEN = WHOLE[:-5]
DEAD = answer(500, "")
NOTHING = {"model": "a@v1", "candidates": []}
FOUND = answer(200, json.dumps(NOTHING))
STEP = ("progress", {"step": 1})
TOLD = stream(STEP, ("result", NOTHING))
BUSY = answer(503, "", "Retry-After: 0")
FAILED = [
    stream(STEP),  # It breaks off,
    stream(STEP) + END,  # or ends with no result,
    *(stream(STEP, ("problem", {"status": status})) + END for status in (500, 502, 503, 504)),
]


def answering(*answers, after=0.0, asked=None):
    """The address of a server that gives each connection the next of `answers`, and closes it.

    It takes `after` seconds over each, and notes in `asked` the requests' heads and bodies.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listener:
            for content in answers:
                connection, _ = listener.accept()
                with connection, suppress(OSError):  # A client that no longer waits has closed.
                    request = whole(connection)
                    if asked is not None:
                        asked.append(request)
                    time.sleep(after)
                    connection.sendall(content)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # Until it has, for it not to be reset.
                        pass

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def whole(connection):
    """Head and body of a request."""
    with connection.makefile("rb") as file:
        head = b"".join(iter(file.readline, b"\r\n")).decode()
        length = [line.split()[1] for line in head.splitlines() if "Content-Length" in line]
        return head, file.read(int(length[0])) if length else b""


def test_a_request_is_repeated_until_its_answer_is_whole():
    assert biggan.Client(answering(b"", BROKEN, DEAD, BUSY, WHOLE)).classes() == ["cat"]


def test_a_request_is_not_repeated_for_ever():
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        biggan.Client(answering(BROKEN, BROKEN, WHOLE), retries=1).classes()
    with pytest.raises(EndpointError, match="500"):
        biggan.Client(answering(DEAD, DEAD, WHOLE), retries=1).classes()


@pytest.mark.parametrize("status", [429, 503])
def test_what_is_to_be_asked_for_much_later_is_not_repeated(status):
    over = answer(status, '{"title": "Over", "detail": "quota"}', "Retry-After: 40000")
    with pytest.raises(EndpointError, match=f"{status} Over: quota") as caught:
        biggan.Client(answering(over, WHOLE)).classes()
    assert caught.value.retry_after == 40000
    soon = answer(status, "", f"Retry-After: {LONGEST_WAIT:g}")
    assert biggan.Client(answering(soon, WHOLE)).classes() == ["cat"]


@pytest.mark.parametrize("said", ["soon", "Fri, 31 Dec 2100 23:59:59 GMT", "-1", ""])
def test_a_retry_after_that_is_no_number_is_none(said):
    odd = answer(503, "", f"Retry-After: {said}")
    assert biggan.Client(answering(odd, WHOLE)).classes() == ["cat"]


@pytest.mark.parametrize("content", ["<html>", '"text"', "[1]", "null", "3"])
def test_an_error_that_is_none_of_the_endpoints_is_told_as_it_is(content):
    with pytest.raises(EndpointError, match="404 Said: ") as caught:
        biggan.Client(answering(answer(404, content))).classes()
    assert caught.value.problem["detail"] == content


SEARCHES = pytest.mark.parametrize("search", ["invert", "upscale"])
PROGRESS = pytest.mark.parametrize("progress", [None, print], ids=["whole", "told"])


@SEARCHES
@PROGRESS
def test_a_search_is_waited_for_until_its_deadline_and_a_while(search, progress):
    client = biggan.Client(answering(TOLD if progress else FOUND, after=0.8), timeout=0.4)
    assert getattr(client, search)(b"", deadline=2, progress=progress) == []


@SEARCHES
@PROGRESS
def test_a_search_is_not_repeated_when_its_time_is_up(search, progress):
    answers = [TOLD if progress else FOUND] * 3
    client = biggan.Client(answering(*answers, after=0.8), timeout=0.2)
    with pytest.raises(requests.ReadTimeout):
        getattr(client, search)(b"", deadline=0.1, progress=progress)


@SEARCHES
@PROGRESS
def test_a_search_that_spent_its_deadline_is_not_repeated(search, progress):
    late = [answer(503, "", "Retry-After: 1"), TOLD if progress else FOUND]
    client = biggan.Client(answering(*late, after=0.3))
    with pytest.raises(EndpointError, match="503"):
        getattr(client, search)(b"", deadline=0.3, progress=progress)


@pytest.mark.parametrize("failed", FAILED)
def test_a_streamed_search_that_failed_late_is_not_repeated(failed):
    client = biggan.Client(answering(failed, TOLD, after=0.3))
    with pytest.raises((EndpointError, requests.exceptions.ChunkedEncodingError)):
        client.invert(b"", deadline=0.3, progress=print)


@SEARCHES
def test_a_search_that_was_turned_away_or_lost_is_repeated(search):
    client = biggan.Client(answering(b"", DEAD, BUSY, BROKEN, FOUND))
    assert getattr(client, search)(b"") == []


@pytest.mark.parametrize("failed", FAILED)
def test_a_streamed_search_that_failed_begins_again(failed):
    steps = []
    assert biggan.Client(answering(failed, TOLD)).invert(b"", progress=steps.append) == []
    assert steps == [{"step": 1}] * 2
    with pytest.raises((EndpointError, requests.exceptions.ChunkedEncodingError)):
        biggan.Client(answering(failed, TOLD), retries=0).invert(b"", progress=print)


def test_a_streamed_search_that_is_refused_is_not_repeated():
    refused = stream(STEP, ("problem", {"status": 422, "title": "Wrong", "detail": "image"}))
    with pytest.raises(EndpointError, match="422 Wrong: image"):
        biggan.Client(answering(refused, TOLD)).invert(b"", progress=print)


@pytest.mark.parametrize("error", [requests.ConnectionError(), EndpointError(503, {})])
def test_an_error_of_whoever_listens_is_his_own(error):
    def fail(_event):
        raise error

    with pytest.raises(type(error)) as caught:
        biggan.Client(answering(TOLD, TOLD)).invert(b"", progress=fail)
    assert caught.value is error


def test_an_event_of_megabytes_is_read_in_time():
    heavy = stream(("progress", {"image": "x" * 2**23}), ("result", NOTHING))
    steps = []
    began = time.monotonic()
    assert biggan.Client(answering(heavy)).invert(b"", progress=steps.append) == []
    assert time.monotonic() - began < 20  # Where every chunk copied the line it would be minutes.
    assert len(steps[0]["image"]) == 2**23


def made(model="a@v1", truncation=0.5, seed=1):
    latent = {"class": {"cat": 1.0}, "seed": seed}
    return GeneratedImage(Image.new("L", (1, 1)), latent, model, truncation)


def sent(act, **options):
    """What the client sends as JSON when it does `act`."""
    asked = []
    none = answer(200, '{"model": "a@v1", "truncation": null, "images": []}')
    act(biggan.Client(answering(none, asked=asked), **options))
    [(_, body)] = asked
    return json.loads(body)


def test_an_image_is_edited_by_the_version_that_made_it():
    for act, model, truncation in (
        (lambda client: client.edit(made()), "a@v1", 0.5),
        (lambda client: client.edit(made(), truncation=0.7, model="a@v2"), "a@v2", 0.7),
        (lambda client: client.edit(made().latent), "mine", None),
        (lambda client: client.edit(made().latent, truncation=0.7, model="a@v2"), "a@v2", 0.7),
    ):
        body = sent(act, model="mine")
        assert (body["model"], body["truncation"]) == (model, truncation)
        assert body["image"] == made().latent


def test_the_way_between_images_is_that_of_the_version_that_made_them():
    dog = {"class": "dog", "seed": 3}
    for stops, told, model, truncation in (
        ([made(), made(seed=2)], {}, "a@v1", 0.5),
        ([dog, made(seed=2)], {}, "a@v1", 0.5),
        ([made(), made("a@v2", 0.7)], {"model": "a@v3", "truncation": 1.0}, "a@v3", 1.0),
        ([dog, made().latent], {}, None, None),
    ):
        body = sent(lambda client, stops=stops, told=told: client.interpolate(stops, **told))
        assert (body["model"], body["truncation"]) == (model, truncation)
        assert body["stops"] == [getattr(stop, "latent", stop) for stop in stops]


def test_images_that_differ_in_what_a_request_has_one_of_are_refused():
    client = biggan.Client("http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"model: .*\(a@v1, a@v2\); say which, as model="):
        client.interpolate([made(), made("a@v2")])
    with pytest.raises(ValueError, match=r"truncation: .*\(0.5, None\)"):
        client.interpolate([made(), made(truncation=None)])


def test_an_image_is_the_same_after_a_promotion(storage):
    old, new = random_generator(2), random_generator(3)
    for G in (old, new):
        add_imported("replaced", G)
    store = ModelStore("replaced")
    store.set_alias("best", "v1")
    with served(new_service(["replaced"])) as url:
        client = biggan.Client(url)
        images = client.generate(3, n=2, seed=5, truncation=0.5)
        store.set_alias("best", "v2")
        while client.generate(3)[0].model == "replaced@v1":
            time.sleep(0.1)
        [same] = client.edit(images[1])
        moving = Image.open(io.BytesIO(client.interpolate(images, frames=2)))
    assert (same.model, same.truncation, same.seed) == ("replaced@v1", 0.5, 6)
    expected = old.sample([3, 3], seed=5, truncation=0.5)[..., 0].astype(int)
    assert np.abs(np.asarray(same.image) - expected[1]).max() <= 1
    assert np.abs(np.asarray(moving.convert("L")) - expected[0]).max() <= 1


def test_a_key_is_sent_whatever_netrc_says(tmp_path, monkeypatch):
    file = tmp_path / "netrc"
    file.write_text("default login somebody password else")
    monkeypatch.setenv("NETRC", os.fspath(file))
    asked = []
    biggan.Client(answering(WHOLE, asked=asked), key="bg_1").classes()
    assert "Authorization: Bearer bg_1\r\n" in asked[0][0]


def test_a_client_and_what_it_gives_can_be_sent_to_other_processes():
    asked = []
    client = biggan.Client(answering(WHOLE, asked=asked), key="bg_1", model="a")
    assert pickle.loads(pickle.dumps(client)).classes() == ["cat"]
    assert "/v1/classes?model=a" in asked[0][0]
    assert "Authorization: Bearer bg_1\r\n" in asked[0][0]
    error = pickle.loads(pickle.dumps(EndpointError(429, {"title": "Over"}, 7.0)))
    assert (error.status, error.problem, error.retry_after) == (429, {"title": "Over"}, 7.0)
    assert str(error) == "429 Over: "
    file = io.BytesIO()
    Image.new("L", (2, 2), 7).save(file, "PNG")
    item = {"image": base64.b64encode(file.getvalue()).decode(), "latent": {"class": None}}
    images = {"model": "a@v1", "truncation": None, "images": [item]}
    [image] = biggan.Client(answering(answer(200, json.dumps(images)))).generate(3)
    assert pickle.loads(pickle.dumps(image)) == image


def test_a_certificate_of_somebody_else_is_told_at_once(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "somebody")])
    now = datetime.now(UTC)
    days = (now - timedelta(days=1), now + timedelta(days=1))
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, *days)
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "both.pem").write_bytes(
        certificate.sign(key, hashes.SHA256()).public_bytes(pem)
        + key.private_bytes(pem, private, serialization.NoEncryption())
    )
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client, began = biggan.Client(f"https://127.0.0.1:{server.server_port}"), time.monotonic()
    with pytest.raises(requests.exceptions.SSLError, match="self-signed certificate"):
        client.classes()
    assert time.monotonic() - began < 2
    server.shutdown()


def test_threads_share_a_client():
    client, classes = biggan.Client(answering(*[WHOLE] * 24)), []
    threads = [threading.Thread(target=lambda: classes.append(client.classes())) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert classes == [["cat"]] * 24


def test_health_is_asked_for_once():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    began = time.monotonic()
    assert not biggan.Client(f"http://127.0.0.1:{port}").healthy()
    assert not biggan.Client(answering(BUSY, WHOLE)).healthy()
    assert time.monotonic() - began < 10
    assert biggan.Client(answering(WHOLE)).healthy()
