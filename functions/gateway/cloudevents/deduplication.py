"""Deduplication: deliveries of the same event, repeated or concurrent, share one generation.

This holds within one gateway, and for KEPT_SECONDS after the answer. Another gateway computes the answer again; it is the same
one, because the seed follows from the event (`cloud_event.reply_seed`).
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

from eventing.wire.generation import GenerateResponse, TokenEvent
from functions.gateway.answers.generation import HEARTBEAT_SECONDS, LOOK_SECONDS, Generation, StreamPace

KEPT_SECONDS: Final = 300.0  # after the answer's end; longer than a Broker waits before its last retry, with Knative's back-off
MAX_KEPT_TOKENS: Final = 2**18  # of all complete answers, with the tokens in their log-probabilities; the oldest are dropped


class _SharedGeneration:
    """A generation and its tokens so far. Its listeners pull new tokens, one listener at a time."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.beginning = threading.Lock()  # held while the generation begins
        self.generation: Generation | None = None  # dropped at the end: it holds the prompts, which are not counted
        self.request_id = ""
        self.upcoming: Iterator[TokenEvent | None] = iter(())
        self.pulling = False
        self.listeners = 0
        self.tokens: list[TokenEvent] = []
        self.size = 1  # tokens kept, with those in log-probabilities
        self.response: GenerateResponse | None = None
        self.problem: Exception | None = None
        self.ended_at = 0.0

    def pull(self) -> None:
        """Waits for the next token, up to LOOK_SECONDS. Stores it, or the response or error at the end, for all listeners.

        The caller has set `pulling`, which this method clears.
        """
        assert self.generation is not None
        token, response, problem = None, None, None
        try:
            token = next(self.upcoming, None)
            if token is None and all(answer.done for answer in self.generation.answers):
                response = self.generation.response()
        except Exception as error:  # noqa: BLE001 - every listener raises it
            problem = error
        with self.changed:
            self.pulling = False
            if token is not None:
                self.tokens.append(token)
                self.size += 1 + (0 if token.logprob is None else len(token.logprob.top))
            self.response, self.problem, self.ended_at = response, problem, time.monotonic()
            if response is not None:
                self.generation, self.upcoming = None, iter(())
            self.changed.notify_all()


class Listener:
    """One delivery's view of a shared generation. Iterate `tokens` to its end, then call `response`; or `close` it early."""

    def __init__(self, shared: _SharedGeneration, gone: Callable[[], bool], leave: Callable[[], None]) -> None:
        self.request_id = shared.request_id
        self._shared = shared
        self._gone = gone
        self._leave = leave
        self._closed = False

    def tokens(self, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> Iterator[TokenEvent | None]:
        """Yields all tokens, also those from before this listener joined, and None after each `heartbeat_seconds` without any.

        Raises the Problem that ended the generation, or ClientLeft if this listener's client has left.
        """
        given = 0
        pace = StreamPace(self._gone, heartbeat_seconds)
        try:
            while (new := self._new_tokens(given, heartbeat_seconds)) is not None:
                given += len(new)
                yield from new
                if pace.is_heartbeat_due(bool(new)):
                    yield None
                    pace.restart()
        finally:
            self.close()

    def _new_tokens(self, given: int, seconds: float) -> list[TokenEvent] | None:
        """The tokens after the first `given`. If there are none yet, waits for a while and returns an empty list.

        Returns None at the end. Raises the Problem that ended the generation. seconds: longest wait.
        """
        shared = self._shared
        with shared.changed:
            if given < len(shared.tokens):
                return shared.tokens[given:]
            if shared.problem is not None:
                raise shared.problem
            if shared.response is not None:
                return None
            if shared.pulling:
                shared.changed.wait(min(seconds, LOOK_SECONDS))
                return []
            shared.pulling = True
        shared.pull()
        return []

    def response(self) -> GenerateResponse:
        """The complete answers of the generation. Call it only after the last token."""
        assert self._shared.response is not None
        return self._shared.response

    def close(self) -> None:
        """Cancels the generation if it is unfinished and has no other listener."""
        if not self._closed:
            self._closed = True
            self._leave()


class Deduplicator:
    """Running and recently completed generations, by a key of their event. Thread-safe."""

    def __init__(self) -> None:
        self._shared: dict[bytes, _SharedGeneration] = {}
        self._complete: OrderedDict[bytes, _SharedGeneration] = OrderedDict()  # part of `_shared`, oldest first
        self._kept_tokens = 0  # in the complete ones
        self._lock = threading.Lock()

    def listen(self, key: bytes, begin: Callable[[], Generation], gone: Callable[[], bool]) -> Listener:
        """Joins the generation with this key, or begins one. The caller closes the returned Listener.

        key: digest of the event and its client. begin: called if there is no such generation; its errors are raised here.
        gone: tells without waiting whether this delivery's client has left.
        """
        with self._lock:
            self._drop_old()
            shared = self._shared.setdefault(key, _SharedGeneration())
            shared.listeners += 1
        try:
            with shared.beginning:
                if not shared.request_id:
                    shared.generation = begin()
                    shared.upcoming = shared.generation.tokens(LOOK_SECONDS)
                    shared.request_id = shared.generation.request_id
        except BaseException:
            self._leave(key, shared)
            raise
        return Listener(shared, gone, lambda: self._leave(key, shared))

    def _leave(self, key: bytes, shared: _SharedGeneration) -> None:
        with self._lock:
            shared.listeners -= 1
            last = shared.listeners == 0
            complete = shared.response is not None
            current = self._shared.get(key) is shared
            if complete and current and key not in self._complete:
                self._complete[key] = shared
                self._kept_tokens += shared.size
            # A failed generation is begun again by the next delivery, and a cancelled one is of no use.
            if not complete and current and (last or shared.problem is not None):
                del self._shared[key]
        if last and not complete and shared.generation is not None:
            shared.generation.close()

    def _drop_old(self) -> None:
        oldest = time.monotonic() - KEPT_SECONDS
        while self._complete:
            key, shared = next(iter(self._complete.items()))
            if shared.ended_at >= oldest and self._kept_tokens <= MAX_KEPT_TOKENS:
                break
            self._kept_tokens -= shared.size
            del self._complete[key], self._shared[key]
