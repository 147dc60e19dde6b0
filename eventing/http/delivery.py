"""Sends requests over HTTP/1.1 on kept-alive connections, one attempt for each.

There are no retries here: after a failure the gateway chooses another route and replays the sequence. Redirects are never
followed, and proxies from the environment are never used. This client replaces two libraries. http.client parses headers like
mail and sends head and body separately; urllib3 limits the sending of a body by the connect timeout (docs/log.md has the
numbers).
"""

import contextlib
import functools
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import httptools

from eventing.http.pod_tls import PodTLS, is_refusal, tls_problem
from eventing.problems import PROBLEM_CONTENT_TYPE, problem_from_document
from eventing.wire.framing import Buffer

USER_AGENT: Final = "lamina"
MAX_REPLY_BYTES: Final = 2**30
IDLE_SECONDS: Final = 15.0  # idle connections are closed after this, before a server's keep-alive limit closes them

_LOOK_SECONDS: Final = 5.0  # between two searches for connections that have been idle for too long
_EXCERPT_LENGTH: Final = 200
_MAX_HEAD_BYTES: Final = 2**16
_JOIN_BELOW_BYTES: Final = 16 * 1024  # smaller buffers are sent together: a copy costs less than a system call and a packet
_READ_BYTES: Final = 2**20
_BEGINNING: Final = b"HTTP/1."
_END_OF_HEAD: Final = b"\r\n\r\n"
_OWN_HEADERS: Final = frozenset({"host", "content-length", "transfer-encoding", "user-agent"})  # set in this module
# Knative's own headers. With some, a request is not counted by the autoscaler; with others, no function sees it
# (docs/reference.md, "Headers between Lamina and Knative").
_KNATIVE_PREFIXES: Final = ("k-", "kn-", "knative-")


class DeliveryError(Exception):
    """Base class of failed deliveries: no function of Lamina replied to the request. The message names the URL."""


class Unreachable(DeliveryError):
    """Nothing was delivered, because no connection was available.

    It was refused, had no route, an unknown name or a TLS error, or no connection of the pool became free.
    """


class ConnectionBroken(DeliveryError):
    """The connection broke before the whole reply came. The receiver may have handled the event or not."""


class DeliveryTimeout(DeliveryError):
    """The whole reply did not come in time. The receiver may have handled the event or not."""


class InfrastructureError(DeliveryError):
    """The reply is neither 2xx nor a problem document of Lamina, so a proxy, an activator or another server sent it."""

    def __init__(self, status: int, url: str, excerpt: str) -> None:
        super().__init__(f"{url} answered {status}: {excerpt}")
        self.status = status
        self.url = url
        self.excerpt = excerpt


class NoFreeConnection(Exception):
    """The limit of open connections to the host was reached, and none became free in time."""


class BadReply(Exception):
    """The received bytes are not a complete HTTP reply."""


class ReplyTooLarge(BadReply):
    """The body of an HTTP reply has more than MAX_REPLY_BYTES. `status` is the status of that reply."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{detail}, the most is {MAX_REPLY_BYTES}")
        self.status = status


class Origin(NamedTuple):
    """The scheme, host and port that a connection leads to (RFC 9110, section 4.3.1)."""

    secure: bool
    host: str
    port: int | None


@dataclass(frozen=True, slots=True)
class RequestTarget:
    """A URL, parsed once into the parts that a request needs."""

    url: str
    origin: Origin
    host: str  # value of the Host header
    path: str  # with the query, if there is one

    @classmethod
    def of(cls, url: str) -> "RequestTarget":
        """Parses `url`. Raises ValueError if it is not an http or https URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http or https URL")
        origin = Origin(parts.scheme == "https", parts.hostname, parts.port)
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        return cls(url, origin, parts.netloc.rpartition("@")[2], path)


class HttpReply:
    """One HTTP reply, and the code that reads it from a socket. Header names are in lower case.

    The body is writable memory that belongs to this reply alone, so tensors may be views of it.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = memoryview(b"")
        self.keeps = False  # the connection can be used again
        self._complete = False
        self._chunks = bytearray()
        self._fields: dict[bytes, bytes] = {}
        # httptools calls these once per header and piece; methods in Python would be a dozen of a hop's calls.
        self.on_header = self._fields.__setitem__
        self.on_body = self._chunks.extend
        self._parser = httptools.HttpResponseParser(self)

    def read(self, sock: socket.socket, deadline: float, begun: bytes) -> bytes:
        """Reads the head of a reply, and the body too unless the reply is interim (status 1xx).

        `begun` are bytes of this reply that were received before. After an interim reply, returns the bytes that follow it:
        they begin the next reply. Otherwise returns no bytes. Raises BadReply, OSError, and TimeoutError at `deadline`.
        """
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
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self._fields.items()}
        data = data[end:]
        if self.status < 200:
            return data
        length = self.headers.get("content-length")
        if self._complete:  # a status without a body, or an empty body
            return b""
        if length is not None and "transfer-encoding" not in self.headers:
            self._read_known(sock, deadline, data, int(length))
        else:
            self._read_framed(sock, deadline, data)
        return b""

    def on_headers_complete(self) -> None:
        """Callback of httptools: stores the status and whether the connection can be kept."""
        self.status = self._parser.get_status_code()
        self.keeps = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        """Callback of httptools: marks the body as complete."""
        self._complete = True

    def _read_known(self, sock: socket.socket, deadline: float, begun: bytes, length: int) -> None:
        """Receives a body of `length` bytes directly into its final memory. `begun` are its bytes that came with the head."""
        if length > MAX_REPLY_BYTES:
            raise ReplyTooLarge(self.status, f"a body of {length} bytes")
        self.body = view = memoryview(bytearray(length))
        received = min(len(begun), length)
        view[:received] = begun[:received]
        while received < length:
            sock.settimeout(remaining(deadline))
            count = sock.recv_into(view[received : received + _READ_BYTES])
            if not count:
                raise BadReply(f"closed after {received} bytes, {length - received} more expected")
            received += count
        self.keeps = self.keeps and len(begun) <= length

    def _read_framed(self, sock: socket.socket, deadline: float, begun: bytes) -> None:
        """Receives a body that comes in chunks or ends with the connection. `begun` are its bytes that came with the head."""
        self._feed(begun)
        while not self._complete:
            sock.settimeout(remaining(deadline))
            data = sock.recv(_READ_BYTES)
            if not data and "transfer-encoding" in self.headers:
                raise BadReply(f"closed after {len(self._chunks)} bytes, before the last chunk")
            if not data:
                break
            self._feed(data)
            if len(self._chunks) > MAX_REPLY_BYTES:
                raise ReplyTooLarge(self.status, f"a body of {len(self._chunks)} bytes so far")
        self.body = memoryview(self._chunks)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise BadReply(f"{error}: {data[:100]!r}") from error


def exchange(sock: socket.socket, head: bytes, buffers: Sequence[Buffer], deadline: float) -> HttpReply:
    """Sends one request on a connected socket and reads its reply.

    `deadline` is in time.monotonic() and holds for both together. Raises BadReply, OSError, and TimeoutError at the deadline.
    """
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server may have refused before all was sent
        for buffer in _joined((head, *buffers)):
            sock.settimeout(remaining(deadline))
            sock.sendall(buffer)
    rest = b""
    while True:
        reply = HttpReply()
        rest = reply.read(sock, deadline, rest)
        if reply.status >= 200:
            return reply


def request_head(target: RequestTarget, headers: Mapping[str, str], method: str = "POST") -> bytes:
    """Encodes the request line and the headers, with the blank line that ends them.

    Raises ValueError if a line break or space in a value would end the request line or a header too early.
    """
    lines = [f"{method} {target.path} HTTP/1.1", f"Host: {target.host}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if not target.path.isprintable() or " " in target.path or any("\r" in line or "\n" in line for line in lines):
        raise ValueError(f"a line break, or a blank in the target, in {lines}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class RequestTemplate:
    """The encoded request line and headers that all POSTs to one URL have in common."""

    def __init__(self, target: RequestTarget, headers: Mapping[str, str]) -> None:
        self.target = target
        self._head = request_head(target, fixed_headers(headers)).removesuffix(b"\r\n")

    def head(self, body_bytes: int, lines: bytes) -> bytes:
        """Returns the complete head of one request. `lines` are the encoded headers of this request, each with its line end."""
        return b"%b%bContent-Length: %d\r\n\r\n" % (self._head, lines, body_bytes)


def remaining(deadline: float) -> float:
    """Returns the seconds until `deadline` (time.monotonic()). Raises TimeoutError once the deadline has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _joined(buffers: Iterable[Buffer]) -> Iterator[Buffer]:
    """Joins neighbouring buffers of less than _JOIN_BELOW_BYTES, so that one system call sends them."""
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


class KeptConnection:
    """A connection to an origin. `sock` is None before `connect` and after `close`."""

    def __init__(self, origin: Origin, tls: PodTLS | None) -> None:
        self.origin = origin
        self.sock: socket.socket | None = None
        self._tls = tls

    def connect(self, timeout_seconds: float) -> None:
        """Opens the connection. Raises OSError, of which ssl.SSLError is a subclass."""
        address = (self.origin.host, self.origin.port or (443 if self.origin.secure else 80))
        sock = socket.create_connection(address, timeout_seconds)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not self.origin.secure:
                self.sock = sock
            elif self._tls is None:
                self.sock = _system_trust().wrap_socket(sock, server_hostname=self.origin.host)
            else:
                self.sock = self._tls.client().wrap_socket(sock, server_hostname=self._tls.name)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def is_dropped(self) -> bool:
        """Returns whether an idle connection cannot be reused: the server has closed it or sent unrequested bytes."""
        poll = select.poll()
        assert self.sock is not None
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))


@functools.cache
def _system_trust() -> ssl.SSLContext:
    return ssl.create_default_context()


@dataclass(slots=True, eq=False)
class _Host:
    """The connections of a pool to one origin."""

    idle: deque[tuple[float, KeptConnection]] = field(default_factory=deque)  # (idle since, it), most recently used last
    used: set[KeptConnection] = field(default_factory=set)
    waiting: int = 0  # threads that wait for a connection


class ConnectionPool:
    """Keeps at most `max_connections_per_host` connections to each origin. Idle ones stay open for IDLE_SECONDS.

    Thread-safe.
    """

    def __init__(self, max_connections_per_host: int, tls: PodTLS | None = None) -> None:
        self._max_connections = max_connections_per_host
        self._tls = tls
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._hosts: dict[Origin, _Host] = {}
        self._closed = False
        self._looking = False  # a timer is going to look for old connections

    def take(self, origin: Origin, wait_seconds: float) -> KeptConnection:
        """Returns an idle connection, or a new one that the caller must connect. The caller must give the connection back.

        If the limit is reached, waits up to `wait_seconds` for another thread to give one back; then raises NoFreeConnection.
        """
        with self._lock:
            host = self._hosts.get(origin)
            if host is None:
                host = self._hosts[origin] = _Host()
            if len(host.used) >= self._max_connections:
                self._wait(host, origin, wait_seconds)
            while host.idle:
                since, connection = host.idle.pop()
                if time.monotonic() - since < IDLE_SECONDS and not connection.is_dropped():
                    break
                connection.close()
            else:
                connection = KeptConnection(origin, self._tls)
            host.used.add(connection)
            return connection

    def give_back(self, connection: KeptConnection, *, keep: bool) -> None:
        """Returns a connection to the pool. If `keep`, it may be used for another request; otherwise it is closed."""
        with self._lock:
            host = self._hosts[connection.origin]
            host.used.discard(connection)
            if keep and connection.sock is not None and not self._closed:
                host.idle.append((time.monotonic(), connection))
            else:
                connection.close()
            if host.waiting:
                self._freed.notify_all()
            if not self._looking:
                self._look_later()

    def close(self) -> None:
        """Closes idle connections and breaks those in use, so that threads stop waiting for replies."""
        with self._lock:
            self._closed = True
            for host in self._hosts.values():
                for _, connection in host.idle:
                    connection.close()
                host.idle.clear()
                for sock in [connection.sock for connection in host.used]:
                    if sock is not None:
                        with contextlib.suppress(OSError):
                            sock.shutdown(socket.SHUT_RDWR)

    def _wait(self, host: _Host, origin: Origin, seconds: float) -> None:
        host.waiting += 1
        try:
            if not self._freed.wait_for(lambda: len(host.used) < self._max_connections, max(0.0, seconds)):
                raise NoFreeConnection(f"all {self._max_connections} connections to {origin.host} stayed in use")
        finally:
            host.waiting -= 1

    def _look_later(self) -> None:
        timer = threading.Timer(_LOOK_SECONDS, self._close_old)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # no thread can be started now
            timer.start()
            self._looking = True

    def _close_old(self) -> None:
        """Closes connections that were idle for IDLE_SECONDS.

        Forgets origins without connections, such as pods that have ended.
        """
        with self._lock:
            for origin, host in list(self._hosts.items()):
                while host.idle and host.idle[0][0] < time.monotonic() - IDLE_SECONDS:
                    host.idle.popleft()[1].close()
                if not (host.used or host.waiting or host.idle):
                    del self._hosts[origin]
            self._looking = False
            if self._hosts and not self._closed:
                self._look_later()


class Sender:
    """Sends HTTP requests, one attempt for each. Thread-safe."""

    def __init__(
        self,
        *,
        connect_timeout_seconds: float = 5.0,
        max_connections_per_host: int = 64,
        tls: PodTLS | None = None,
    ) -> None:
        """`tls` holds the settings of TLS between pods; https URLs may then lead to pods only.

        If `tls` is None, https uses the system's trust store and checks host names.
        """
        self._connect_timeout_seconds = connect_timeout_seconds
        self._pool = ConnectionPool(max_connections_per_host, tls)
        self._closed = False

    def send(self, url: str, headers: Mapping[str, str], buffers: Sequence[Buffer], timeout_seconds: float) -> HttpReply:
        """POSTs `buffers` as one body. The whole reply must come within `timeout_seconds`. Raises the errors of `deliver`."""
        length = {"Content-Length": str(sum(memoryview(buffer).nbytes for buffer in buffers))}
        target = RequestTarget.of(url)
        head = request_head(target, fixed_headers(headers) | length)
        return self.deliver(target, head, buffers, time.monotonic() + timeout_seconds)

    def get(self, url: str, headers: Mapping[str, str], timeout_seconds: float) -> HttpReply:
        """Sends a GET. The whole reply must come within `timeout_seconds`. Raises the errors of `deliver`."""
        target = RequestTarget.of(url)
        head = request_head(target, fixed_headers(headers), "GET")
        return self.deliver(target, head, (), time.monotonic() + timeout_seconds)

    def deliver(self, target: RequestTarget, head: bytes, buffers: Sequence[Buffer], deadline: float) -> HttpReply:
        """Sends a request whose head is already encoded, and returns its 2xx reply. `deadline` is in time.monotonic().

        If a function of Lamina refuses the request, raises the Problem that it replied with. Raises InfrastructureError for any
        other refusal, and another DeliveryError if no whole reply came.
        """
        url = target.url
        if self._closed:
            raise Unreachable(f"{url}: the sender is closed")
        try:
            connection = self._pool.take(target.origin, deadline - time.monotonic())
            keep = False
            try:
                if connection.sock is None:
                    self._connect(connection, url, deadline)
                assert connection.sock is not None
                reply = exchange(connection.sock, head, buffers, deadline)
                keep = reply.keeps
            finally:
                self._pool.give_back(connection, keep=keep)
        except NoFreeConnection as error:
            raise Unreachable(f"{url}: {error}") from error
        except TimeoutError as error:
            raise DeliveryTimeout(f"{url}: no complete reply in time") from error
        except ReplyTooLarge as error:
            raise InfrastructureError(error.status, url, str(error)) from error
        except (OSError, BadReply) as error:
            if is_refusal(error):
                raise Unreachable(f"{url}: no connection: {tls_problem(error)}") from error
            raise ConnectionBroken(f"{url}: the connection broke: {str(error) or type(error).__name__}") from error
        if not 200 <= reply.status < 300:
            raise _refusal(url, reply)
        return reply

    def close(self) -> None:
        """Closes idle connections and breaks those in use."""
        self._closed = True
        self._pool.close()

    def _connect(self, connection: KeptConnection, url: str, deadline: float) -> None:
        timeout = min(self._connect_timeout_seconds, remaining(deadline))
        try:
            connection.connect(timeout)
        except OSError as error:
            raise Unreachable(f"{url}: no connection: {tls_problem(error)}") from error


def fixed_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Returns the headers of a request: the caller's `headers` and those that every request has.

    Leaves out headers of the caller that only this module or Knative may set.
    """
    own = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    for name, value in headers.items():
        if name.lower() not in _OWN_HEADERS and not name.lower().startswith(_KNATIVE_PREFIXES):
            own[name] = value
    return own


def _refusal(url: str, reply: HttpReply) -> Exception:
    if reply.headers.get("content-type", "").startswith(PROBLEM_CONTENT_TYPE):
        problem = problem_from_document(bytes(reply.body))
        if problem is not None:
            problem.add_note(f"answered by {url}")
            return problem
    excerpt = " ".join(bytes(reply.body[:2000]).decode("utf-8", "replace").split())[:_EXCERPT_LENGTH]
    return InfrastructureError(reply.status, url, excerpt or "(no text)")
