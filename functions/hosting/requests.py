"""Reads a request from its bytes into a WSGI environment (PEP 3333).

Head and body are checked against their limits before memory is used for them. Nothing here blocks, except reads of a
StreamedBody. httptools parses the head and chunks. A body of known length goes from the socket directly into its final memory,
which the application gets without a copy.
"""

import contextlib
import io
import re
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_to_bytes

import httptools

from eventing.http.request_target import AUTHORITY, read_target
from eventing.problems import EventTooLarge, MalformedEvent, Overloaded, Problem
from functions.fairness.fair_shares import FairShares

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from _typeshed.wsgi import WSGIEnvironment

    # Maximum bytes of body for a request with this head. None: the application answers by the head alone, as it does for an
    # unknown path, and no body is read. Raises a Problem to refuse the request. The poller's thread calls it, so it may take
    # microseconds only.
    Admit = Callable[[WSGIEnvironment], int | None]

MAX_HEAD_BYTES: Final = 2**16  # request line and headers; an event's attributes may have 4096 characters each
MAX_HEADERS: Final = 128
SMALL_BODY_BYTES: Final = 2**14  # so many bytes of each body are not counted, so that large bodies do not shut out small ones

# Keys of the environment.
REFUSED: Final = "lamina.refused"  # the Problem that ended the request before its body was received; the application raises it
ADMITTED_BYTES: Final = "lamina.admitted_bytes"  # what the application's `Admit` returned for this head
STREAMED: Final = "lamina.streamed"  # set by `Admit`: the application reads the body from the connection, as it arrives
CLIENT_ID: Final = "lamina.client_id"  # set by `Admit`: for whom connection and body count; else it is the client's address
MANAGEMENT: Final = "lamina.management"  # whether the request came by the management port, which clients do not reach
CLIENT_GONE: Final = "lamina.client_gone"  # () -> bool: whether the client has closed its connection
ARRIVED: Final = "lamina.arrived"  # when the head was complete, before body and thread, in time.monotonic()

STREAMED_BODY_BYTES: Final = 2**22  # what a streamed body counts, for the pieces that its application holds

_READ_BYTES: Final = 2**18
_END_OF_HEAD: Final = b"\r\n\r\n"
_OFFER: Final = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_MAX_FRAMING: Final = 8  # bytes of chunked framing per byte of body; a chunk of one byte takes six


class BadRequest(Exception):
    """The received bytes are no request that the application can answer.

    The server replies with `status` and ends the connection.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class ClientClosed(Exception):
    """The client closed the connection before the request was complete."""


class BodyShare:
    def __init__(self, client_id: str, body: "Body") -> None:
        self.client_id = client_id
        self.body = weakref.ref(body)
        self.gave_way = False  # another client got the memory: the request is refused


class BodyBudget:
    """Limits the memory of all request bodies together, and shares it among clients. Thread-safe.

    When the memory is used up, an incomplete body may give way to one of another client: its request is refused.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._shares: FairShares[BodyShare] = FairShares()
        # Of bodies whose memory is free, not yet removed from _shares. Needs no lock: destructors append, and the garbage
        # collector may run one inside of `take`.
        self.given_back: deque[BodyShare] = deque()

    def take(self, share: BodyShare, count: int) -> None:
        """Counts `count` more bytes of a body. If the limit is exceeded, bodies of other clients may give way.

        Raises Overloaded if no other body gives way, or if this body has given way.
        """
        with self._lock:
            self._settle()
            self._check(share)
            yielding = self._shares.make_room(share.client_id, count, self._max_bytes)
            if yielding is None:
                raise Overloaded(
                    f"requests in hand have {self._shares.total} bytes, the most is {self._max_bytes}; send it again later"
                )
            self._shares.add(share.client_id, share, count)
            for each in yielding:
                each.gave_way = True
                body = each.body()
                if body is not None:
                    with contextlib.suppress(BufferError):  # bytes are being received into it: freed when its reader looks
                        body.clear()

    def keep(self, share: BodyShare) -> None:
        """Protects a complete body: from now on it does not give way. Raises Overloaded if it has given way before."""
        with self._lock:
            self._check(share)
            self._shares.fix(share)

    def _check(self, share: BodyShare) -> None:
        if share.gave_way:
            raise Overloaded(
                "its client has most bytes of all requests in hand, and another one sent some; send it again later"
            )

    def _settle(self) -> None:
        while self.given_back:
            self._shares.remove(self.given_back.popleft())


class Body(bytearray):
    """A request's body. Its bytes count in the BodyBudget until its memory is freed."""

    _budget: BodyBudget | None = None
    _charged = 0

    def __init__(self, size: int, client_id: str = "") -> None:
        super().__init__(size)
        self.share = BodyShare(client_id, self)

    def charge(self, budget: BodyBudget, received: int) -> None:
        """Counts this body's bytes in the budget of all bodies; the first SMALL_BODY_BYTES are free. Raises Overloaded.

        `received` is how many of its bytes have come so far.
        """
        due = received - SMALL_BODY_BYTES - self._charged
        if due > 0 or self.share.gave_way:
            budget.take(self.share, due)
            self._budget = budget
            self._charged += due

    def keep(self) -> None:
        """Protects the body, which must be complete, from giving way. Raises Overloaded if it has given way before."""
        if self._budget is not None:
            self._budget.keep(self.share)

    def __del__(self) -> None:
        if self._budget is not None:
            self._budget.given_back.append(self.share)


class BodyStream(io.RawIOBase):
    """A complete body as `wsgi.input`.

    If an application reads a whole large body at once, it gets the buffer itself without a copy. The stream is empty
    afterwards.
    """

    def __init__(self, body: bytes | bytearray) -> None:
        self._body = body
        self._position = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        left = len(self._body) - self._position
        count = left if size is None or size < 0 else min(size, left)
        if self._position == 0 and count == left > SMALL_BODY_BYTES:
            whole, self._body = self._body, b""
            return whole  # type: ignore[return-value]  # a bytearray, which is read like bytes and is not copied
        piece = bytes(memoryview(self._body)[self._position : self._position + count])
        self._position += count
        if count == left:
            self._body, self._position = b"", 0
        return piece

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        piece = self.read(min(len(view), SMALL_BODY_BYTES))
        view[: len(piece)] = piece
        return len(piece)


class StreamedBody(io.RawIOBase):
    """A body of any length as `wsgi.input`, received from the socket while the application reads. Not thread-safe.

    `read` raises MalformedEvent if the client leaves or is too slow, and EventTooLarge.
    """

    def __init__(self, body: Body, length: int | None, max_bytes: int, parser: Any, parsed: "_Parsed") -> None:
        """`body` counts this body's memory in the BodyBudget.

        If `length` is None, the body comes in chunks, which `parser` and `parsed` read.
        """
        self._held: Body | None = body
        self._length = length
        self._max_bytes = max_bytes
        self._parser = parser
        self._parsed = parsed
        self._arrived = bytearray()  # and not yet read
        self._received_bytes = 0
        self._framed_bytes = 0  # with the framing of chunks
        self._ended = length == 0
        self._seconds_left = 0.0
        self._bytes_per_second = 1.0
        self._sock: socket.socket | None = None
        self._before = b""

    def connect(self, sock: socket.socket, transfer_seconds: float, bytes_per_second: float, before: bytes = b"") -> None:
        """Sets the socket from which the body is read. Call it before the first read.

        `before` is sent to the client before the first byte is received. The client must send `bytes_per_second`; it may be
        late by `transfer_seconds` in all.
        """
        self._sock, self._before = sock, before
        self._seconds_left, self._bytes_per_second = transfer_seconds, bytes_per_second

    def feed(self, data: bytes) -> None:
        """Adds bytes of the body that were received with the head."""
        self._framed_bytes += len(data)
        if self._length is None:
            _feed_parser(self._parser, data)
            chunks, self._parsed.chunks = self._parsed.chunks, []
            self._ended = self._parsed.ended
        else:
            chunks = [data[: self._length - self._received_bytes]]
            self._ended = self._received_bytes + len(chunks[0]) == self._length
        for chunk in chunks:
            self._arrived += chunk
            self._received_bytes += len(chunk)
            self._seconds_left += len(chunk) / self._bytes_per_second
        if self._received_bytes > self._max_bytes:
            raise EventTooLarge(f"the body has more than {self._max_bytes} bytes, which are the most")
        if self._framed_bytes > MAX_HEAD_BYTES + _MAX_FRAMING * self._received_bytes:
            raise MalformedEvent(f"{self._framed_bytes} bytes of chunks hold {self._received_bytes} of a body")

    def close(self) -> None:
        """Frees the body's share of the BodyBudget."""
        self._held = None
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        while not self._arrived and not self._ended:
            self._receive()
        count = min(len(view), len(self._arrived))
        view[:count] = self._arrived[:count]
        del self._arrived[:count]
        return count

    def _receive(self) -> None:
        assert self._sock is not None
        poll, began = select.poll(), time.monotonic()
        poll.register(self._sock, select.POLLIN)
        try:
            if self._before:
                self._sock.send(self._before)
                self._before = b""
            ready = poll.poll(max(0.0, self._seconds_left) * 1000)
            data = self._sock.recv(_READ_BYTES) if ready else None
        except OSError as error:
            raise MalformedEvent(f"the connection broke after {self._received_bytes} bytes of the body") from error
        self._seconds_left -= time.monotonic() - began
        if data is None:
            raise MalformedEvent(f"the body came too slowly: {self._received_bytes} bytes so far; send it again")
        if not data:
            raise MalformedEvent(f"the client has left after {self._received_bytes} bytes of the body")
        try:
            self.feed(data)
        except BadRequest as error:
            raise MalformedEvent(str(error)) from error


class _Parsed:
    """Receives the callbacks of httptools' parser, and keeps what the parser has found so far.

    It has no reference to the parser or the reader. In a reference cycle, a body that is not read to its end would stay in
    memory, and count in the BodyBudget, until the garbage collector runs.
    """

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []  # of the first message, without trailers
        self.heads = self.messages = 0
        self.chunks: list[bytes] = []  # of the first message's body; the reader takes them out
        self.ended = False  # the first message is complete

    def on_message_begin(self) -> None:
        self.messages += 1

    def on_url(self, url: bytes) -> None:
        if self.messages == 1:
            self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.messages == 1 and not self.heads:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.heads += 1

    def on_body(self, data: bytes) -> None:
        if not self.ended:
            self.chunks.append(data)

    def on_message_complete(self) -> None:
        self.ended = True


class RequestReader:
    """Reads one request from a connection. `environ` is None until the head is complete."""

    def __init__(self, admit: "Admit", budget: BodyBudget, base: "WSGIEnvironment") -> None:
        self._admit = admit
        self._budget = budget
        self._base = base
        self.environ: WSGIEnvironment | None = None
        self.complete = False
        self.keeps = False  # another request may follow on the connection
        self.unread = False  # answered before the body was received: the client may still be sending
        self.expects_continue = False  # the client waits for `100 Continue` before it sends the body
        self.streamed: StreamedBody | None = None  # the body, if the application receives it; `complete` is true then
        self.begun = False
        self.received_bytes = 0  # of the body
        self._head = bytearray()
        self._searched = 0
        self._body: Body | None = None
        self._framed = 0  # bytes of chunks and their framing
        self._max_body_bytes = 0
        self._length: int | None = None  # of the body; None: in chunks
        self._rest = b""
        self._parsed = _Parsed()
        self._parser = httptools.HttpRequestParser(self._parsed)

    @property
    def client_id(self) -> str:
        """The client for whom this request counts. Until the head has come, it is the client's address."""
        environ = self._base if self.environ is None else self.environ
        client_id: str = environ.get(CLIENT_ID) or environ.get("REMOTE_ADDR", "")
        return client_id

    @property
    def gave_way(self) -> bool:
        """Whether the body's memory was given to another client. If so, the next `receive` completes the request as refused."""
        return self._body is not None and self._body.share.gave_way

    def following(self) -> "RequestReader":
        """Returns the reader of the connection's next request. It contains the bytes of that request that have arrived already.

        The next request may be complete at once. Raises BadRequest.
        """
        reader = RequestReader(self._admit, self._budget, self._base)
        if self._rest:
            reader.feed(self._rest)
        return reader

    def receive(self, sock: socket.socket) -> None:
        """Reads from the socket once, without waiting.

        Raises BadRequest, ClientClosed, OSError; BlockingIOError if nothing has arrived.
        """
        if self.gave_way:
            self._received(0)
            return
        if self.environ is None or self._length is None:
            data = sock.recv(_READ_BYTES)
            if not data:
                raise ClientClosed
            self.feed(data)
            return
        assert self._body is not None
        view = memoryview(self._body)[self.received_bytes : self.received_bytes + 4 * _READ_BYTES]
        try:
            count = sock.recv_into(view)
        finally:
            view.release()
        if not count:
            raise ClientClosed
        self._received(count)

    def feed(self, data: bytes) -> None:
        """Parses bytes that were received already. Raises BadRequest."""
        self.begun = True
        if self.environ is None:
            self._feed_head(data)
        elif self._length is None:
            self._feed_chunks(data)
        else:
            count = min(len(data), self._length - self.received_bytes)
            assert self._body is not None
            self._body[self.received_bytes : self.received_bytes + count] = data[:count]
            self._rest = data[count:]
            self._received(count)

    def _feed_head(self, data: bytes) -> None:
        head: bytes | bytearray = data
        if self._head:
            head = self._head
            head += data
        if not self._searched:
            while head.startswith((b"\r\n", b"\n")):  # RFC 9112, section 2.2
                head = head[head.index(b"\n") + 1 :]
        end = head.find(_END_OF_HEAD, self._searched)
        if end > MAX_HEAD_BYTES or (end < 0 and len(head) > MAX_HEAD_BYTES):
            raise BadRequest(431, f"request line and headers have more than {MAX_HEAD_BYTES} bytes")
        if end < 0:
            self._head = head if head is self._head else bytearray(head)
            self._searched = max(0, len(head) - len(_END_OF_HEAD) + 1)
            self.begun = bool(head)
            return
        end += len(_END_OF_HEAD)
        rest = bytes(head[end:])
        self._head = bytearray()
        self._parse_head(bytes(head[:end]))
        self._open()
        if self.streamed is not None:
            try:
                self.streamed.feed(rest)
            except Problem as problem:
                self._refuse(problem)
        elif self.complete:
            self._rest = rest
        elif rest:
            self.feed(rest)

    def _parse_head(self, head: bytes) -> None:
        try:
            _feed_parser(self._parser, head, in_head=True)
        except httptools.HttpParserUpgrade:
            if self._parser.get_method() == b"CONNECT":
                raise BadRequest(501, "CONNECT is not served: this is no proxy") from None
            # The offer of another protocol is declined by an answer in this one (RFC 9110, section 7.8). The parser takes the
            # body for that protocol, so the head is read once more without the offer.
            self._parsed = _Parsed()
            self._parser = httptools.HttpRequestParser(self._parsed)
            _feed_parser(self._parser, _OFFER.sub(b"\r\nupgrade_:", head), in_head=True)

    def _open(self) -> None:
        """Called when the head is complete: makes `environ`, and asks `admit` how many bytes of body are allowed."""
        parsed = self._parsed
        if parsed.heads != 1 or parsed.messages != 1:
            raise BadRequest(400, "no HTTP/1.1: a blank line inside of the headers")
        if len(parsed.headers) > MAX_HEADERS:
            raise BadRequest(431, f"the request has {len(parsed.headers)} headers, the most is {MAX_HEADERS}")
        version = self._parser.get_http_version()
        environ = wsgi_environ(self._parser.get_method(), parsed.url, version, parsed.headers, self._base)
        self.environ = environ
        self.keeps = _keeps_alive(version, environ.get("HTTP_CONNECTION", ""))
        encoding = environ.get("HTTP_TRANSFER_ENCODING", "").lower()
        if encoding not in ("", "chunked"):
            raise BadRequest(501, f"the transfer coding {encoding[:40]!r} is not served, chunked is")
        if environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            self.keeps = self.keeps and not encoding  # RFC 9112, section 6.1: that client may not know chunks
            environ.pop("HTTP_EXPECT", None)  # RFC 9110, section 10.1.1
        self._length = None if encoding else int(environ.get("CONTENT_LENGTH") or 0)
        try:
            admitted = self._admit(environ)
            if admitted is None:
                self._complete_unread()
                return
            self._max_body_bytes = environ[ADMITTED_BYTES] = admitted
            self._check_size(self._length or 0)
            if environ.get(STREAMED):
                self._stream(admitted)
                return
        except Problem as problem:
            self._refuse(problem)
            return
        if self._length == 0:
            self._complete()
        else:
            # Untouched memory, which costs nothing until it is written to.
            self._body = Body(self._length or 0, self.client_id)
            self.expects_continue = environ.get("HTTP_EXPECT", "").lower() == "100-continue"

    def _stream(self, max_bytes: int) -> None:
        """Completes the request with a StreamedBody, which the application reads. The connection ends after the reply.

        Raises Overloaded if the bodies of all requests leave no memory for it.
        """
        assert self.environ is not None
        held = Body(0, self.client_id)
        held.charge(self._budget, STREAMED_BODY_BYTES + SMALL_BODY_BYTES)
        held.keep()
        self.streamed = StreamedBody(held, self._length, max_bytes, self._parser, self._parsed)
        self.environ["wsgi.input"] = self.streamed
        self.expects_continue = self.environ.get("HTTP_EXPECT", "").lower() == "100-continue"
        self.keeps, self.unread, self.complete = False, True, True

    def _feed_chunks(self, data: bytes) -> None:
        _feed_parser(self._parser, data)
        chunks, self._parsed.chunks = self._parsed.chunks, []
        self._framed += len(data)
        self.received_bytes += sum(map(len, chunks))
        if self._framed > MAX_HEAD_BYTES + _MAX_FRAMING * self.received_bytes:
            raise BadRequest(400, f"{self._framed} bytes of chunks hold {self.received_bytes} of a body")
        assert self._body is not None
        try:
            self._check_size(self.received_bytes)
            self._body.charge(self._budget, self.received_bytes)
            if self.complete:
                self._body.keep()
        except Problem as problem:
            self._refuse(problem)
            return
        for chunk in chunks:
            self._body += chunk
        if self._parsed.ended:
            self.keeps = self.keeps and self._parsed.messages == 1
            self._complete()

    def _received(self, count: int) -> None:
        """Counts `count` bytes of the body that have just been received. The body's length must be known.

        Completes the request with the body's last bytes. Refuses the request if the memory for all bodies is used up, or if
        this body's memory was given to another client.
        """
        assert self._body is not None
        self.received_bytes += count
        try:
            self._body.charge(self._budget, self.received_bytes)
            if self.received_bytes == self._length:
                self._body.keep()
        except Problem as problem:
            self._refuse(problem)
            return
        if self.received_bytes == self._length:
            self._complete()

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise EventTooLarge(f"the body has {size} bytes or more, the most is {self._max_body_bytes}")

    def _complete(self) -> None:
        assert self.environ is not None
        self.environ["CONTENT_LENGTH"] = str(self.received_bytes)
        self.environ.pop("HTTP_TRANSFER_ENCODING", None)
        self.environ["wsgi.input"] = BodyStream(b"" if self._body is None else self._body)
        self._body = None
        self.complete = True

    def _refuse(self, problem: Problem) -> None:
        """Completes the request without its body, so that the application replies with `problem`."""
        assert self.environ is not None
        self.environ[REFUSED] = problem.with_traceback(None)  # its frames would hold the body's memory
        self._complete_unread()

    def _complete_unread(self) -> None:
        """Completes the request without its body. If the request has one, the connection ends after the reply."""
        self._body = None
        self.unread = self._length != 0
        self.received_bytes, self.keeps = 0, self.keeps and not self.unread
        self._complete()


def _feed_parser(parser: Any, data: bytes, *, in_head: bool = False) -> None:
    """Parses `data`. Raises BadRequest, and also HttpParserUpgrade if `in_head`."""
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:  # after the end of a body: the next request's, which is not served
        if in_head:
            raise
    except httptools.HttpParserError as error:
        raise BadRequest(400, f"no HTTP/1.1: {error}") from error


def wsgi_environ(
    method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]], base: "WSGIEnvironment"
) -> "WSGIEnvironment":
    """Returns the WSGI environment of a request, without `wsgi.input`.

    `base` has the entries that depend only on server and connection. Raises BadRequest for a target or a Host that must be
    refused (RFC 9112, section 3.2).
    """
    if version not in ("1.0", "1.1"):
        raise BadRequest(505, f"HTTP/{version} is not served, HTTP/1.1 is")
    authority = None
    if not url.startswith(b"/") or b"#" in url:
        try:
            target, authority = read_target(method.decode("latin-1"), url.decode("latin-1"))
        except ValueError as error:
            raise BadRequest(400, str(error)) from error
        url = target.encode("latin-1")
    path, _, query = url.partition(b"?")
    environ = base.copy()
    environ[ARRIVED] = time.monotonic()
    environ["REQUEST_METHOD"] = method.decode("latin-1")
    environ["PATH_INFO"] = (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1")
    environ["QUERY_STRING"] = query.decode("latin-1")
    environ["SERVER_PROTOCOL"] = f"HTTP/{version}"
    for name, value in headers:
        key = _key(name)
        if key is None:
            continue
        text = value.decode("latin-1").strip()
        if key in environ:
            if key == "HTTP_HOST":
                raise BadRequest(400, "the request has several Host headers; send one")
            text = f"{environ[key]},{text}"
        environ[key] = text
    host = environ.get("HTTP_HOST")
    if host is None and version != "1.0":
        raise BadRequest(400, "the request has no Host header, which HTTP/1.1 demands")
    if host is not None and not AUTHORITY.fullmatch(host):
        raise BadRequest(400, "the Host header is no host with a port or without")
    if authority is not None:
        environ["HTTP_HOST"] = authority
    return environ


def _keeps_alive(version: str, connection: str) -> bool:
    """Returns whether another request may follow on the connection (RFC 9112, section 9.3).

    `connection` is the header of that name; it is empty if there is none.
    """
    options = {option.strip() for option in connection.lower().split(",")}
    return "close" not in options and (version == "1.1" or "keep-alive" in options)


@lru_cache(maxsize=512)
def _key(name: bytes) -> str | None:
    """Returns the key that a header has in the WSGI environment.

    Returns None for a name with an underscore, because WSGI would mistake it for another header (`ce_id` for `ce-id`).
    """
    if b"_" in name:
        return None
    key = name.decode("latin-1").upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
