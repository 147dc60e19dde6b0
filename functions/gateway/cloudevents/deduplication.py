"""The same question answered once: deliveries of one event, which may come again and at the same time, share one reply.

In this gateway alone, and for a while: another gateway knows nothing of it and computes the same answer anew, since seeds
follow from the event (`cloud_event.reply_seed`).
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

from eventing.wire.generation import GenerateResponse, TokenEvent
from functions.gateway.answers.generation import HEARTBEAT_SECONDS, LOOK_SECONDS, ClientLeft, Generation

REMEMBERED_SECONDS: Final = 300.0
"""Of a complete answer, from its end on: longer than a Broker waits before its last retry, as Knative's backoff has it."""
MOST_REMEMBERED_TOKENS: Final = 2**18
"""Of all complete answers together, those beside their log-probabilities counted; the oldest go first."""


class _Shared:
    """A reply, and what it has said so far. It comes on as its listeners pull at it, one at a time."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.begun = threading.Lock()
        """Held while it begins."""
        self.reply: Generation | None = None
        """Until it is complete: it holds its prompts, which are not counted."""
        self.request_id = ""
        self.coming: Iterator[TokenEvent | None] = iter(())
        self.pulled = False
        self.listeners = 0
        self.said: list[TokenEvent] = []
        self.size = 1
        """Tokens that it keeps."""
        self.response: GenerateResponse | None = None
        self.problem: Exception | None = None
        self.ended_at = 0.0

    def pull(self) -> None:
        """Its next token, or that some time has passed; only for who has set `pulled`."""
        assert self.reply is not None
        token, response, problem = None, None, None
        try:
            token = next(self.coming, None)
            if token is None and all(answer.done for answer in self.reply.answers):
                response = self.reply.response()
        except Exception as error:  # noqa: BLE001 - everybody who listens raises it
            problem = error
        with self.changed:
            self.pulled = False
            if token is not None:
                self.said.append(token)
                self.size += 1 + (0 if token.logprob is None else len(token.logprob.top))
            self.response, self.problem, self.ended_at = response, problem, time.monotonic()
            if response is not None:
                self.reply, self.coming = None, iter(())
            self.changed.notify_all()


class Listener:
    """One delivery's view of a shared reply. Iterate `tokens` to its end, then ask for `response`; or `close` it."""

    def __init__(self, shared: _Shared, gone: Callable[[], bool], leave: Callable[[], None]) -> None:
        self.request_id = shared.request_id
        self._shared = shared
        self._gone = gone
        self._leave = leave
        self._closed = False

    def tokens(self, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> Iterator[TokenEvent | None]:
        """As a Generation has them, from the first one on."""
        given = 0
        now = time.monotonic()
        speaks_at, looks_at = now + heartbeat_seconds, now + LOOK_SECONDS
        try:
            while (news := self._news(given, heartbeat_seconds)) is not None:
                given += len(news)
                yield from news
                now = time.monotonic()
                if now >= looks_at:
                    looks_at = now + LOOK_SECONDS
                    if self._gone():
                        raise ClientLeft
                if not news and now >= speaks_at:
                    yield None
                if news or now >= speaks_at:
                    speaks_at = time.monotonic() + heartbeat_seconds
        finally:
            self.close()

    def _news(self, given: int, seconds: float) -> list[TokenEvent] | None:
        """What was said behind the first `given` tokens, nothing after some time; None at the end. Raises what ended it."""
        shared = self._shared
        with shared.changed:
            if given < len(shared.said):
                return shared.said[given:]
            if shared.problem is not None:
                raise shared.problem
            if shared.response is not None:
                return None
            if shared.pulled:
                shared.changed.wait(min(seconds, LOOK_SECONDS))
                return []
            shared.pulled = True
        shared.pull()
        return []

    def response(self) -> GenerateResponse:
        """After the last token."""
        assert self._shared.response is not None
        return self._shared.response

    def close(self) -> None:
        """When the last of all has left before the end, the answer is cancelled."""
        if not self._closed:
            self._closed = True
            self._leave()


class Deduplicator:
    """Replies by what was asked. Thread-safe."""

    def __init__(self) -> None:
        self._shared: dict[bytes, _Shared] = {}
        self._complete: OrderedDict[bytes, _Shared] = OrderedDict()
        """Those of them that are kept, the oldest first."""
        self._tokens = 0
        """That these keep."""
        self._lock = threading.Lock()

    def listen(self, key: bytes, begin: Callable[[], Generation], gone: Callable[[], bool]) -> Listener:
        """To what `key` stands for; `begin` begins it where nobody has. Raises what `begin` raises. gone: whether this client
        has left."""
        with self._lock:
            self._forget_old()
            shared = self._shared.setdefault(key, _Shared())
            shared.listeners += 1
        try:
            with shared.begun:
                if not shared.request_id:
                    shared.reply = begin()
                    shared.coming, shared.request_id = shared.reply.tokens(LOOK_SECONDS), shared.reply.request_id
        except BaseException:
            self._leave(key, shared)
            raise
        return Listener(shared, gone, lambda: self._leave(key, shared))

    def _leave(self, key: bytes, shared: _Shared) -> None:
        with self._lock:
            shared.listeners -= 1
            last = shared.listeners == 0
            complete = shared.response is not None
            current = self._shared.get(key) is shared
            if complete and current and key not in self._complete:
                self._complete[key] = shared
                self._tokens += shared.size
            # What broke is asked again, and what nobody has heard to its end is not kept.
            if not complete and current and (last or shared.problem is not None):
                del self._shared[key]
        if last and not complete and shared.reply is not None:
            shared.reply.close()

    def _forget_old(self) -> None:
        oldest = time.monotonic() - REMEMBERED_SECONDS
        while self._complete:
            key, shared = next(iter(self._complete.items()))
            if shared.ended_at >= oldest and self._tokens <= MOST_REMEMBERED_TOKENS:
                break
            self._tokens -= shared.size
            del self._complete[key], self._shared[key]
