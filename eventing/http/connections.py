"""Kept-alive HTTP/1.1 connections by host, for many threads.

Not urllib3's: it takes more CPU for each small request, and holds the sending of a body to the limit for connecting.
"""

import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from eventing.http.exchange import HttpReply, exchange
from eventing.wire.cloud_event import Buffer

IDLE_SECONDS: Final = 15.0
"""A connection unused for longer is not used again, and closed. Shorter than any keep-alive limit of what listens behind it."""
_LOOK_SECONDS: Final = 1.0
"""Between looks at what has been idle for too long, where the pool is in use."""


class NoFreeConnection(Exception):
    """As many connections to the host as may be open are in use."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a connection leads to."""

    secure: bool
    host: str
    port: int | None

    @classmethod
    def of(cls, url: str) -> "Origin":
        """Raises ValueError where `url` is no http(s) URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http or https URL")
        return cls(parts.scheme == "https", parts.hostname, parts.port)


class Connection:
    """To an origin, once `connect` has been called. `sock` None: not connected, or not any more."""

    def __init__(self, origin: Origin, tls: ssl.SSLContext | None) -> None:
        self._origin = origin
        self._tls = tls
        self.sock: socket.socket | None = None

    def connect(self, timeout_seconds: float) -> None:
        """Raises OSError, ssl.SSLError among them."""
        address = (self._origin.host, self._origin.port or (443 if self._origin.secure else 80))
        sock = socket.create_connection(address, timeout_seconds)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = sock if self._tls is None else self._tls.wrap_socket(sock, server_hostname=self._origin.host)
        except BaseException:
            sock.close()
            raise

    def exchange(self, head: bytes, buffers: Sequence[Buffer], deadline: float) -> HttpReply:
        """One request and its reply; closes the connection where the reply says so. Raises as `http_exchange` says."""
        assert self.sock is not None
        reply = exchange(self.sock, head, buffers, deadline)
        if not reply.keeps:
            self.close()
        return reply

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def shut(self) -> None:
        """From another thread: whoever waits for a reply is told that the connection broke."""
        sock = self.sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@dataclass(slots=True, eq=False)
class _Host:
    slots: threading.BoundedSemaphore
    idle: deque[tuple[float, Connection]] = field(default_factory=deque)
    """When it became idle, and the connection; the last one used is last."""
    users: int = 0
    used: set[Connection] = field(default_factory=set)


class ConnectionPool:
    """At most `max_connections_per_host` connections to each host are open; idle ones are kept for IDLE_SECONDS."""

    def __init__(self, max_connections_per_host: int, tls: ssl.SSLContext | None = None) -> None:
        self._max_connections = max_connections_per_host
        self._tls = tls
        self._lock = threading.Lock()
        self._hosts: dict[Origin, _Host] = {}
        self._closed = False
        self._looked_at = time.monotonic()

    @contextmanager
    def connection(self, origin: Origin, wait_seconds: float) -> Iterator[Connection]:
        """A connection for one request: connected if an idle one was left, else new and not connected yet.

        It is kept if it is still open when the block ends, and closed if the block raises. Raises NoFreeConnection.
        """
        host = self._enter(origin)
        try:
            if not host.slots.acquire(timeout=max(0.0, wait_seconds)):
                raise NoFreeConnection(f"all {self._max_connections} connections to {origin.host} stayed in use")
            try:
                connection = self._take(host, origin)
                try:
                    yield connection
                except BaseException:
                    self._drop(host, connection)
                    raise
                self._keep(host, connection)
            finally:
                host.slots.release()
        finally:
            with self._lock:
                host.users -= 1
                self._close_old()

    def close(self) -> None:
        """Closes the idle connections, and breaks those in use, so that nobody waits for a reply any more."""
        with self._lock:
            self._closed = True
            for host in self._hosts.values():
                _close_all(host)
                for connection in host.used:
                    connection.shut()

    def _enter(self, origin: Origin) -> _Host:
        with self._lock:
            host = self._hosts.get(origin)
            if host is None:
                host = self._hosts[origin] = _Host(threading.BoundedSemaphore(self._max_connections))
            host.users += 1
            return host

    def _close_old(self) -> None:
        """What was needed at once, and is not any more: of those below the last used nobody takes one. And pods come and go."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = now
        for origin, host in list(self._hosts.items()):
            while host.idle and host.idle[0][0] < now - IDLE_SECONDS:
                host.idle.popleft()[1].close()
            if not host.users and not host.idle:
                del self._hosts[origin]

    def _take(self, host: _Host, origin: Origin) -> Connection:
        with self._lock:
            connection = self._idle(host) or self._new(origin)
            host.used.add(connection)
            return connection

    def _idle(self, host: _Host) -> Connection | None:
        while host.idle:
            since, connection = host.idle.pop()
            if time.monotonic() - since < IDLE_SECONDS and not _is_dropped(connection):
                return connection
            connection.close()
        return None

    def _new(self, origin: Origin) -> Connection:
        if origin.secure:
            self._tls = self._tls or ssl.create_default_context()
        return Connection(origin, self._tls if origin.secure else None)

    def _drop(self, host: _Host, connection: Connection) -> None:
        with self._lock:
            host.used.discard(connection)
            connection.close()

    def _keep(self, host: _Host, connection: Connection) -> None:
        with self._lock:
            host.used.discard(connection)
            if self._closed:
                connection.close()
            elif connection.sock is not None:  # else the reply said `Connection: close`
                host.idle.append((time.monotonic(), connection))


def _close_all(host: _Host) -> None:
    for _, connection in host.idle:
        connection.close()
    host.idle.clear()


def _is_dropped(connection: Connection) -> bool:
    """An idle connection that is readable has been closed by the other side, or has said what nobody asked for."""
    poll = select.poll()
    assert connection.sock is not None
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))
