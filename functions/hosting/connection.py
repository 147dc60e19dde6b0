"""A client's connection: what it may still take its time for, and the request that is coming in on it."""

import contextlib
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from functions.hosting.limits import Limits
from functions.hosting.request_reader import BadRequest, ClientClosed, RequestReader

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connection:
    """Waits for a whole request, then is one thread's until that is answered. `deadline`: of the wait, time.monotonic()."""

    def __init__(self, sock: socket.socket, reader: RequestReader, limits: Limits, door: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.sock = sock
        self.reader = reader
        self.door = door
        self.lingers = False
        """The last reply is out; what still comes is not read, so that a client that sends finds its refusal."""
        self._limits = limits
        self._began = time.monotonic()
        self.deadline = self._began + limits.head_seconds

    def receive(self) -> bool:
        """Whether a whole request is there, after what has arrived. Raises BadRequest, ClientClosed, OSError."""
        if self.lingers:
            self._discard()
            return False
        reader, had_begun, had_head = self.reader, self.reader.begun, self.reader.environ is not None
        with contextlib.suppress(BlockingIOError):
            reader.receive(self.sock)
        now = time.monotonic()
        if reader.environ is not None:
            if not had_head:
                self._began = now
                if reader.expects_continue and not reader.complete:
                    self.sock.send(_CONTINUE)
            rate = self._limits.slowest_bytes_per_second
            self.deadline = self._began + self._limits.transfer_seconds + reader.received_bytes / rate
        elif reader.begun and not had_begun:
            self.deadline = now + self._limits.head_seconds
        return reader.complete

    def receive_soon(self, seconds: float) -> bool:
        """The same for one who waits for it, for so long at most."""
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while (left := end - time.monotonic()) > 0 and poll.poll(left * 1000):
            if self.receive():
                return True
        return False

    def next_request(self) -> bool:
        """After a reply. Whether the next request has come with the last one. Raises BadRequest."""
        self.reader = self.reader.following()
        self.sock.setblocking(False)
        now = time.monotonic()
        self.deadline = now + (self._limits.head_seconds if self.reader.begun else self._limits.keep_alive_seconds)
        return self.reader.complete

    def linger(self) -> None:
        """Nothing more is said; what the client sends is taken for a while, or its reading would end with a reset."""
        self.lingers = True
        self.deadline = time.monotonic() + self._limits.linger_seconds
        self.sock.setblocking(False)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def refuse(self, error: BadRequest) -> bool:
        """A short reply, if it is taken at once, and then `linger`. False where the client is gone."""
        detail = f"{error}\n".encode("latin-1", "replace")
        head = f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\nContent-Type: text/plain\r\n"
        try:
            self.sock.send(f"{head}Content-Length: {len(detail)}\r\nConnection: close\r\n\r\n".encode() + detail)
        except OSError:
            return False
        self.linger()
        return True

    def close(self) -> None:
        self.sock.close()

    def _discard(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if not self.sock.recv(2**16):
                raise ClientClosed


_REASONS: Final = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    503: "Service Unavailable",
}


def client_gone(sock: socket.socket) -> Callable[[], bool]:
    """Whether the client has closed its side. Never waits."""

    def gone() -> bool:
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    return gone
