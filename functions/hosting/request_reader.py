"""One request as its bytes come in: head, then body, each bounded before memory is touched. Blocks nobody.

httptools reads the head and chunks. A body whose length is known goes from the socket into memory of its own.
"""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import httptools

from eventing.problems import EventTooLarge, Problem
from functions.hosting.environ import ADMITTED_BYTES, REFUSED, BodyStream, wsgi_environ
from functions.hosting.limits import MAX_HEAD_BYTES, MAX_HEADERS, Body, BodyBudget

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    Admit = Callable[[WSGIEnvironment], int]
    """How many bytes of body a request with this head may have. Raises a Problem where none shall be read. Called by the thread
    that waits for all connections, so it takes microseconds."""

_READ_BYTES: Final = 2**18
_END_OF_HEAD: Final = b"\r\n\r\n"
_MOST_FRAMING: Final = 8
"""A chunk of one byte takes six."""


class BadRequest(Exception):
    """No request that can be answered by an application: `status` is, and the connection ends."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class ClientClosed(Exception):
    """The connection ended before a whole request was there."""


class RequestReader:
    """Reads one request; `following` is the next one's. `environ` is None until the head is in."""

    def __init__(self, admit: "Admit", budget: BodyBudget, base: "WSGIEnvironment") -> None:
        self._admit = admit
        self._budget = budget
        self._base = base
        self.environ: WSGIEnvironment | None = None
        self.complete = False
        self.keeps = False
        """Whether another request may follow on the connection."""
        self.unread = False
        """It was refused before its body was in: the client may be sending still."""
        self.expects_continue = False
        """The client waits for `100 Continue` before it sends the body."""
        self._head = bytearray()
        self._searched = 0
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._heads = self._messages = 0
        self._body = Body()
        self._received = 0
        self._framed = 0
        """Bytes of chunks with what frames them."""
        self._most = 0
        self._length: int | None = None
        """Of a body in chunks: None."""
        self._rest = b""
        self._parser = httptools.HttpRequestParser(self)

    @property
    def begun(self) -> bool:
        return bool(self._head) or self.environ is not None

    @property
    def received_bytes(self) -> int:
        """Of the body."""
        return self._received

    def following(self) -> "RequestReader":
        """Of the next request on the connection, which may be complete already. Raises BadRequest."""
        reader = RequestReader(self._admit, self._budget, self._base)
        if self._rest:
            reader.feed(self._rest)
        return reader

    def receive(self, sock: socket.socket) -> None:
        """Takes what has arrived. Raises BadRequest, ClientClosed, OSError; BlockingIOError where there is nothing."""
        if self.environ is None or self._length is None:
            data = sock.recv(_READ_BYTES)
            if not data:
                raise ClientClosed
            self.feed(data)
            return
        view = memoryview(self._body)[self._received : self._received + 4 * _READ_BYTES]
        try:
            count = sock.recv_into(view)
        finally:
            view.release()
        if not count:
            raise ClientClosed
        self._arrived(count)

    def feed(self, data: bytes) -> None:
        """The same for bytes that are here. Raises BadRequest."""
        if self.environ is None:
            self._feed_head(data)
        elif self._length is None:
            self._feed_chunks(data)
        else:
            self._place(data)

    # Called by the parser.

    def on_message_begin(self) -> None:
        self._messages += 1

    def on_url(self, url: bytes) -> None:
        if self._messages == 1:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._messages == 1 and not self._heads:  # Trailers count for nothing.
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._heads += 1
        self.keeps = self._parser.should_keep_alive()  # Later it would be asked of the next message.

    def on_body(self, data: bytes) -> None:
        if self._messages > 1 or self.complete:
            return
        self._body += data
        self._received += len(data)

    def on_message_complete(self) -> None:
        if self.environ is not None and self._length is None:
            self.complete = True

    def _feed_head(self, data: bytes) -> None:
        self._head += data
        if not self._searched:
            while self._head.startswith((b"\r\n", b"\n")):  # RFC 9112, section 2.2.
                del self._head[: self._head.index(b"\n") + 1]
        end = self._head.find(_END_OF_HEAD, self._searched)
        self._searched = max(0, len(self._head) - len(_END_OF_HEAD) + 1)
        if end > MAX_HEAD_BYTES or (end < 0 and len(self._head) > MAX_HEAD_BYTES):
            raise BadRequest(431, f"request line and headers have more than {MAX_HEAD_BYTES} bytes")
        if end >= 0:
            end += len(_END_OF_HEAD)
            head, rest = bytes(self._head[:end]), bytes(self._head[end:])
            self._head = bytearray()
            self._parse(head)
            self._open()
            if self.complete:
                self._rest = rest
            elif rest:
                self.feed(rest)

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # Declined by answering in the protocol that the request came in (RFC 9110, section 7.8).
        except httptools.HttpParserError as error:
            raise BadRequest(400, f"no HTTP/1.1: {error}") from error

    def _open(self) -> None:
        """The head is in: what of it counts, and how much may follow."""
        if self._heads != 1 or self._messages != 1:
            raise BadRequest(400, "no HTTP/1.1: a blank line inside of the headers")
        if len(self._headers) > MAX_HEADERS:
            raise BadRequest(431, f"the request has {len(self._headers)} headers, the most is {MAX_HEADERS}")
        environ = wsgi_environ(self._parser.get_method(), self._url, self._parser.get_http_version(), self._headers, self._base)
        self.environ = environ
        encoding = environ.get("HTTP_TRANSFER_ENCODING", "").lower()
        if encoding not in ("", "chunked"):
            raise BadRequest(501, f"the transfer coding {encoding[:40]!r} is not served, chunked is")
        self._length = None if encoding else int(environ.get("CONTENT_LENGTH") or 0)
        try:
            self._most = environ[ADMITTED_BYTES] = self._admit(environ)
            self._check_size(self._length or 0)
        except Problem as problem:
            self._refuse(problem)
            return
        if self._length:
            self._body = Body(self._length)  # Untouched memory, which costs nothing before it is written to.
        if self._length == 0:
            self._complete()
        else:
            self.expects_continue = environ.get("HTTP_EXPECT", "").lower() == "100-continue"

    def _feed_chunks(self, data: bytes) -> None:
        self._parse(data)
        self._framed += len(data)
        if self._framed > MAX_HEAD_BYTES + _MOST_FRAMING * self._received:
            raise BadRequest(400, f"{self._framed} bytes of chunks hold {self._received} of a body")
        try:
            self._check_size(self._received)
            self._body.charge(self._budget, self._received)
        except Problem as problem:
            self._refuse(problem)
            return
        if self.complete:
            self.keeps = self.keeps and self._messages == 1
            self._complete()

    def _place(self, data: bytes) -> None:
        assert self._length is not None
        count = min(len(data), self._length - self._received)
        self._body[self._received : self._received + count] = data[:count]
        self._rest = data[count:]
        self._arrived(count)

    def _arrived(self, count: int) -> None:
        self._received += count
        try:
            self._body.charge(self._budget, self._received)
        except Problem as problem:
            self._refuse(problem)
            return
        if self._received == self._length:
            self._complete()

    def _check_size(self, size: int) -> None:
        if size > self._most:
            raise EventTooLarge(f"the body has {size} bytes or more, the most is {self._most}")

    def _complete(self) -> None:
        assert self.environ is not None
        self.environ["CONTENT_LENGTH"] = str(self._received)
        self.environ.pop("HTTP_TRANSFER_ENCODING", None)
        self.environ["wsgi.input"] = BodyStream(self._body)
        self._body = Body()
        self.complete = True

    def _refuse(self, problem: Problem) -> None:
        """Answered without its body, which nobody reads; so nothing can follow on the connection."""
        assert self.environ is not None
        self.environ[REFUSED] = problem.with_traceback(None)  # Its frames hold the body, which counts until it is free.
        self._body = Body()
        self.unread = self._length != 0
        self._received, self.keeps = 0, self.keeps and not self.unread
        self._complete()
