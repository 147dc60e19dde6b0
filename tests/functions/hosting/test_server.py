"""The server in a process of its own: which thread answers whom, and that nobody is forgotten for another's sake."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection

import pytest

from tests.support.paths import ROOT

SERVER = """
import sys, threading
import functions.hosting.server
functions.hosting.server.NEXT_REQUEST_SECONDS = float(sys.argv[2])
def application(environ, start_response):
    body = threading.current_thread().name.encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
server = functions.hosting.server.Server(0, int(sys.argv[1]))
print(server.port, flush=True)
sys.exit(server.run(application, lambda: None))
"""
ENOUGH = 60.0
"""Seconds; far longer than any of these tests."""


@dataclass(frozen=True)
class Serving:
    process: "subprocess.Popen[str]"
    port: int


@contextmanager
def serving(threads: int, next_request_seconds: float) -> Iterator[Serving]:
    code = [sys.executable, "-c", SERVER, str(threads), str(next_request_seconds)]
    with subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Serving(process, int(process.stdout.readline()))
        finally:
            process.kill()


@contextmanager
def connections(port: int, count: int) -> Iterator[list[HTTPConnection]]:
    with ExitStack() as stack:
        opened = [HTTPConnection("127.0.0.1", port, timeout=ENOUGH) for _ in range(count)]
        for connection in opened:
            stack.callback(connection.close)
        yield opened


def answering_thread(connection: HTTPConnection) -> str:
    connection.request("GET", "/")
    return connection.getresponse().read().decode()


def test_a_thread_that_has_answered_takes_the_next_request_of_the_connection() -> None:
    with serving(8, ENOUGH) as server, connections(server.port, 2) as (one, other):
        threads = [answering_thread(connection) for connection in (one, other, one, other, one)]
    assert threads[0] != threads[1]
    assert threads[2:] == [threads[0], threads[1], threads[0]]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_more_connections_than_threads_are_all_answered(threads: int) -> None:
    """Threads that wait for a next request leave as many free as there are of them."""
    with serving(threads, ENOUGH) as server, connections(server.port, 7) as opened:
        answered = [answering_thread(connection) for _ in range(3) for connection in opened]
    assert len(answered) == 21
    assert len(set(answered)) <= threads


def test_requests_sent_in_one_piece_are_all_answered() -> None:
    request = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
    last = b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    with serving(8, ENOUGH) as server, socket.create_connection(("127.0.0.1", server.port), timeout=ENOUGH) as sock:
        sock.sendall(request + request + last)
        seen = b""
        while piece := sock.recv(4096):
            seen += piece
    assert seen.count(b"HTTP/1.1 200 OK") == 3


def test_a_connection_whose_next_request_is_awaited_does_not_keep_the_server_from_stopping() -> None:
    with serving(8, 0.25) as server, connections(server.port, 1) as (connection,):
        answering_thread(connection)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=ENOUGH) == 0
