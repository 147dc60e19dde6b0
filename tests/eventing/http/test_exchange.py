"""Replies as they can come over a socket, and heads that must not be sent."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from eventing.http.delivery import BadReply, HttpReply, RequestTarget, exchange, request_head

ROOT = RequestTarget.of("http://127.0.0.1/")
HEAD = request_head(ROOT, {"Content-Length": "1"})


def answered(*pieces: bytes, closes: bool = False) -> HttpReply:
    """What `exchange` makes of these pieces, each of which arrives by itself."""
    here, there = socket.socketpair()
    with here, there:

        def answer() -> None:
            there.recv(2**16)
            for piece in pieces:
                there.sendall(piece)
                time.sleep(0.01)
            if closes:
                there.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            return exchange(here, HEAD, [b"x"], time.monotonic() + 2)
        finally:
            thread.join()


def bytes_of(text: bytes) -> Iterator[bytes]:
    return (text[index : index + 1] for index in range(len(text)))


def test_a_reply_may_come_byte_by_byte() -> None:
    reply = answered(*bytes_of(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nCE-Id: 7\r\n\r\nabc"))
    assert (reply.status, reply.headers["ce-id"], bytes(reply.body), reply.keeps) == (200, "7", b"abc", True)


def test_an_interim_reply_is_passed_over() -> None:
    reply = answered(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n")
    assert (reply.status, reply.headers, bytes(reply.body), reply.keeps) == (204, {}, b"", True)


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n"])
def test_what_ends_the_connection_is_told(head: bytes) -> None:
    assert not answered(head + b"Content-Length: 1\r\n\r\na").keeps


def test_a_connection_that_says_more_than_it_was_asked_is_not_used_again() -> None:
    reply = answered(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc")
    assert (bytes(reply.body), reply.keeps) == (b"a", False)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"", "closed without a reply"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "no HTTP reply, but"),
        (b"HTTP/1.1 two hundred\r\n\r\n", "two hundred"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", "closed after 3 bytes, 2 more expected"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "closed after 3 bytes, before the last chunk"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "the most is"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**17, "no HTTP reply, but"),
    ],
)
def test_what_is_no_whole_reply_is_refused(reply: bytes, said: str) -> None:
    with pytest.raises(BadReply, match=said):
        answered(reply, closes=True)


@pytest.mark.parametrize("given", [("/", {"ce-id": "1\r\nevil: 1"}), ("/", {"a\nb": "c"}), ("/a b", {}), ("/\r\n", {})])
def test_nothing_breaks_out_of_its_line(given: tuple[str, dict[str, str]]) -> None:
    path, headers = given
    with pytest.raises(ValueError, match="line break"):
        request_head(replace(ROOT, path=path), headers)
