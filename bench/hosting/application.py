"""What every server serves: an echo, as a stage gets and gives it, and a stream of the moments at which it was written."""

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

STREAM_PATH: Final = "/stream"
PIECES: Final = 50
PIECE_SECONDS: Final = 0.1
"""Between two pieces of a stream: a fast model's tokens."""


def application(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
    if environ["PATH_INFO"] == STREAM_PATH:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return pieces()
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", [("Content-Type", "application/octet-stream"), ("Content-Length", str(len(body)))])
    return [body]


def pieces() -> Iterator[bytes]:
    """Server-sent events that say when they were written, by the machine's one monotonic clock."""
    began = time.monotonic()
    for number in range(PIECES):
        time.sleep(max(0.0, began + number * PIECE_SECONDS - time.monotonic()))
        yield f"data: {time.monotonic():.6f}\n\n".encode()
