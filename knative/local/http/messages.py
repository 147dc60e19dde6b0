"""HTTP/1.1 heads as bytes, and what a proxy must not pass on (RFC 9110 section 7.6.1)."""

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
        # Answered by the proxy itself, which reads the body at once.
        b"expect",
        # Knative's own marks: a client that sends them must not escape the counting.
        b"k-proxy-request",
        b"k-kubelet-probe",
    }
)
_FORWARDED_FOR: Final = b"x-forwarded-for"
CHUNKED: Final = (b"Transfer-Encoding", b"chunked")
LAST_CHUNK: Final = b"0\r\n\r\n"


class HttpError(Exception):
    """An answer that the platform gives itself. `status` as in HTTP, the text says why."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def forwarded(headers: Headers) -> Headers:
    """Without what is meant for one connection only. Names are compared in lower case."""
    named = {name.strip().lower() for key, value in headers if key.lower() == b"connection" for name in value.split(b",")}
    drop = _HOP_BY_HOP | named if named else _HOP_BY_HOP
    return [(key, value) for key, value in headers if key.lower() not in drop]


def with_forwarded_for(headers: Headers, seen_from: list[bytes]) -> Headers:
    """X-Forwarded-For as each proxy on the way adds to its end, whatever the client wrote into it itself."""
    said = [value for key, value in headers if key.lower() == _FORWARDED_FOR]
    rest = [header for header in headers if header[0].lower() != _FORWARDED_FOR] if said else headers
    return [*rest, (b"X-Forwarded-For", b", ".join([*said, *seen_from]))]


def find(headers: Headers, wanted: bytes) -> bytes | None:
    """The first value of a header; `wanted` in lower case."""
    return next((value for key, value in headers if key.lower() == wanted), None)


def request_head(method: bytes, target: bytes, headers: Headers) -> bytes:
    return _head(b"%b %b HTTP/1.1" % (method, target), headers)


def response_head(status: int, reason: bytes, headers: Headers) -> bytes:
    return _head(b"HTTP/1.1 %d %b" % (status, reason), headers)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def has_body(method: bytes, status: int) -> bool:
    """Whether a response may carry one (RFC 9110 section 6.4.1)."""
    return method != b"HEAD" and status >= 200 and status not in (204, 304)


def _head(first_line: bytes, headers: Headers) -> bytes:
    lines = [first_line, *(b"%b: %b" % header for header in headers), b"", b""]
    return b"\r\n".join(lines)
