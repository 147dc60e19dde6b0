"""Bodies that an application receives itself: of any length, in bounded memory, under the budget of all bodies."""

import hashlib
import itertools
import socket
from collections.abc import Iterable

import pytest

from functions.hosting.requests import STREAMED_BODY_BYTES
from knative.local.kubelet.processes import memory_bytes
from tests.support.functions.server import ENOUGH, Serving, half_sent, reply, serving

PIECE = bytes(range(256)) * 2**10
PIECES = 256
LENGTH = len(PIECE) * PIECES  # 64 MiB
LIMIT = 2**27
HEAD = b"POST /streamed HTTP/1.1\r\nHost: localhost\r\n"
WITH_LENGTH = HEAD + b"Content-Length: %d\r\n\r\n"
IN_CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(PIECE), PIECE)


def answer(server: Serving, pieces: Iterable[bytes]) -> bytes:
    with server.connect() as sock:
        for piece in pieces:
            sock.sendall(piece)
        return reply(sock)


@pytest.mark.parametrize(
    "pieces",
    [(WITH_LENGTH % LENGTH, *itertools.repeat(PIECE, PIECES)), (IN_CHUNKS, *itertools.repeat(CHUNK, PIECES), b"0\r\n\r\n")],
    ids=["length", "chunks"],
)
def test_a_long_body_is_received_whole_in_little_memory(pieces: Iterable[bytes]) -> None:
    digest = hashlib.sha256(PIECE * PIECES).hexdigest().encode()
    with serving(4, body_bytes=LIMIT, request_bytes=STREAMED_BODY_BYTES) as server:
        answer(server, [WITH_LENGTH % 1, b"x"])
        before = memory_bytes(server.process.pid)
        for _ in range(2):  # its share of the budget is given back
            answered = answer(server, pieces)
            assert answered.startswith(b"HTTP/1.1 200 ")
            assert answered.endswith(digest)
        assert memory_bytes(server.process.pid) < before + LENGTH / 4


def test_a_client_that_waits_for_it_is_told_to_go_on() -> None:
    with serving(4) as server, server.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 1\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(2**16).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"x")
        assert reply(sock).endswith(hashlib.sha256(b"x").hexdigest().encode())


@pytest.mark.parametrize(
    ("pieces", "seconds", "status", "said"),
    [
        ((WITH_LENGTH % (2**20 + 1),), ENOUGH, 503, b"EventTooLarge"),
        ((IN_CHUNKS, *itertools.repeat(CHUNK, 5)), ENOUGH, 413, b"more than 1048576 bytes"),
        ((IN_CHUNKS, b"1\r\nx\r\nno number\r\n"), ENOUGH, 400, b"no HTTP/1.1"),
        ((WITH_LENGTH % 10, b"x"), 1.0, 400, b"too slowly: 1 bytes"),
    ],
    ids=["announced too long", "too long", "no chunks", "slow"],
)
def test_what_is_no_body_is_refused(pieces: Iterable[bytes], seconds: float, status: int, said: bytes) -> None:
    with serving(4, transfer_seconds=seconds, request_bytes=STREAMED_BODY_BYTES) as server:
        for _ in range(2):  # its share of the budget is given back
            answered = answer(server, pieces)
            assert answered.startswith(b"HTTP/1.1 %d " % status)
            assert said in answered


def test_bodies_on_their_way_count_until_their_clients_leave() -> None:
    with serving(8, request_bytes=2 * STREAMED_BODY_BYTES) as server:
        with half_sent(server, 2, WITH_LENGTH % 10 + b"x") as opened:
            assert b"Overloaded" in answer(server, [WITH_LENGTH % 1, b"x"])
            for sock in opened:
                sock.shutdown(socket.SHUT_WR)
                assert b"the client has left after 1 bytes" in reply(sock)
        assert answer(server, [WITH_LENGTH % 1, b"x"]).startswith(b"HTTP/1.1 200 ")
