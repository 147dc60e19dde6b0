"""Reads objects in a pod: signed GETs whose bytes go straight into the caller's memory.

boto3 would cost a pod 0.3 s of import. http.client is used rather than urllib3, because only its `readinto` avoids a copy.
Retries, detection of stalls and the mapping of errors are here; callers verify checksums.
"""

import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from queue import Empty, LifoQueue
from types import TracebackType
from typing import Final, Self

import tenacity

from storage.errors import ObjectAltered, StoreUnreachable, UnexpectedAnswer
from storage.store.paced import connect
from storage.store.refusals import error_code, is_transient, refusal
from storage.store.settings import StoreSettings
from storage.store.signing import object_path, signed_headers
from storage.store.web_identity import keys_of

_log = logging.getLogger(__name__)

_READ_BYTES: Final = 2**20
_ERROR_BODY_BYTES: Final = 4096
_SMALL_OBJECT_BYTES: Final = 2**26
_PROGRESS_BYTES: Final = 2**16  # that must arrive to restart the time for retries; else a store could drip bytes for ever
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object in a listing of a bucket."""

    key: str
    bytes: int
    modified: datetime  # with a time zone


class _TransientAnswer(Exception):
    """The store answered with a 5xx, 408 or 429. The request is repeated until the time for retries ends."""


class ObjectReader:
    """Reads objects of one bucket. Thread-safe. A context manager.

    Connections are kept and reused until the reader is closed.
    """

    def __init__(self, settings: StoreSettings, *, stall_seconds: float = 10.0, retry_seconds: float = 60.0) -> None:
        """Creates a reader; connections are opened when they are needed.

        stall_seconds: an attempt fails after this time without a byte, or if it is slower than `paced.LEAST_BYTES_PER_SECOND`.
        retry_seconds: failed attempts are repeated, with back-off, until this time has passed since the last progress.
        """
        self.settings = settings
        self._keyed = keys_of(settings)
        self._stall_seconds = stall_seconds
        self._retry_seconds = retry_seconds
        self._idle: LifoQueue[HTTPConnection] = LifoQueue()
        self._closed = threading.Event()

    def get(self, key: str, *, max_bytes: int = _SMALL_OBJECT_BYTES) -> bytes:
        """Reads a whole object of at most `max_bytes`. Raises a StorageError subclass that names endpoint, bucket and key."""
        path = object_path(self.settings, key)
        for attempt in self._attempts(key):
            with attempt, self._exchange("GET", key, signed_headers(self._keyed(), "GET", path)) as response:
                length = response.length
                if length is None or length > max_bytes:
                    raise UnexpectedAnswer(f"{key!r} in {self.settings.place} has {length} bytes, at most {max_bytes} are read")
                return response.read()
        raise AssertionError("tenacity either returns or raises")

    def read_range_into(
        self,
        key: str,
        start: int,
        view: memoryview,
        *,
        total_bytes: int | None = None,
        on_bytes: Callable[[memoryview], object] | None = None,
    ) -> None:
        """Fills `view` (bytes, writable) with the object's bytes from `start` on.

        on_bytes: called with every piece, in order, as soon as it has arrived. After a failure the next attempt continues where
        the last one stopped. Raises ObjectAltered if the object is not `total_bytes` long, and otherwise a StorageError
        subclass that names endpoint, bucket and key.
        """
        filled = 0
        clock = _RetryClock()
        for attempt in self._attempts(key, clock):
            with attempt:
                for count in self._read_into(key, start + filled, view[filled:], total_bytes):
                    if on_bytes is not None:
                        on_bytes(view[filled : filled + count])
                    filled += count
                    clock.received(count)

    def close(self) -> None:
        """Closes idle connections now and busy ones after their answers. Also ends retries that are running."""
        self._closed.set()
        with suppress(Empty):
            while True:
                self._idle.get_nowait().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read_into(self, key: str, start: int, view: memoryview, total_bytes: int | None) -> Iterator[int]:
        """Makes one attempt to fill `view`. Yields the length of each piece when it has arrived."""
        headers = signed_headers(self._keyed(), "GET", object_path(self.settings, key))
        headers["range"] = f"bytes={start}-{start + len(view) - 1}"
        with self._exchange("GET", key, headers) as response:
            self._check_range(key, response, start, len(view), total_bytes)
            filled = 0
            while filled < len(view):
                count = response.readinto(view[filled : filled + _READ_BYTES])
                if not count:
                    raise IncompleteRead(b"", len(view) - filled)
                filled += count
                yield count

    def _check_range(self, key: str, response: HTTPResponse, start: int, length: int, total_bytes: int | None) -> None:
        # rclone answers a ranged GET with 200; its Content-Range is right. So the header is trusted, not the status.
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        first, last, total = map(int, found.groups()) if found else (0, (response.length or 0) - 1, response.length or 0)
        if total_bytes is not None and total != total_bytes:
            raise ObjectAltered(
                f"{key!r} in {self.settings.place} has {total} bytes, {total_bytes} were published; "
                "publish the model again (push --afresh)"
            )
        if (first, last) != (start, start + length - 1):
            raise UnexpectedAnswer(
                f"{self.settings.place} was asked for {start} to {start + length - 1} of {key!r} and sent {first} to {last}"
            )

    def _attempts(self, key: str, clock: "_RetryClock | None" = None) -> tenacity.Retrying:
        since = clock or _RetryClock()

        def give_up(state: tenacity.RetryCallState) -> None:
            cause = state.outcome.exception() if state.outcome else None
            raise StoreUnreachable(
                f"{self.settings.place} did not deliver {key!r} in {state.attempt_number} attempts over "
                f"{state.seconds_since_start or 0:.0f} s; the last one: {_described(cause)}. Is it running and reachable?"
            ) from cause

        def log(state: tenacity.RetryCallState) -> None:
            cause = state.outcome.exception() if state.outcome else None
            _log.warning("%r from %s: %s; trying again", key, self.settings.place, _described(cause))

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((OSError, HTTPException, _TransientAnswer)),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=2),
            stop=lambda _: self._closed.is_set() or time.monotonic() - since.progress_at >= self._retry_seconds,
            sleep=tenacity.sleep_using_event(self._closed),
            before_sleep=log,
            retry_error_callback=give_up,
        )

    @contextmanager
    def _exchange(
        self, method: str, key: str, headers: dict[str, str], body: bytes = b"", query: str = ""
    ) -> Iterator[HTTPResponse]:
        """Sends a request and yields the response if it is a 200, 204 or 206. Raises the matching exception for any other.

        The connection is kept only if the body was read to its end and the server keeps it too.
        """
        connection = self._connection()
        try:
            path = object_path(self.settings, key) + (f"?{query}" if query else "")
            connection.request(method, path, body or None, headers)
            with connection.getresponse() as response:
                if response.status not in (200, 204, 206):
                    code = error_code(response.read(_ERROR_BODY_BYTES))
                    if is_transient(response.status):
                        raise _TransientAnswer(f"HTTP {response.status} {code}".rstrip())
                    raise refusal(self.settings, key, response.status, code)
                yield response
                if not response.isclosed() and response.read(1):
                    raise UnexpectedAnswer(f"{self.settings.place} sends more of {key!r} than was asked for")
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
            return
        self._idle.put(connection)
        if self._closed.is_set():
            self.close()

    def _connection(self) -> HTTPConnection:
        try:
            return self._idle.get_nowait()
        except Empty:
            pass
        try:
            return connect(self.settings.endpoint_url, self._stall_seconds)
        except ssl.SSLCertVerificationError as error:
            raise StoreUnreachable(
                f"{self.settings.place} shows a certificate that is not trusted here ({error}); set SSL_CERT_FILE"
            ) from error


class _RetryClock:
    """The time of a read's last progress. The time for retries counts from it.

    So a long read that breaks at its end gets as many retries as one that never began.
    """

    def __init__(self) -> None:
        self.progress_at = time.monotonic()
        self._bytes = 0

    def received(self, count: int) -> None:
        self._bytes += count
        if self._bytes >= _PROGRESS_BYTES:
            self.progress_at, self._bytes = time.monotonic(), 0


def _described(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if error is not None and not isinstance(error, _TransientAnswer) else str(error)
