"""The client against a server that breaks off in every way that a dying one does."""

import socket
import threading
import time
from contextlib import suppress

import pytest
import requests

import biggan
from biggan.client import EndpointError

WHOLE = b'HTTP/1.1 200 OK\r\nContent-Length: 28\r\n\r\n{"classes":[{"name":"cat"}]}'
BROKEN = WHOLE[:-5]
DEAD = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
FOUND = b'HTTP/1.1 200 OK\r\nContent-Length: 32\r\n\r\n{"model":"a@v1","candidates":[]}'
TOLD = b"HTTP/1.1 200 OK\r\n\r\nevent: result\n" + b"data: " + FOUND[-32:] + b"\n\n"
BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"


def answering(*answers, after=0.0):
    """The address of a server that gives each connection the next of `answers`, and closes it.

    It takes `after` seconds over each.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listener:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    asked = b""
                    while b"\r\n\r\n" not in asked and (more := connection.recv(65536)):
                        asked += more
                    time.sleep(after)
                    with suppress(OSError):  # A client that no longer waits has closed.
                        connection.sendall(answer)
                        connection.shutdown(socket.SHUT_WR)
                        connection.recv(65536)  # Until it has, for it not to be reset.

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_request_is_repeated_until_its_answer_is_whole():
    assert biggan.Client(answering(b"", BROKEN, DEAD, BUSY, WHOLE)).classes() == ["cat"]


def test_a_request_is_not_repeated_for_ever():
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        biggan.Client(answering(BROKEN, BROKEN, WHOLE), retries=1).classes()
    with pytest.raises(EndpointError, match="500"):
        biggan.Client(answering(DEAD, DEAD, WHOLE), retries=1).classes()


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
def test_a_search_that_was_turned_away_or_lost_is_repeated(search):
    client = biggan.Client(answering(b"", DEAD, BUSY, BROKEN, FOUND))
    assert getattr(client, search)(b"") == []


def test_health_is_asked_for_once():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    began = time.monotonic()
    assert not biggan.Client(f"http://127.0.0.1:{port}").healthy()
    assert not biggan.Client(answering(BUSY, WHOLE)).healthy()
    assert time.monotonic() - began < 1
    assert biggan.Client(answering(WHOLE)).healthy()
