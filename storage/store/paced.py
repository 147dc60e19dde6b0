"""HTTP connections to a store that cannot take for ever: it may be slow, it may not stall, and it may not drip.

A socket's timeout alone is no bound: one byte before each of them, and a part of 16 MiB takes years.
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
LEAST_BYTES_PER_SECOND: Final = 16 * 2**10
"""Of one connection. A hundred pods with four each still get it out of a link of 50 Mbit/s."""
_BLOCK_BYTES: Final = 2**16


class TooSlow(TimeoutError):
    """Bytes come, or are taken, but so few that it would never end. Another attempt may help."""


class Pace:
    """Of one request: seconds of waiting that are still allowed. Waiting takes them away, bytes bring them back."""

    def __init__(self, stall_seconds: float) -> None:
        self._most = self._left = 2 * stall_seconds

    def waited(self, seconds: float, count: int) -> None:
        """For `count` bytes. Raises TooSlow."""
        self._left = min(self._most, self._left - seconds + count / LEAST_BYTES_PER_SECOND)
        if self._left < 0:
            raise TooSlow(f"timed out: less than {LEAST_BYTES_PER_SECOND} bytes per second")


def connect(endpoint_url: str, stall_seconds: float, tls: ssl.SSLContext | None = None) -> HTTPConnection:
    """A connection on which no byte for `stall_seconds` is an error, and so is a lower rate. Raises OSError."""
    parts = urlsplit(endpoint_url)
    pace = partial(Pace, stall_seconds)
    connection: HTTPConnection
    if parts.scheme == "https":
        connection = _SecureConnection(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS, context=tls)
    else:
        connection = _Connection(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)
    cast("_Paced", connection).pace = pace
    # http.client calls it with the socket: typeshed knows a class only.
    connection.response_class = cast("type[HTTPResponse]", partial(_Response, pace))
    connection.blocksize = _BLOCK_BYTES
    connection.connect()
    connection.sock.settimeout(stall_seconds)
    return connection


class _Paced:
    """Of what is sent. `sendall` has one timeout for all that it is given, so it is given little."""

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


class _Connection(_Paced, HTTPConnection):
    pass


class _SecureConnection(_Paced, HTTPSConnection):
    pass


class _Response(HTTPResponse):
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
