"""One line of JSON for each request, once it has been answered: who asked, how long it took, what it cost.

Never a key, and never a prompt or an answer unless they are asked for (`LAMINA_ACCESS_LOG=prompts`).
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
from functions.hosting.environ import ARRIVED

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_ENTRY: Final = "lamina.access"


@dataclass(slots=True)
class Entry:
    """What the doors find out about a request."""

    arrived: float = 0.0
    """In time.monotonic()."""
    request_id: str | None = None
    client_id: str | None = None
    """The first digits of a key's SHA-256; without keys an address."""
    wanted: GenerateRequest | None = None
    answer: Generation | None = None
    status: int | None = None


def entry() -> Entry:
    """Of this request."""
    found: Entry = request.environ.setdefault(_ENTRY, Entry())
    return found


class AccessLog:
    """Around a WSGI application. write: gets the line, without its end."""

    def __init__(self, application: "WSGIApplication", write: Callable[[str], object], *, with_prompts: bool = False) -> None:
        self._application = application
        self._write = write
        self._with_prompts = with_prompts

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        seen = environ[_ENTRY] = Entry(environ.get(ARRIVED) or time.monotonic())

        def started(status: str, *rest: Any) -> Callable[[bytes], object]:
            seen.status = int(status.partition(" ")[0])
            return start_response(status, *rest)

        return ClosingIterator(self._application(environ, started), lambda: self._told(environ, seen))

    def _told(self, environ: "WSGIEnvironment", seen: Entry) -> None:
        seconds = time.monotonic() - seen.arrived
        line: dict[str, Any] = {
            "time": (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="milliseconds"),
            "request_id": seen.request_id,
            "client_id": seen.client_id,
            "method": environ["REQUEST_METHOD"],
            "path": environ["PATH_INFO"],
            "status": seen.status,
            "seconds": round(seconds, 4),
        }
        if seen.answer is not None:
            line |= seen.answer.account()
        if self._with_prompts and seen.wanted is not None:
            line |= {"prompt": seen.wanted.prompt, "messages": seen.wanted.messages}
            line["text"] = None if seen.answer is None else seen.answer.text
        self._write(msgspec.json.encode(line).decode())
