"""A request as WSGI's environment (PEP 3333): its head as strings, its body as a stream over the memory it came into."""

import io
import sys
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

from functions.hosting.limits import SMALL_BODY_BYTES, Body

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from _typeshed.wsgi import WSGIEnvironment

REFUSED: Final = "lamina.refused"
"""The Problem that ended the request before its body was in; whoever answers it raises that."""
ADMITTED_BYTES: Final = "lamina.admitted_bytes"
"""How large a body the application's admission allowed for this head."""
MANAGEMENT: Final = "lamina.management"
"""Whether the request came by the port that clients do not reach."""
CLIENT_GONE: Final = "lamina.client_gone"
"""() -> bool: whether the client has closed its connection, so that nobody awaits the answer."""
ARRIVED: Final = "lamina.arrived"
"""When the request's headers were in, in time.monotonic(): before its body was read, and before a thread took it."""


class BodyStream(io.RawIOBase):
    """`wsgi.input`. Whoever reads all of a large body at once gets the very buffer, and this forgets it."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._position = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        left = len(self._body) - self._position
        if self._position == 0 and left > SMALL_BODY_BYTES and (size is None or size < 0 or size >= left):
            whole, self._body = self._body, Body()
            return whole  # type: ignore[return-value]  # It is bytes to whoever reads it, and is not copied.
        count = left if size is None or size < 0 else min(size, left)
        piece = bytes(memoryview(self._body)[self._position : self._position + count])
        self._move(count)
        return piece

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._body) - self._position)
        view[:count] = memoryview(self._body)[self._position : self._position + count]
        self._move(count)
        return count

    def _move(self, count: int) -> None:
        self._position += count
        if self._position == len(self._body):
            self._body, self._position = Body(), 0


def wsgi_environ(
    method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]], base: "WSGIEnvironment"
) -> "WSGIEnvironment":
    """`base`: of the server and the connection. The body's stream comes later, under `wsgi.input`."""
    path, _, query = _target(url).partition(b"?")
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
        environ[key] = f"{environ[key]},{text}" if key in environ else text
    return environ


def base_environ(host: str, port: int, client: tuple[str, int]) -> "WSGIEnvironment":
    return {
        "SCRIPT_NAME": "",
        "SERVER_NAME": host,
        "SERVER_PORT": str(port),
        "REMOTE_ADDR": client[0],
        "REMOTE_PORT": str(client[1]),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }


def _target(url: bytes) -> bytes:
    """Path and query, also of the absolute form that clients send to proxies (RFC 9112, section 3.2.2)."""
    if url.startswith(b"/"):
        return url
    scheme, found, rest = url.partition(b"://")
    if not found or b"/" in scheme:
        return b"/" + url
    _, slash, path = rest.partition(b"/")
    return slash + path or b"/"


@lru_cache(maxsize=512)
def _key(name: bytes) -> str | None:
    """None for a name with an underscore, which would be taken for another's (`ce_id`, `ce-id`)."""
    if b"_" in name:
        return None
    key = name.decode("latin-1").upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
