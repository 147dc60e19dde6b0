"""When Go's HTTP server closes a request under an answer, so that queue-proxy breaks the answer off.

Go's server reads what is left of a request's body, and closes it, before it sends the first bytes of an answer (net/http,
server.go, chunkWriter.writeHeader). Where queue-proxy's ReverseProxy had not seen the body's end by then, its next read fails
(`http: invalid Read on closed Body`), and its connection to the function is closed with the answer half-way. On a cluster 4
to 19 % of streamed answers broke so, which began a millisecond or two after the request. Here it is always so.
"""

from typing import Final

from knative.local.http.messages import Headers, find
from knative.local.http.server import Exchange

ANNOTATION: Final = "features.knative.dev/http-full-duplex"
"""`Enabled` on a revision's template: Go's server then lets the request alone."""
_BUFFERED_BYTES: Final = 2048
"""Of an answer that says its length, before Go's server sends anything: a short refusal gets through whole."""
_END_SEEN_SECONDS: Final = 0.002
"""Within which ReverseProxy has seen the end of a body that it has passed on already."""


def broken_off(exchange: Exchange, headers: Headers, now: float) -> str | None:
    """Why an answer with these headers, which begins now, breaks behind them; None where it does not."""
    length = find(headers, b"content-length")
    if length is not None and int(length) <= _BUFFERED_BYTES:
        return None
    if not exchange.body_complete:
        return f"the function answered before the request was read to its end; {_remedy()}"
    # What has no length is sent at once; anything else waits for company, and has had its end seen by then.
    early = exchange.has_body and length is None and now - (exchange.body_ended_at or now) < _END_SEEN_SECONDS
    return f"the function answered within {_END_SEEN_SECONDS * 1000:g} ms of the request's end; {_remedy()}" if early else None


def _remedy() -> str:
    return f'annotate its template with {ANNOTATION}: "Enabled", or let it send nothing before its answer'
