"""The door for whoever watches: `GET /v1/pipeline/events`, the pipeline's state as server-sent events.

`snapshot` first, then a `change` whenever something has changed, a few times a second at most. A stream ends after some
minutes, so that no proxy has to break it, and when the gateway drains; readers come again.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
from flask import Flask, Response, request

from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE, HEARTBEAT, encode_sse
from eventing.problems import RateLimited
from functions.gateway.answers.access_log import entry
from functions.gateway.answers.clients import Clients
from functions.gateway.answers.streaming import STREAM_HEADERS, client_gone
from functions.gateway.page.merge_patch import merge_patch
from functions.gateway.page.pipeline_watch import SAMPLE_SECONDS, PipelineWatch

MOST_WATCHERS: Final = 32
"""At once: each has a thread."""
HEARTBEAT_SECONDS: Final = 5.0
LONGEST_SECONDS: Final = 300.0
"""Of one stream: less than a Service's timeoutSeconds."""
COME_AGAIN_SECONDS: Final = 5


class PipelineEventsAPI:
    def __init__(self, watch: PipelineWatch, clients: Clients) -> None:
        self._watch = watch
        self._clients = clients
        self._places = threading.Semaphore(MOST_WATCHERS)

    def register(self, app: Flask) -> None:
        app.get("/v1/pipeline/events")(self._events)

    def _events(self) -> Response:
        client_id = entry().client_id = self._clients.identify(request)
        if not self._places.acquire(blocking=False):
            raise RateLimited(f"{MOST_WATCHERS} watch the pipeline already; try again later", COME_AGAIN_SECONDS)
        stream = self._stream(client_id, client_gone())
        response = Response(stream, content_type=EVENT_STREAM_CONTENT_TYPE, headers=STREAM_HEADERS)
        response.call_on_close(self._places.release)
        return response

    def _stream(self, client_id: str, gone: Callable[[], bool]) -> Iterator[bytes]:
        ends_at = time.monotonic() + LONGEST_SECONDS
        told = self._document(client_id)
        yield _event("snapshot", told)
        spoke_at = time.monotonic()
        while time.monotonic() < ends_at and not gone() and not self._watch.watched.draining():
            time.sleep(SAMPLE_SECONDS)
            now = self._document(client_id)
            if patch := merge_patch(told, now):
                told = now
                yield _event("change", patch)
            elif time.monotonic() - spoke_at > HEARTBEAT_SECONDS:
                yield HEARTBEAT
            else:
                continue
            spoke_at = time.monotonic()

    def _document(self, client_id: str) -> dict[str, Any]:
        document: dict[str, Any] = msgspec.to_builtins(self._watch.state(client_id))
        return document


def _event(name: str, document: dict[str, Any]) -> bytes:
    return encode_sse(msgspec.json.encode(document), event=name)
