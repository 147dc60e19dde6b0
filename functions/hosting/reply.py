"""A WSGI application's answer onto a socket (PEP 3333, HTTP/1.1): in chunks as they come where no length is known."""

import logging
import socket
import time
from collections.abc import Iterable
from email.utils import formatdate
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from functions.hosting.limits import Limits

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

_log = logging.getLogger(__name__)

_JOIN_BELOW_BYTES: Final = 16 * 1024
"""Head and body are sent together up to here: copying is cheaper than one more system call and packet."""
_FAILED: Final = b"the function failed; its log has the traceback\n"


class Reply:
    """One reply. `keeps`: whether the client may use the connection again; False once something went wrong."""

    def __init__(self, sock: socket.socket, environ: "WSGIEnvironment", limits: Limits, *, keeps: bool) -> None:
        self.keeps = keeps
        self._sock = sock
        self._limits = limits
        self._method = environ["REQUEST_METHOD"]
        self._speaks_1_1 = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
        self._status = ""
        self._headers: list[tuple[str, str]] = []
        self._head_is_out = False
        self._chunked = False
        self._has_body = True
        self._left: int | None = None
        """Bytes of the body still to come, where its length was said."""

    def answer(self, application: "WSGIApplication", environ: "WSGIEnvironment") -> None:
        """Runs the application and sends what it answers. Raises OSError where the client does not take it."""
        pieces: Iterable[bytes] = ()
        try:
            pieces = application(environ, self.start_response)
            if isinstance(pieces, list | tuple) and not self._says_length():
                self._headers.append(("Content-Length", str(sum(map(len, pieces)))))
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
        """Raises OSError, TimeoutError where it is not taken at the slowest rate."""
        if not data:
            return
        head = b"" if self._head_is_out else self._head()
        if not self._has_body:
            self._send(head)
            return
        if self._left is not None:
            if len(data) > self._left:
                raise ValueError(f"{len(data)} bytes, and {self._left} of the length that was said are left")
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
            raise ValueError(f"the body ended {self._left} bytes before the length that was said")

    def _fail(self) -> None:
        """An answer that has begun can only be broken off."""
        self.keeps = False
        if not self._head_is_out:
            self._status = "500 Internal Server Error"
            self._headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(_FAILED)))]
            self.write(_FAILED)

    def _says_length(self) -> bool:
        return any(name.lower() == "content-length" for name, _ in self._headers)

    def _head(self) -> bytes:
        """Decides how the body is framed (RFC 9112, section 6.3)."""
        self._head_is_out = True
        bodiless = self._status[:1] == "1" or self._status[:3] in ("204", "304")
        self._has_body = not bodiless and self._method != "HEAD"
        lines = [f"HTTP/1.1 {self._status}", f"Date: {_date(int(time.time()))}"]
        said = None
        for name, value in self._headers:
            if "\n" in value or "\r" in value:
                raise ValueError(f"a line break in the header {name}")
            if name.lower() == "content-length":
                said = int(value)
            lines.append(f"{name}: {value}")
        if said is None and not bodiless:
            self._chunked = self._speaks_1_1 and self._has_body
            self.keeps = self.keeps and self._speaks_1_1
            if self._speaks_1_1:
                lines.append("Transfer-Encoding: chunked")
        self._left = said if self._has_body else None
        if not self.keeps:
            lines.append("Connection: close")
        elif not self._speaks_1_1:
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def _send(self, data: bytes) -> None:
        if data:
            self._sock.settimeout(self._limits.transfer_seconds + len(data) / self._limits.slowest_bytes_per_second)
            self._sock.sendall(data)


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
