"""The server in a process of its own: threads, kept connections, framing and stopping."""

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from unittest.mock import Mock

import pytest

from functions.hosting.answering import Turns, threads_for
from tests.support.functions.server import ENOUGH, Serving, reply, serving


@contextmanager
def connections(port: int, count: int) -> Iterator[list[HTTPConnection]]:
    with ExitStack() as stack:
        opened = [HTTPConnection("127.0.0.1", port, timeout=ENOUGH) for _ in range(count)]
        for connection in opened:
            stack.callback(connection.close)
        yield opened


def _takes_connections(server: Serving) -> bool:
    try:
        server.connect().close()
    except ConnectionError:
        return False
    return True


def answering_thread(connection: HTTPConnection) -> str:
    connection.request("GET", "/")
    return connection.getresponse().read().decode()


def test_a_thread_that_has_answered_takes_the_next_request_of_the_connection() -> None:
    with serving(8, ENOUGH) as server, connections(server.port, 2) as (one, other):
        threads = [answering_thread(connection) for connection in (one, other, one, other, one)]
    assert threads[0] != threads[1]
    assert threads[2:] == [threads[0], threads[1], threads[0]]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_more_connections_than_threads_are_all_answered(threads: int) -> None:
    """At most half of the threads wait for a next request."""
    with serving(threads, ENOUGH) as server, connections(server.port, 7) as opened:
        answered = [answering_thread(connection) for _ in range(3) for connection in opened]
    assert len(answered) == 21
    assert len(set(answered)) <= threads_for(threads)


def test_a_request_counts_before_its_thread_begins() -> None:
    """Otherwise a server's only thread may take all of them for free, and wait while others want it."""

    class Connection:
        reader = Mock(client_id="a client")

    free: list[bool] = []
    turns = Turns(1, 1, lambda _: free.append(turns.mostly_free))
    connection = Connection()
    turns.push(connection)
    turns.finished(connection)
    assert (free, turns.mostly_free) == ([False], True)


def test_requests_sent_in_one_piece_are_all_answered() -> None:
    request = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
    last = b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    with serving(8, ENOUGH) as server, socket.create_connection(("127.0.0.1", server.port), timeout=ENOUGH) as sock:
        sock.sendall(request + request + last)
        seen = reply(sock)
    assert seen.count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.slow
def test_a_kept_connection_does_not_keep_the_server_from_stopping() -> None:
    with serving(8, 0.25) as server, connections(server.port, 1) as (connection,):
        answering_thread(connection)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=ENOUGH) == 0


def test_a_body_is_read_in_every_framing() -> None:
    """With its length, in chunks, and after `100 Continue`; twice each on one connection."""
    plain = b"POST /echo HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\n\r\nhello"
    chunks = b"POST /echo HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
    waits = b"POST /echo HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    with serving(4) as server, server.connect() as sock:
        for request in (plain, chunks, plain, chunks):
            sock.sendall(request)
            assert sock.recv(4096).endswith(b"\r\n\r\nhello")
        sock.sendall(waits)
        assert sock.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hello")
        assert sock.recv(4096).endswith(b"\r\n\r\nhello")


def test_an_offer_of_another_protocol_is_declined_by_answering() -> None:
    offer = b"GET / HTTP/1.1\r\nHost: here\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n\r\n"
    with serving(4) as server, server.connect() as sock:
        sock.sendall(offer)
        assert reply(sock).startswith(b"HTTP/1.1 200 OK")


def test_a_request_on_its_way_when_the_server_stops_is_answered() -> None:
    with serving(4, linger_seconds=ENOUGH) as server, server.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 OK")
        sock.sendall(b"GET / HTTP/1.1\r\n")
        server.process.send_signal(signal.SIGTERM)
        while _takes_connections(server):
            pass
        sock.sendall(b"Host: here\r\n\r\n")
        assert b"Connection: close" in reply(sock)
        assert server.process.wait(timeout=ENOUGH) == 0


def test_a_server_listens_at_its_address_only() -> None:
    """127.0.0.2 is this machine too; a server at all addresses would answer there."""
    with serving(2) as server:
        for port in (server.port, server.management_port):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=ENOUGH)
