"""Raw HTTP/1.1 requests, and what each must get, with the section of the RFC that says so.

RFC 9112 is HTTP/1.1's syntax and framing, RFC 9110 HTTP's meaning. Both servers, of functions and of knative/local, are held to
the table, so neither reads a request as something that the other did not read.
"""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPResponse
from itertools import chain
from typing import IO, Any, Final, cast

from tests.support.functions.server import ENOUGH

H: Final = b"Host: a\r\n"
CHUNKED: Final = b"Transfer-Encoding: chunked\r\n"
H2C: Final = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAA\r\n"
KEPT, CLOSED, EITHER = "kept", "closed", "either"


@dataclass(frozen=True)
class Case:
    """Bytes that are sent on a fresh connection, and the replies that must come.

    A served request is answered with what the server read: method, target, Host and body. A refused one has a status only.
    """

    section: str  # of the RFC
    sent: bytes
    replies: tuple[int | bytes, ...]  # the status of a refusal, or the text of an answer with 200
    after: str  # whether the connection serves one more request: KEPT, CLOSED or EITHER
    proxied: bool = True  # knative/local must do the same; it does not serve requests that come before the last answer

    def __str__(self) -> str:
        return f"{self.section} {self.sent[:70]!r}"


def served(section: str, sent: bytes, *texts: bytes, after: str = KEPT, proxied: bool = True) -> Case:
    return Case(section, sent, texts, after, proxied)


def refused(section: str, sent: bytes, status: int = 400, *, proxied: bool = True) -> Case:
    return Case(section, sent, (status,), CLOSED, proxied)


def _get(line: bytes, headers: bytes = H) -> bytes:
    return line + b"\r\n" + headers + b"\r\n"


def _post(headers: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    return b"POST / HTTP/" + version + b"\r\n" + H + headers + b"\r\n" + body


def _chunks(body: bytes) -> bytes:
    return _post(CHUNKED, body)


def _targets() -> Iterator[Case]:
    for target, read in (
        (b"/", b"/"), (b"/a/b", b"/a/b"), (b"/a?b=c", b"/a?b=c"), (b"/?", b"/"), (b"/a?b?c/d", b"/a?b?c/d"),
        (b"//a/b", b"//a/b"), (b"/a//b/../c", b"/a//b/../c"), (b"/a;b=c:d@e!$&'()*+,=~", b"/a;b=c:d@e!$&'()*+,=~"),
        (b"/%61%20b", b"/a b"), (b"/a?%61%20b", b"/a?%61%20b"), (b"/http://b/c", b"/http://b/c"), (b"/*", b"/*"),
    ):  # fmt: skip
        yield served("9112 3.2.1", _get(b"GET " + target + b" HTTP/1.1"), b"GET " + read + b" a ")
    for target, read in (
        (b"http://b/", b"/ b"), (b"http://b", b"/ b"), (b"http://b?c", b"/?c b"), (b"http://b/c?d=e", b"/c?d=e b"),
        (b"HTTP://B:80/c", b"/c B:80"), (b"https://b:443/", b"/ b:443"), (b"http://[::1]:8080/c", b"/c [::1]:8080"),
        (b"http://b:/c", b"/c b:"),
    ):  # fmt: skip
        yield served("9112 3.2.2", _get(b"GET " + target + b" HTTP/1.1"), b"GET " + read + b" ")
    yield refused("9112 3.2", b"GET http://b/ HTTP/1.1\r\n\r\n")  # Host is demanded with this form as well
    yield served("9112 3.2.4", _get(b"OPTIONS * HTTP/1.1"), b"OPTIONS * a ")
    yield served("9112 3.2.4", _get(b"OPTIONS http://b HTTP/1.1"), b"OPTIONS * b ")
    for target in (b"*", b"*/a", b"a", b"a/b", b"?a", b"b:80", b"http:", b"http:/b", b"http://", b"http:///a", b"http://?a"):
        yield refused("9112 3.2", _get(b"GET " + target + b" HTTP/1.1"))
    for target in (b"/a#b", b"http://b/#c", b"http://b#c", b"/a?b#c", b"#a", b"*#a"):
        yield refused("9112 3.2", _get(b"GET " + target + b" HTTP/1.1"))
    for target in (b"http://u@b/", b"http://u:p@b/", b"ftp://b/", b"javascript:a", b"http://b c/"):
        yield refused("9110 4.2.4", _get(b"GET " + target + b" HTTP/1.1"))
    yield refused("9110 9.3.6", _get(b"CONNECT b:80 HTTP/1.1"), 501)
    yield refused("9110 9.3.6", b"CONNECT b:80 HTTP/1.1\r\nHost: b:80\r\n\r\n\x16\x03\x01\x02", 501)
    yield refused("9112 3.2.3", _get(b"POST b:80 HTTP/1.1", H + b"Content-Length: 0\r\n"))


def _hosts() -> Iterator[Case]:
    for host in (
        b"b", b"b:8080", b"b.example.", b"127.0.0.1:80", b"[::1]", b"[::1]:80", b"[fe80::1%25eth0]", b"a_b",
        b"xn--bcher-kva.example",
    ):  # fmt: skip
        yield served("9110 7.2", _get(b"GET / HTTP/1.1", b"Host: " + host + b"\r\n"), b"GET / " + host + b" ")
    yield served("9110 7.2", _get(b"GET / HTTP/1.1", b"hOsT:b\r\n"), b"GET / b ")
    yield served("9112 5", _get(b"GET / HTTP/1.1", b"Host: \t b \t\r\n"), b"GET / b ")
    yield refused("9112 3.2", b"GET / HTTP/1.1\r\n\r\n")
    yield refused("9112 3.2", b"GET / HTTP/1.1\r\nX-Host: a\r\n\r\n")
    yield refused("9112 3.2", _get(b"GET / HTTP/1.1", H + H))
    yield refused("9112 3.2", _get(b"GET / HTTP/1.1", H + b"Host: b\r\n"))
    yield refused("9112 3.2", _get(b"GET / HTTP/1.1", H + b"X: y\r\nhost: b\r\n"))
    yield refused("9112 3.2", _get(b"GET / HTTP/1.0", H + b"Host: b\r\n"))
    yield refused("9112 3.2", _get(b"GET http://a/ HTTP/1.1", H + H))
    for host in (
        b"a b",
        b"a/b",
        b"u@a",
        b"http://a",
        b"a:b",
        b"a:80:80",
        b"[::1",
        b"::1",
        b"[a]x",
        b"a\\b",
        b"a?b",
        b"a#b",
        b'"a"',
    ):
        yield refused("9112 3.2", _get(b"GET / HTTP/1.1", b"Host: " + host + b"\r\n"))


def _request_lines() -> Iterator[Case]:
    yield served("9112 2.2", b"\r\n" + _get(b"GET / HTTP/1.1"), b"GET / a ")
    yield served("9112 2.2", b"\r\n\r\n" + _get(b"GET / HTTP/1.1"), b"GET / a ")
    for line in (
        b"GET / HTTP/3.0", b"GET / HTTP/11.1", b"GET / HTTP/1.", b"GET / HTTP/1.1x", b"GET / http/1.1", b"GET / HTTPS/1.1",
        b"GET", b"GET /a b HTTP/1.1", b"GET / HTTP/1.1 x", b" GET / HTTP/1.1", b"G\x00T / HTTP/1.1", b"GET\x00/ HTTP/1.1",
        b"GET /\x00 HTTP/1.1", b"GET /\x7f HTTP/1.1", b"G(T / HTTP/1.1",
    ):  # fmt: skip
        yield refused("9112 3", _get(line))
    yield refused("9110 15.6.6", _get(b"GET / HTTP/2.0"), 505)
    yield refused("9110 15.6.6", _get(b"GET / HTTP/0.9"), 505)
    yield refused("9110 15.6.6", _get(b"GET /"), 505)  # HTTP/0.9, with headers
    yield refused("9110 9.1", _get(b"get / HTTP/1.1"))  # methods are case-sensitive
    yield refused("9110 9.1", _get(b"BREW / HTTP/1.1"))
    yield refused("9112 2.2", b"GET / HTTP/1.1\nHost: a\n\n\r\n\r\n")
    yield refused("9112 2.2", b"GET / HTTP/1.1\r" + H + b"\r\n")
    yield refused("9113 3.4", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")  # HTTP/2 without asking: curl --http2-prior-knowledge
    yield refused("8446 5.1", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n")  # TLS


def _fields() -> Iterator[Case]:
    for field in (
        b"X:y",
        b"X:",
        b"X: \t ",
        b"X: a\tb",
        b"X: \x80\xff",
        b"!#$%&'*+-.^_`|~0aZ: y",
        b"X: y\r\nX: z",
        b"Content_Length: 9",
        b"Transfer_Encoding: chunked",
    ):
        yield served("9110 5.5", _get(b"GET / HTTP/1.1", H + field + b"\r\n"), b"GET / a ")
    for field in (
        b"X : y", b"X\t: y", b": y", b"X", b"X y: z", b"X(: y", b"X\x00: y", b"X\x80: y", b"X: a\x00b", b"X: a\rb",
        b"X: a\nY: b",
    ):  # fmt: skip
        yield refused("9112 5", _get(b"GET / HTTP/1.1", H + field + b"\r\n"))
    yield refused("9112 2.2", b"GET / HTTP/1.1\r\n " + H + b"\r\n")  # blank before the first field
    yield refused("9112 5.2", _get(b"GET / HTTP/1.1", H + b"Content-Length: 0\r\n Transfer-Encoding: chunked\r\n"))
    yield refused("6585 5", _get(b"GET / HTTP/1.1", H + b"X: " + b"y" * 70_000 + b"\r\n"), 431)
    yield refused("6585 5", _get(b"GET /" + b"a" * 70_000 + b" HTTP/1.1"), 431)
    yield Case("6585 5", _get(b"GET / HTTP/1.1", H + b"X: y\r\n" * 200), (431,), EITHER)  # the proxy passes them on


def _lengths() -> Iterator[Case]:
    hello = b"POST / a hello"
    yield served("9112 6.2", _post(b"Content-Length: 5\r\n", b"hello"), hello)
    yield served("9112 6.2", _post(b"Content-Length: 0\r\n"), b"POST / a ")
    yield served("9112 6.3", _post(b""), b"POST / a ")  # neither length nor coding: no body
    yield served("9110 8.6", _post(b"content-length:5\r\n", b"hello"), hello)
    yield served("9110 8.6", _post(b"Content-Length: 005\r\n", b"hello"), hello)
    yield served("9112 5", _post(b"Content-Length:  5 \t\r\n", b"hello"), hello)
    yield served("9110 9.3.1", _get(b"GET / HTTP/1.1", H + b"Content-Length: 5\r\n") + b"hello", b"GET / a hello")
    for length in (
        b"-5", b"+5", b"5.0", b"0x5", b"5 5", b"5,5", b"5, 5", b"5;", b"5a", b"", b"five", b"\xb2", b"18446744073709551616",
        b"9" * 40,
    ):  # fmt: skip
        yield refused("9112 6.3", _post(b"Content-Length: " + length + b"\r\n", b"hello"))
    yield refused("9112 6.3", _post(b"Content-Length: 5\r\nContent-Length: 6\r\n", b"hello!"))
    yield refused("9112 6.3", _post(b"Content-Length: 5\r\nContent-Length: 5\r\n", b"hello"))
    yield refused("9112 6.3", _post(b"Content-Length: 0\r\ncontent-length: 40\r\n", _get(b"GET /b HTTP/1.1")))


def _codings() -> Iterator[Case]:
    hello = b"POST / a hello"
    for body in (
        b"5\r\nhello\r\n0\r\n\r\n",
        b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
        b"005\r\nhello\r\n000\r\n\r\n",
        b"5;a\r\nhello\r\n0\r\n\r\n",
        b"5;a=b\r\nhello\r\n0;c\r\n\r\n",
        b'5;a="b;c"\r\nhello\r\n0\r\n\r\n',
        b"5\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"5\r\nhello\r\n0\r\nHost: b\r\nX: y\r\n\r\n",  # trailers change nothing (9110 6.5.1)
    ):
        yield served("9112 7.1", _chunks(body), hello)
    yield served("9112 7.1", _chunks(b"A\r\n0123456789\r\n0\r\n\r\n"), b"POST / a 0123456789")
    yield served("9112 7.1", _chunks(b"a\r\n0123456789\r\n0\r\n\r\n"), b"POST / a 0123456789")
    yield served("9112 7.1", _chunks(b"4\r\n\r\n\r\n\r\n0\r\n\r\n"), b"POST / a \r\n\r\n")
    yield served("9112 7.1", _chunks(b"0\r\n\r\n"), b"POST / a ")
    yield served("9110 5.1", _post(b"transfer-encoding:Chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n"), hello)
    for body in (
        b"x\r\n", b"-5\r\nhello\r\n", b"+5\r\nhello\r\n", b"0x5\r\nhello\r\n", b"5 5\r\nhello\r\n", b"\r\nhello\r\n",
        b"5\nhello\r\n", b"5\r\nhello\n", b"5\r\nhelloo\r\n", b"5\r\nhello0\r\n\r\n", b"ffffffffffffffff0\r\n",
        b"10000000000000005\r\n",
        b"5;a\nb\r\nhello\r\n", b"5\rhello\r\n", b"5\r\nhello\r\n0\r\nX y\r\n\r\n", b"5,5\r\nhello\r\n",
        b"5\r\nhello\r\n0\r\nContent-Length: 40\r\n\r\n",
    ):  # fmt: skip
        # Served by parts: the proxy has passed on the head by then, so it may break off instead of refusing.
        yield refused("9112 7.1", _chunks(body), proxied=False)
    for coding in (b"gzip, chunked", b"x, chunked"):
        yield refused("9112 6.1", _post(b"Transfer-Encoding: " + coding + b"\r\n", b"0\r\n\r\n"), 501)
    for coding in (
        b"gzip", b"identity", b"xchunked", b"chunked, identity", b"chunked, chunked", b"", b"chunked\x0b", b"\x0bchunked",
        b"chunked;a=b", b'"chunked"', b"chunked,", b"chunk\x00ed",
    ):  # fmt: skip
        yield refused("9112 6.1", _post(b"Transfer-Encoding: " + coding + b"\r\n", b"0\r\n\r\n"))
    yield refused("9112 6.1", _post(CHUNKED + b"Content-Length: 5\r\n", b"0\r\n\r\n"))
    yield refused("9112 6.1", _post(b"Content-Length: 5\r\n" + CHUNKED, b"0\r\n\r\n"))
    yield refused("9112 6.1", _post(CHUNKED + b"Transfer-Encoding: identity\r\n", b"0\r\n\r\n"))
    yield refused("9112 5.1", _post(b"Transfer-Encoding : chunked\r\n", b"0\r\n\r\n"))


def _connections() -> Iterator[Case]:
    a, b = _get(b"GET /a HTTP/1.1"), _get(b"GET /b HTTP/1.1")
    yield served("9112 9.3", _get(b"GET / HTTP/1.1", H + b"Connection: close\r\n"), b"GET / a ", after=CLOSED)
    yield served("9112 9.3", _get(b"GET / HTTP/1.1", H + b"Connection: x, CLOSE\r\n"), b"GET / a ", after=CLOSED)
    yield served("9112 9.3", _get(b"GET / HTTP/1.1", H + b"Connection: keep-alive\r\n"), b"GET / a ")
    yield served("9112 9.3", _get(b"GET / HTTP/1.1", H + b"Connection: closed\r\n"), b"GET / a ")
    yield served("9112 9.3", _get(b"GET / HTTP/1.0"), b"GET / a ", after=CLOSED)
    yield served("9112 9.3", _get(b"GET / HTTP/1.0", H + b"Connection: keep-alive\r\n"), b"GET / a ", after=EITHER)
    yield served("9112 9.3.2", a + b, b"GET /a a ", b"GET /b a ", proxied=False)
    yield served("9112 9.3.2", a + b"\r\n" + b, b"GET /a a ", b"GET /b a ", proxied=False)
    pipelined = _post(b"Content-Length: 5\r\n", b"hello") + b
    yield served("9112 9.3.2", pipelined, b"POST / a hello", b"GET /b a ", proxied=False)
    yield served("9112 9.3", a.replace(b"Host", b"Connection: close\r\nHost") + b, b"GET /a a ", after=CLOSED, proxied=False)
    yield served("9112 6.1", _post(CHUNKED, b"5\r\nhello\r\n0\r\n\r\n", b"1.0"), b"POST / a hello", after=CLOSED)
    yield served("9110 9.3.2", _get(b"HEAD / HTTP/1.1"), b"")
    yield served("9112 6.3", _get(b"HEAD / HTTP/1.1", H + b"Content-Length: 0\r\n"), b"")
    for method in (b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE"):
        yield served("9110 9", _get(method + b" /a HTTP/1.1"), method + b" /a a ")


def _offers() -> Iterator[Case]:
    """An offer of another protocol is ignored (RFC 9110, section 7.8), whatever the body's framing."""
    for offer in (
        H2C,
        b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
        b"UPGRADE: h2c\r\nConnection: keep-alive, Upgrade\r\n",
        b"Connection: Upgrade\r\nUpgrade: TLS/1.0\r\nUpgrade: h2c\r\n",
    ):
        yield served("9110 7.8", _get(b"GET / HTTP/1.1", H + offer), b"GET / a ")
        yield served("9110 7.8", _post(offer + b"Content-Length: 5\r\n", b"hello"), b"POST / a hello")
        yield served("9110 7.8", _post(CHUNKED + offer, b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"), b"POST / a hello")
    yield served("9110 7.8", _post(H2C + b"Content-Length: 0\r\n"), b"POST / a ")
    yield served("9110 7.8", _get(b"GET / HTTP/1.1", H + b"Upgrade: h2c\r\n"), b"GET / a ")
    yield served("9110 7.8", _get(b"GET http://b/c HTTP/1.1", H + H2C), b"GET /c b ")
    yield served("9110 7.8", _get(b"GET / HTTP/1.0", H + H2C), b"GET / a ", after=CLOSED)
    both = _post(CHUNKED + H2C, b"5\r\nhello\r\n0\r\n\r\n") + _get(b"GET /b HTTP/1.1", H + H2C)
    yield served("9110 7.8", both, b"POST / a hello", after=CLOSED, proxied=False)
    closing = H2C.replace(b"Upgrade, ", b"Upgrade, close, ")
    yield served("9110 7.8", _post(CHUNKED + closing, b"5\r\nhello\r\n0\r\n\r\n"), b"POST / a hello", after=CLOSED)
    yield refused("9112 6.1", _post(H2C + CHUNKED + b"Content-Length: 5\r\n", b"0\r\n\r\n"))
    yield refused("9112 3.2", b"GET / HTTP/1.1\r\n" + H2C + b"\r\n")
    yield served("9110 10.1.1", _post(b"Expect: 100-continue\r\nContent-Length: 5\r\n", b"hello"), b"POST / a hello")
    yield served("9110 10.1.1", _post(b"Expect: 100-Continue\r\n" + CHUNKED, b"5\r\nhello\r\n0\r\n\r\n"), b"POST / a hello")
    yield served(
        "9110 10.1.1",
        _post(b"Expect: 100-continue\r\nContent-Length: 5\r\n", b"hello", b"1.0"),
        b"POST / a hello",
        after=CLOSED,
    )
    yield served("9110 10.1.1", _get(b"GET / HTTP/1.1", H + b"Expect: 100-continue\r\n"), b"GET / a ")


def _recorded() -> Iterator[Case]:
    """Requests as clients send them, recorded byte for byte; Go's as net/http writes them."""
    java = b"User-Agent: Java-http-client/17.0.21\r\nContent-Type: text/plain\r\n\r\n"
    settings = b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\n"
    offers = b" /e?a=b HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    host, upgrade = b"Host: 127.0.0.1:80\r\n", b"Upgrade: h2c\r\n"
    seen, chunks = b" /e?a=b 127.0.0.1:80 ", b"5\r\nhello\r\n0\r\n\r\n"
    curl = b" /e?a=b HTTP/1.1\r\n" + host + b"User-Agent: curl/8.14.1\r\nAccept: */*\r\n"
    form = b"Content-Type: application/x-www-form-urlencoded\r\n"
    go = b" /e?a=b HTTP/1.1\r\n" + host + b"User-Agent: Go-http-client/1.1\r\n"
    python = b"POST /e?a=b HTTP/1.1\r\n" + host + b"Accept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
    zipped = b"Accept-Encoding: gzip\r\n\r\n"
    for sent, body in (
        (b"GET" + offers + host + settings + upgrade + java, b""),
        (b"POST" + offers + b"Content-Length: 5\r\n" + host + settings + upgrade + java + b"hello", b"hello"),
        (b"POST" + offers + host + settings + b"Transfer-encoding: chunked\r\n" + upgrade + java + chunks, b"hello"),
        (
            b"POST /e?a=b HTTP/1.1\r\nUser-Agent: Java/17.0.21\r\n"
            + host
            + b"Accept: text/html, image/gif, image/jpeg, */*; q=0.2"
            b"\r\nConnection: keep-alive\r\nContent-type: application/x-www-form-urlencoded\r\n" + CHUNKED + b"\r\n" + chunks,
            b"hello",
        ),
        (b"GET" + curl + b"\r\n", b""),
        (b"POST" + curl + b"Content-Length: 5\r\n" + form + b"\r\nhello", b"hello"),
        (b"PUT" + curl + CHUNKED + b"Expect: 100-continue\r\n\r\n" + chunks, b"hello"),
        (
            b"POST"
            + curl
            + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAQAAAAIAAAAA\r\n"
            b"Content-Length: 5\r\n" + form + b"\r\nhello",
            b"hello",
        ),
        (b"GET" + go + zipped, b""),
        (b"POST" + go + b"Content-Length: 5\r\nContent-Type: application/json\r\n" + zipped + b"hello", b"hello"),
        (b"POST" + go + CHUNKED + b"Content-Type: application/json\r\n" + zipped + chunks, b"hello"),
        (b"POST /e?a=b HTTP/1.1\r\n" + host + CHUNKED + b"\r\n" + chunks, b"hello"),  # h11
        (python + b"Connection: keep-alive\r\nUser-Agent: python-httpx/0.28.1\r\n" + CHUNKED + b"\r\n" + chunks, b"hello"),
        (
            b"POST /e?a=b HTTP/1.1\r\nhost: 127.0.0.1:80\r\nconnection: keep-alive\r\naccept: */*\r\naccept-language: *\r\n"
            b"sec-fetch-mode: cors\r\nuser-agent: node\r\naccept-encoding: gzip, deflate\r\ntransfer-encoding: chunked\r\n\r\n"
            + chunks,
            b"hello",
        ),
        (python + b"User-Agent: Python/3.11 aiohttp/3.14.5\r\n" + CHUNKED + b"\r\n" + chunks, b"hello"),
    ):
        yield served("clients", sent, sent.partition(b" ")[0] + seen + body)


CASES: Final = tuple(
    chain(
        _targets(), _hosts(), _request_lines(), _fields(), _lengths(), _codings(), _connections(), _offers(), _recorded()
    )
)  # fmt: skip
LAST: Final = _get(b"GET /last HTTP/1.1", H + b"Connection: close\r\n")


class _Socket:
    """What HTTPResponse wants of a socket: one file for all replies of a connection, so that no byte is lost between two."""

    def __init__(self, replies: IO[bytes]) -> None:
        self._replies = replies

    def makefile(self, _mode: str) -> Any:
        return _Unclosed(self._replies)


class _Unclosed:
    def __init__(self, replies: IO[bytes]) -> None:
        self.read, self.readline, self.readinto = replies.read, replies.readline, cast("Any", replies).readinto
        self.flush: Callable[[], None] = lambda: None
        self.close: Callable[[], None] = lambda: None


def outcome(case: Case, port: int) -> tuple[tuple[int | bytes, ...], str]:
    """Sends the case to a server on 127.0.0.1, and returns replies and fate of the connection as the case has them."""
    seen: list[int | bytes] = []
    with socket.create_connection(("127.0.0.1", port), timeout=ENOUGH) as sock, sock.makefile("rb") as replies:
        sock.sendall(case.sent)
        for _ in case.replies:
            try:
                seen.append(_reply(replies, case.sent.lstrip().partition(b" ")[0].decode("latin-1")))
            except ConnectionError:
                break
        after = CLOSED
        try:
            sock.sendall(LAST)
            if (last := _reply(replies)) == b"GET /last a ":
                after = KEPT
            else:
                seen.append(last)
        except (ConnectionError, ValueError):
            pass
    return tuple(seen), after


def _reply(replies: IO[bytes], method: str = "GET") -> int | bytes:
    response = HTTPResponse(cast("Any", _Socket(replies)), method=method)
    response.begin()
    body = response.read()
    return body if response.status == 200 else response.status
