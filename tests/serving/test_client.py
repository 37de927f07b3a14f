"""The client against a server that breaks off in every way that a dying one does."""

import socket
import threading

import pytest
import requests

import biggan
from biggan.client import EndpointError

WHOLE = b'HTTP/1.1 200 OK\r\nContent-Length: 28\r\n\r\n{"classes":[{"name":"cat"}]}'
BROKEN = WHOLE[:-5]
DEAD = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"


def answering(*answers):
    """The address of a server that gives each connection the next of `answers`, and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listener:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    asked = b""
                    while b"\r\n\r\n" not in asked and (more := connection.recv(65536)):
                        asked += more
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)  # Until the client has closed, for it not to be reset.

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_request_is_repeated_until_its_answer_is_whole():
    assert biggan.Client(answering(b"", BROKEN, DEAD, BUSY, WHOLE)).classes() == ["cat"]


def test_a_request_is_not_repeated_for_ever():
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        biggan.Client(answering(BROKEN, BROKEN, WHOLE), retries=1).classes()
    with pytest.raises(EndpointError, match="500"):
        biggan.Client(answering(DEAD, DEAD, WHOLE), retries=1).classes()
