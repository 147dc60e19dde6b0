"""Sends a state as server-sent events: `GET /v1/pipeline/events`, and `GET /v1/fleet/events` of a fleet's gateway.

The first event is a `snapshot`. A `change` follows whenever the state has changed, at most a few times a second. A stream ends
after some minutes (before a proxy breaks it), when the gateway drains, or when another client needs its place. Clients
reconnect.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
from flask import Response

from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE, encode_sse
from eventing.problems import RateLimited
from functions.fairness.fair_shares import FairShares
from functions.gateway.answers.access_log import log_entry
from functions.gateway.answers.streaming import STREAM_HEADERS, client_gone, with_comments

SAMPLE_SECONDS: Final = 0.3  # between two looks at the state
MAX_STREAMS: Final = 32  # open at the same time, shared among clients; each occupies a thread
KEEP_ALIVE_SECONDS: Final = 5.0
MAX_STREAM_SECONDS: Final = 300.0  # less than a Service's timeoutSeconds
RETRY_AFTER_SECONDS: Final = 5


# Returns the id of the client whose request is served, and a function of the state that it may see. Raises Unauthorized.
Subscribe = Callable[[], tuple[str, Callable[[], msgspec.Struct]]]


class StateEventsAPI:
    def __init__(self, path: str, subscribe: Subscribe, draining: Callable[[], bool]) -> None:
        self._path = path
        self._subscribe = subscribe
        self._draining = draining
        self._streams: FairShares[threading.Event] = FairShares()  # each stream's event is set when it must give way
        self._lock = threading.Lock()

    def events(self) -> Response:
        client_id, state = self._subscribe()
        log_entry().client_id = client_id
        gave_way = threading.Event()
        with self._lock:
            yielding = self._streams.make_room(client_id, 1, MAX_STREAMS)
            if yielding is None:
                raise RateLimited(f"{MAX_STREAMS} read {self._path} already; try again later", RETRY_AFTER_SECONDS)
            self._streams.add(client_id, gave_way)
        for each in yielding:
            each.set()
        stream = with_comments(self._stream(state, client_gone(), gave_way), KEEP_ALIVE_SECONDS)
        response = Response(stream, content_type=EVENT_STREAM_CONTENT_TYPE, headers=STREAM_HEADERS)
        response.call_on_close(lambda: self._leave(gave_way))
        return response

    def _leave(self, stream: threading.Event) -> None:
        with self._lock:
            self._streams.remove(stream)

    def _stream(
        self, state: Callable[[], msgspec.Struct], gone: Callable[[], bool], gave_way: threading.Event
    ) -> Iterator[bytes | None]:
        ends_at = time.monotonic() + MAX_STREAM_SECONDS
        sent = msgspec.to_builtins(state())
        yield encode_sse(msgspec.json.encode(sent), event="snapshot")
        while time.monotonic() < ends_at and not gone() and not self._draining():
            if gave_way.wait(SAMPLE_SECONDS):
                return
            now = msgspec.to_builtins(state())
            patch, sent = merge_patch(sent, now), now
            yield encode_sse(msgspec.json.encode(patch), event="change") if patch else None


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON merge patch (RFC 7396) that turns `old` into `new`. It is empty if they are equal.

    In the patch, removed members and members that became null are both null.
    """
    patch: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            if inner := merge_patch(before, value):
                patch[name] = inner
        elif before != value:
            patch[name] = value
    return patch
