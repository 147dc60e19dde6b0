"""The access log: writes one line of JSON for each request when it has ended, with its client, duration and tokens.

Lines never contain API keys. They contain prompts and answers only with `LAMINA_ACCESS_LOG=prompts`.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
from flask import request
from werkzeug.wsgi import ClosingIterator

from eventing.wire.generation import GenerateRequest
from functions.gateway.answers.generation import Generation
from functions.hosting.requests import ARRIVED

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_ENTRY: Final = "lamina.access"


@dataclass(slots=True)
class LogEntry:
    """Data of one request for its line in the access log. The request's handler fills in the fields. None means not known."""

    arrived: float = 0.0  # in time.monotonic()
    request_id: str | None = None
    client_id: str | None = None  # first digits of a key's SHA-256; an address if there are no keys
    request: GenerateRequest | None = None
    generation: Generation | None = None
    prompt_tokens: int | None = None  # of texts that became vectors
    status: int | None = None


def log_entry() -> LogEntry:
    """Returns the LogEntry of the current Flask request. Without an access log, the entry is never written."""
    entry: LogEntry = request.environ.setdefault(_ENTRY, LogEntry())
    return entry


class AccessLog:
    """A WSGI middleware that writes one line for each request, when its reply is closed.

    `write` receives the line, JSON without a newline, in the thread that answered. If `with_prompts`, lines contain the prompt
    and the answer's text.
    """

    def __init__(self, application: "WSGIApplication", write: Callable[[str], object], *, with_prompts: bool = False) -> None:
        self._application = application
        self._write = write
        self._with_prompts = with_prompts

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        entry = environ[_ENTRY] = LogEntry(environ.get(ARRIVED) or time.monotonic())

        def start(status: str, *rest: Any) -> Callable[[bytes], object]:
            entry.status = int(status.partition(" ")[0])
            return start_response(status, *rest)

        return ClosingIterator(self._application(environ, start), lambda: self._log(environ, entry))

    def _log(self, environ: "WSGIEnvironment", entry: LogEntry) -> None:
        seconds = time.monotonic() - entry.arrived
        line: dict[str, Any] = {
            "time": (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="milliseconds"),
            "request_id": entry.request_id,
            "client_id": entry.client_id,
            "method": environ["REQUEST_METHOD"],
            "path": environ["PATH_INFO"],
            "status": entry.status,
            "seconds": round(seconds, 4),
        }
        if entry.generation is not None:
            line |= entry.generation.account()
        elif entry.prompt_tokens is not None:
            line["prompt_tokens"] = entry.prompt_tokens
        if self._with_prompts and entry.request is not None:
            line |= {"prompt": entry.request.prompt, "messages": entry.request.messages}
            line["text"] = None if entry.generation is None else entry.generation.text
        self._write(msgspec.json.encode(line).decode())
