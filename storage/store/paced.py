"""HTTP connections whose requests fail if the store stalls or is slower than LEAST_BYTES_PER_SECOND.

A socket's timeout alone is not enough: with one byte before each timeout, a part of 16 MiB takes years.
"""

import io
import ssl
import time
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, Final, cast
from urllib.parse import urlsplit

CONNECT_SECONDS: Final = 5.0
LEAST_BYTES_PER_SECOND: Final = 16 * 2**10  # per connection: 100 pods with four each still get it from 50 Mbit/s
_BLOCK_BYTES: Final = 2**16


class TooSlow(TimeoutError):
    """A transfer is running, but below LEAST_BYTES_PER_SECOND. Another attempt may help."""


class Pace:
    """The time that a request may still wait.

    Waiting uses it up. Transferred bytes restore it, up to 2 * `stall_seconds`.
    """

    def __init__(self, stall_seconds: float) -> None:
        self._max_seconds = self._seconds_left = 2 * stall_seconds

    def waited(self, seconds: float, count: int) -> None:
        """Accounts for `seconds` in which `count` bytes were transferred. Raises TooSlow if no time is left."""
        self._seconds_left = min(self._max_seconds, self._seconds_left - seconds + count / LEAST_BYTES_PER_SECOND)
        if self._seconds_left < 0:
            raise TooSlow(f"timed out: less than {LEAST_BYTES_PER_SECOND} bytes per second")


def connect(endpoint_url: str, stall_seconds: float, tls: ssl.SSLContext | None = None) -> HTTPConnection:
    """Opens a connection whose requests fail after `stall_seconds` without a byte, or below LEAST_BYTES_PER_SECOND.

    If `tls` is None, http.client's default is used. Raises OSError.
    """
    parts = urlsplit(endpoint_url)
    pace = partial(Pace, stall_seconds)
    connection: HTTPConnection
    if parts.scheme == "https":
        connection = _PacedHTTPS(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS, context=tls)
    else:
        connection = _PacedHTTP(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)
    cast("_PacedSend", connection).pace = pace
    # http.client calls it with the socket: typeshed knows a class only.
    connection.response_class = cast("type[HTTPResponse]", partial(_PacedResponse, pace))
    connection.blocksize = _BLOCK_BYTES
    connection.connect()
    connection.sock.settimeout(stall_seconds)
    return connection


class _PacedSend:
    """Mixin for HTTPConnection that sends in small blocks and fails with TooSlow if they take too long.

    `sendall` alone has one timeout for all the bytes that it is given. `pace` makes the time limit of each request.
    """

    pace: Callable[[], Pace]

    def request(self, *arguments: Any, **named: Any) -> None:
        self._sending = self.pace()
        super().request(*arguments, **named)  # type: ignore[misc]

    def send(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            began = time.monotonic()
            super().send(block)  # type: ignore[misc]
            self._sending.waited(time.monotonic() - began, len(block))


class _PacedHTTP(_PacedSend, HTTPConnection):
    pass


class _PacedHTTPS(_PacedSend, HTTPSConnection):
    pass


class _PacedResponse(HTTPResponse):
    def __init__(self, pace: Callable[[], Pace], *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.fp = io.BufferedReader(_PacedReads(self.fp.detach(), pace()))


class _PacedReads(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, pace: Pace) -> None:
        self._raw = raw
        self._pace = pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        began = time.monotonic()
        count: int = self._raw.readinto(buffer) or 0
        self._pace.waited(time.monotonic() - began, count)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
