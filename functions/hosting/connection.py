"""A client's connection: its time limits, the request that it receives, and the reply that is sent on it."""

import contextlib
import logging
import select
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from functions.hosting.requests import BadRequest, ClientClosed, RequestReader

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

_log = logging.getLogger(__name__)

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
# At most so many bytes of a stream wait in the kernel to be sent: over a thousand tokens. Without a limit, megabytes would.
_UNSENT_STREAM_BYTES: Final = 256 * 1024
_JOIN_BELOW_BYTES: Final = 16 * 1024  # smaller replies are sent with their head: a copy costs less than a packet
_FAILED: Final = b"the function failed; its log has the traceback\n"


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """How long clients may take, and how many connections they may have. A connection that exceeds a limit is closed."""

    head_seconds: float = 10.0  # from a request's first byte, or the connection's start, to the end of its headers
    # For receiving a body, and for all the time that a reply waits for its client to read: in addition to the time that its
    # bytes take at `slowest_bytes_per_second`.
    transfer_seconds: float = 10.0
    slowest_bytes_per_second: float = 32 * 1024
    keep_alive_seconds: float = 75.0  # more than senders keep an idle connection (eventing/http/delivery): they close first
    linger_seconds: float = 2.0  # for a client to read a refusal while it sends; for requests on their way at the stop
    graceful_seconds: float = 600.0  # after SIGTERM; Knative's upper limit of timeoutSeconds, after which the platform kills
    waiting_connections: int = 1024  # without a complete request; for one more, one of the client that has most is closed


class ClientConnection:
    """One client's connection.

    The poller's thread owns the connection until a request is complete. Then a pool thread owns it until the request is
    answered.
    """

    def __init__(self, sock: socket.socket, reader: RequestReader, limits: ServerLimits, port: Any) -> None:
        """`port` is the ListeningPort that accepted the connection."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.sock = sock
        self.reader = reader
        self.port = port
        self.lingers = False  # the last reply is sent; what the client still sends is read and dropped
        self._limits = limits
        self._began = time.monotonic()
        self.deadline = self._began + limits.head_seconds  # in time.monotonic(); the poller closes it if it still waits then

    def receive(self) -> bool:
        """Reads what has arrived, without waiting, and returns whether the request is complete.

        After `linger` it drops what it reads and returns False. Raises BadRequest, ClientClosed, OSError.
        """
        if self.lingers:
            with contextlib.suppress(BlockingIOError):
                if not self.sock.recv(2**16):
                    raise ClientClosed
            return False
        reader = self.reader
        had_begun, had_head = reader.begun, reader.environ is not None
        try:
            reader.receive(self.sock)
        except BlockingIOError:
            return reader.complete
        if reader.complete:
            return True
        now = time.monotonic()
        if reader.environ is not None:
            if not had_head:
                self._began = now
                if reader.expects_continue:
                    self.sock.send(CONTINUE)
            transfer = self._limits.transfer_seconds + reader.received_bytes / self._limits.slowest_bytes_per_second
            self.deadline = self._began + transfer
        elif reader.begun and not had_begun:
            self.deadline = now + self._limits.head_seconds
        return False

    def receive_soon(self, seconds: float) -> bool:
        """Waits at most `seconds` for the next request to be complete, and returns whether it is.

        Raises the errors of `receive`. The pool thread that answered the previous request calls it.
        """
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while (left := end - time.monotonic()) > 0 and poll.poll(left * 1000):
            if self.receive():
                return True
        return False

    def next_request(self) -> bool:
        """Prepares the connection for its next request, after a reply was sent. Raises BadRequest.

        Returns whether that request is complete already, because its bytes came with those of the previous one.
        """
        self.reader = self.reader.following()
        now = time.monotonic()
        self.deadline = now + (self._limits.head_seconds if self.reader.begun else self._limits.keep_alive_seconds)
        return self.reader.complete

    def linger(self) -> None:
        """Stops sending. For ServerLimits.linger_seconds the poller reads and drops what the client still sends.

        If the connection were closed at once, a reset could keep the client from reading the reply.
        """
        self.lingers = True
        self.deadline = time.monotonic() + self._limits.linger_seconds
        if self.reader.streamed is not None:
            self.reader.streamed.close()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def refuse(self, error: BadRequest) -> bool:
        """Replies to a bad request with the error's status and text, without waiting, and calls `linger`.

        Returns False if the reply could not be sent; the caller must then close the connection.
        """
        detail = f"{error}\n".encode("latin-1", "replace")
        head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: text/plain\r\n"
        try:
            self.sock.send(f"{head}Content-Length: {len(detail)}\r\nConnection: close\r\n\r\n".encode() + detail)
        except OSError:
            return False
        self.linger()
        return True


def client_gone(sock: socket.socket) -> bool:
    """Returns whether the client has closed its side of a connection. Never waits."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


class ReplyWriter:
    """Writes a WSGI application's reply to a socket (PEP 3333, HTTP/1.1). A body of unknown length is sent in chunks."""

    def __init__(self, sock: socket.socket, environ: "WSGIEnvironment", limits: ServerLimits, *, keeps: bool) -> None:
        self.keeps = keeps  # the connection can be used again; False after a failure
        self._sock = sock
        self._limits = limits
        self._method = environ["REQUEST_METHOD"]
        self._speaks_1_1 = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
        self._status = ""
        self._headers: list[tuple[str, str]] = []
        self._head_is_out = False
        self._chunked = False
        self._has_body = True
        self._left: int | None = None  # bytes of the body still to come, if its length was announced
        self._whole_bytes: int | None = None  # length of a body that the application returned at once
        self._sent_bytes = 0
        self._blocked_seconds = 0.0  # so far, because the client did not read

    def answer(self, application: "WSGIApplication", environ: "WSGIEnvironment") -> None:
        """Runs the application and sends its reply, or a reply with 500 if the application fails.

        Raises OSError if sending fails.
        """
        pieces: Iterable[bytes] = ()
        try:
            pieces = application(environ, self.start_response)
            if isinstance(pieces, list | tuple):
                self._whole_bytes = sum(map(len, pieces))
            for piece in pieces:
                self.write(piece)
            self._end()
        except OSError:
            raise
        except Exception:  # noqa: BLE001 - one request must not take its thread with it
            _log.exception("%s %s failed", self._method, environ["PATH_INFO"])
            self._fail()
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Any:
        if exc_info is not None and self._head_is_out:
            raise exc_info[1]
        self._status, self._headers = status, list(headers)
        return self.write

    def write(self, data: bytes, /) -> None:
        """Sends a piece of the body. The first call also sends the status line and headers before it.

        Raises OSError if sending fails: TimeoutError if the client reads so slowly that the whole reply has been blocked for
        longer than ServerLimits allows. Raises ValueError if the body becomes longer than its Content-Length.
        """
        if not data:
            return
        head = b"" if self._head_is_out else self._head()
        if not self._has_body:
            self._send(head)
            return
        if self._left is not None:
            if len(data) > self._left:
                raise ValueError(f"{len(data)} bytes, and {self._left} of the announced length are left")
            self._left -= len(data)
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if head and len(head) + len(data) <= _JOIN_BELOW_BYTES:
            self._send(head + data)
            return
        self._send(head)
        self._send(data)

    def _end(self) -> None:
        if not self._head_is_out:
            self._send(self._head())
        if self._chunked:
            self._send(b"0\r\n\r\n")
        elif self._left:
            raise ValueError(f"the body ended {self._left} bytes before the announced length")

    def _fail(self) -> None:
        """Replies with 500 if nothing has been sent.

        Otherwise the connection ends early, which shows the client that the reply is incomplete.
        """
        self.keeps = False
        if not self._head_is_out:
            self._status = "500 Internal Server Error"
            self._headers, self._whole_bytes = [("Content-Type", "text/plain")], len(_FAILED)
            self.write(_FAILED)

    def _head(self) -> bytes:
        """Returns the reply's status line and headers, encoded, and decides how the body is framed (RFC 9112, section 6.3)."""
        self._head_is_out = True
        bodiless = self._status[:1] == "1" or self._status[:3] in ("204", "304")
        self._has_body = not bodiless and self._method != "HEAD"
        lines = [f"HTTP/1.1 {self._status}", f"Date: {_date(int(time.time()))}"]
        length = None
        for name, value in self._headers:
            if "\n" in value or "\r" in value:
                raise ValueError(f"a line break in the header {name}")
            if name.lower() == "content-length":
                length = int(value)
            lines.append(f"{name}: {value}")
        if length is None and self._whole_bytes is not None and not bodiless:  # RFC 9110, section 8.6
            length = self._whole_bytes
            lines.append(f"Content-Length: {length}")
        if length is None and not bodiless:
            self._chunked = self._speaks_1_1 and self._has_body
            self.keeps = self.keeps and self._speaks_1_1
            if self._speaks_1_1:
                lines.append("Transfer-Encoding: chunked")
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_STREAM_BYTES)
        self._left = length if self._has_body else None
        if not self.keeps:
            lines.append("Connection: close")
        elif not self._speaks_1_1:
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def _send(self, data: bytes) -> None:
        if not data:
            return
        self._sent_bytes += len(data)
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return
        allowed = self._limits.transfer_seconds + self._sent_bytes / self._limits.slowest_bytes_per_second
        began = time.monotonic()
        try:
            self._sock.settimeout(max(0.001, allowed - self._blocked_seconds))  # 0 would mean: never wait
            self._sock.sendall(memoryview(data)[sent:])
        finally:
            self._sock.setblocking(False)
            self._blocked_seconds += time.monotonic() - began


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
