"""One HTTP/1.1 request and its reply on a connected socket.

httptools reads what frames the reply; a body whose length is known goes from the socket straight into memory of its own. In
place of http.client, which spends most of a small exchange on reading headers as if they were mail, and sends head and body
apart: docs/log.md has the numbers.
"""

import contextlib
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import httptools

from eventing.wire.cloud_event import Buffer

MAX_REPLY_BYTES: Final = 2**30

_MAX_HEAD_BYTES: Final = 2**16
_JOIN_BELOW_BYTES: Final = 16 * 1024
"""Smaller buffers are sent together: copying them is cheaper than one more system call and packet each."""
_READ_BYTES: Final = 2**20
_BEGINNING: Final = b"HTTP/1."
_END_OF_HEAD: Final = b"\r\n\r\n"
_INTERIM: Final = range(100, 200)


class BadReply(Exception):
    """What came back is no HTTP, or ended too early."""


class ReplyTooLarge(BadReply):
    """It is HTTP, with this status, but more than anybody may send."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{detail}, the most is {MAX_REPLY_BYTES}")
        self.status = status


class HttpReply:
    """One reply, read piece by piece: the head, then the body. Raises BadReply, OSError, TimeoutError at a `deadline`, which is
    in time.monotonic().

    headers: names in lower case. body: writable. keeps: whether the connection can be used again."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.keeps = False
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)

    def read_head(self, sock: socket.socket, deadline: float, begun: bytes) -> bytes:
        """`begun` has arrived already; what has arrived behind the head is returned."""
        data = begun
        while (end := data.find(_END_OF_HEAD)) < 0:
            sock.settimeout(remaining(deadline))
            more = sock.recv(_MAX_HEAD_BYTES)
            data += more
            if not data:
                raise BadReply("closed without a reply")
            if not more or len(data) > _MAX_HEAD_BYTES or not data.startswith(_BEGINNING[: len(data)]):
                raise BadReply(f"no HTTP reply, but {data[:100]!r}")
        end += len(_END_OF_HEAD)
        self._feed(data[:end])
        return data[end:]

    def read_body(self, sock: socket.socket, deadline: float, begun: bytes) -> None:
        length = self.headers.get("content-length")
        if self.complete:  # A status without a body, or one that is empty.
            return
        if length is not None and "transfer-encoding" not in self.headers:
            self._read_known(sock, deadline, begun, int(length))
        else:
            self._read_framed(sock, deadline, begun)

    # Called by the parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.keeps = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True

    def _read_known(self, sock: socket.socket, deadline: float, begun: bytes, length: int) -> None:
        if length > MAX_REPLY_BYTES:
            raise ReplyTooLarge(self.status, f"a body of {length} bytes")
        self.body = bytearray(length)
        received = min(len(begun), length)
        self.body[:received] = begun[:received]
        view = memoryview(self.body)
        while received < length:
            sock.settimeout(remaining(deadline))
            count = sock.recv_into(view[received : received + _READ_BYTES])
            if not count:
                raise BadReply(f"closed after {received} bytes, {length - received} more expected")
            received += count
        self.keeps = self.keeps and len(begun) <= length

    def _read_framed(self, sock: socket.socket, deadline: float, begun: bytes) -> None:
        """Chunks, or all until the connection ends."""
        self._feed(begun)
        while not self.complete:
            sock.settimeout(remaining(deadline))
            data = sock.recv(_READ_BYTES)
            if not data and "transfer-encoding" in self.headers:
                raise BadReply(f"closed after {len(self.body)} bytes, before the last chunk")
            if not data:
                return
            self._feed(data)
            if len(self.body) > MAX_REPLY_BYTES:
                raise ReplyTooLarge(self.status, f"a body of {len(self.body)} bytes so far")

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise BadReply(f"{error}: {data[:100]!r}") from error


def exchange(sock: socket.socket, head: bytes, buffers: Sequence[Buffer], deadline: float) -> HttpReply:
    """Sends `head` and `buffers`, and reads the reply. Raises BadReply, OSError, TimeoutError at `deadline`."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # A refusal may have come before all was sent.
        for buffer in _joined((head, *buffers)):
            sock.settimeout(remaining(deadline))
            sock.sendall(buffer)
    rest = b""
    while True:
        reply = HttpReply()
        rest = reply.read_head(sock, deadline, rest)
        if reply.status not in _INTERIM:
            reply.read_body(sock, deadline, rest)
            return reply


def request_head(host: str, target: str, headers: Mapping[str, str], method: str = "POST") -> bytes:
    """Raises ValueError for what would break out of its line."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    if not target.isprintable() or " " in target or any("\r" in line or "\n" in line for line in lines):
        raise ValueError(f"a line break, or a blank in the target, in {lines}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def remaining(deadline: float) -> float:
    """Seconds until `deadline`. Raises TimeoutError where there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _joined(buffers: Iterable[Buffer]) -> Iterator[Buffer]:
    small: list[Buffer] = []
    for buffer in buffers:
        if len(buffer) < _JOIN_BELOW_BYTES:
            small.append(buffer)
            continue
        if small:
            yield b"".join(small)
            small.clear()
        yield buffer
    if small:
        yield b"".join(small)
