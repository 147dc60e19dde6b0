"""Writes HTTP/1.1 heads as bytes, and drops the headers that a proxy must not forward (RFC 9110 section 7.6.1)."""

from http import HTTPStatus
from typing import Final

Headers = list[tuple[bytes, bytes]]

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        # The proxy itself answers it, because it reads the body at once.
        b"expect",
        # The activator's names of a revision (RevisionHeaders in knative/serving pkg/activator/activator.go).
        b"knative-serving-revision",
        b"knative-serving-namespace",
    }
)
_FORWARDED_FOR: Final = b"x-forwarded-for"
CHUNKED: Final = (b"Transfer-Encoding", b"chunked")
LAST_CHUNK: Final = b"0\r\n\r\n"


class HttpError(Exception):
    """An error that the server sends to the client: `status`, and the message as body."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def forwarded(headers: Headers) -> Headers:
    """The headers that a proxy passes on: without hop-by-hop headers and those that name a revision, in any case."""
    named = {name.strip().lower() for key, value in headers if key.lower() == b"connection" for name in value.split(b",")}
    drop = _HOP_BY_HOP | named if named else _HOP_BY_HOP
    return [(key, value) for key, value in headers if key.lower() not in drop]


def with_forwarded_for(headers: Headers, peers: list[bytes]) -> Headers:
    """Adds `peers`, the addresses that each proxy saw, to X-Forwarded-For, after the entries that the client sent."""
    said = [value for key, value in headers if key.lower() == _FORWARDED_FOR]
    rest = [header for header in headers if header[0].lower() != _FORWARDED_FOR] if said else headers
    return [*rest, (b"X-Forwarded-For", b", ".join([*said, *peers]))]


def find(headers: Headers, wanted: bytes) -> bytes | None:
    """The value of the first header with this name, or None. `wanted` must be in lower case."""
    return next((value for key, value in headers if key.lower() == wanted), None)


def head(first_line: bytes, headers: Headers) -> bytes:
    return b"\r\n".join([first_line, *(b"%b: %b" % header for header in headers), b"", b""])


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def has_body(method: bytes, status: int) -> bool:
    """Whether the response to a request with this method may have a body (RFC 9110 section 6.4.1)."""
    return method != b"HEAD" and status >= 200 and status not in (204, 304)
