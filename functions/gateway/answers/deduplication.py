"""Deduplication: requests with the same key, concurrent or repeated, share one answer. A pool's thread reads its items.

A client that lost its connection and asks again within ABANDONED_SECONDS joins the running answer and gets it from its
beginning. Until KEPT_SECONDS after the answer's end, such a client gets the complete answer.

This holds within one gateway. Another gateway computes the answer again. Both answers are the same, because the seed follows
from the request.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import copy
from typing import Final, Generic, TypeVar

from eventing.problems import Problem
from eventing.wire.generation import ProgressEvent, TokenEvent
from functions.gateway.answers.generation import ClientLeft, Looks
from functions.threads.pool import ThreadPool

_log: Final = logging.getLogger(__name__)

ABANDONED_SECONDS: Final = 5.0  # an answer goes on so long without a client, for one that asks again
KEPT_SECONDS: Final = 300.0  # after the answer's end; longer than a Broker waits before its last retry, with Knative's back-off
MAX_KEPT_TOKENS: Final = 2**18  # of all complete answers, with the tokens in their log-probabilities; the oldest are dropped

_MAX_RUNNING: Final = 512  # answers that are taken in at the same time; others wait
_TOKEN_BYTES: Final = 256  # of an encoded event that counts as one token

T = TypeVar("T")


class PassingBytes(bytes):
    """An encoded event that the next event makes useless, such as progress. Listeners that join later do not get it."""


class _SharedAnswer(Generic[T]):
    """An answer's items so far. `listeners` and `left_at` are guarded by the Deduplicator's lock, the rest by `changed`."""

    def __init__(self) -> None:
        self.beginning = threading.Lock()  # held while the answer begins
        self.begun = False
        self.listeners = 0
        self.left_at = 0.0  # when the last listener left, in time.monotonic()
        self.changed = threading.Condition()
        self.items: list[T] = []
        self.passing: T | None = None  # progress after the last of `items`
        self.ended = False
        self.problem: Problem | ClientLeft | None = None  # what ended the answer early
        self.ended_at = 0.0
        self.size = 1  # in tokens


class Listener(Generic[T]):
    """One request's view of a shared answer. Iterate `items` to its end, or `close` it early."""

    def __init__(self, request_id: str, shared: _SharedAnswer[T], gone: Callable[[], bool], leave: Callable[[], None]) -> None:
        self.request_id = request_id
        self._shared = shared
        self._gone = gone
        self._leave = leave
        self._closed = False

    def items(self) -> Iterator[T | None]:
        """Yields all items of the answer, including those from before this listener joined.

        While no items come, yields None every LOOK_SECONDS. Of successive progress items, only the last is yielded. Raises the
        Problem that ended the answer, or ClientLeft if this listener's client has left.
        """
        given, told = 0, None
        looks = Looks(self._gone)
        shared = self._shared
        try:
            while True:
                with shared.changed:
                    if given == len(shared.items) and shared.passing is told and not shared.ended:
                        shared.changed.wait(looks.seconds_to_wait())
                    new, passing, ended = shared.items[given:], shared.passing, shared.ended
                yield from new
                given += len(new)
                if passing is not told:
                    told = passing
                    yield passing
                if ended and shared.problem is not None:
                    raise copy(shared.problem)  # a raised exception holds the request, by the frames of its traceback
                if ended:
                    return
                for _ in looks.look(bool(new)):
                    yield None
        finally:
            self.close()

    def close(self) -> None:
        """Leaves the answer, which is cancelled if it is unfinished and no listener comes within ABANDONED_SECONDS."""
        if not self._closed:
            self._closed = True
            self._leave()


class Deduplicator(Generic[T]):
    """Lets repeated requests share one answer, while it runs and for a while after its end. Thread-safe."""

    def __init__(self) -> None:
        self._shared: dict[bytes, _SharedAnswer[T]] = {}
        self._complete: OrderedDict[bytes, _SharedAnswer[T]] = OrderedDict()  # part of `_shared`, oldest first
        self._kept_tokens = 0  # in the complete ones
        self._lock = threading.Lock()
        self._threads = ThreadPool(_MAX_RUNNING, "answer")

    def listen(
        self, key: bytes, request_id: str, begin: Callable[[Callable[[], bool]], Iterator[T | None]], gone: Callable[[], bool]
    ) -> Listener[T]:
        """Joins the answer with this key, or begins one. The caller closes the returned Listener.

        `key` is the digest of the request and its client. `gone` tells without waiting whether this request's client has left.

        If there is no such answer, `begin` is called. Its argument is a function that tells whether the answer is abandoned.
        `begin` returns an iterator over the answer's items, with None while there is no item. A thread reads the iterator.
        Errors of `begin` are raised here.
        """
        with self._lock:
            self._drop_old()
            shared = self._shared.setdefault(key, _SharedAnswer())
            shared.listeners += 1
        try:
            with shared.beginning:
                if not shared.begun:
                    items = begin(lambda: self._is_abandoned(key, shared))
                    self._threads.submit(self._take_in, key, request_id, shared, items)
                    shared.begun = True
        except BaseException:
            with self._lock:
                shared.listeners -= 1
                if not shared.listeners and self._shared.get(key) is shared:
                    del self._shared[key]
            raise
        return Listener(request_id, shared, gone, lambda: self._leave(shared))

    def _take_in(self, key: bytes, request_id: str, shared: _SharedAnswer[T], items: Iterator[T | None]) -> None:
        problem: Problem | ClientLeft | None = None
        try:
            for item in items:
                if item is None:
                    continue
                with shared.changed:
                    if isinstance(item, ProgressEvent | PassingBytes):
                        shared.passing = item
                    else:
                        shared.items.append(item)
                        shared.size += _tokens(item)
                        shared.passing = None
                    shared.changed.notify_all()
        except (Problem, ClientLeft) as error:
            problem = error.with_traceback(None)
        except Exception:  # noqa: BLE001 - logged, and every listener is told
            _log.exception("the answer to %s broke off", request_id)
            problem = Problem("the gateway failed; its log has the traceback")
        with self._lock:
            if self._shared.get(key) is shared and problem is None:
                self._complete[key] = shared
                self._kept_tokens += shared.size
                shared.ended_at = time.monotonic()
            elif self._shared.get(key) is shared:
                del self._shared[key]  # the next request begins it again
        with shared.changed:
            shared.problem, shared.ended = problem, True
            shared.changed.notify_all()

    def _is_abandoned(self, key: bytes, shared: _SharedAnswer[T]) -> bool:
        """Returns whether the answer shall be cancelled. If so, no listener can join it any more."""
        with self._lock:
            if shared.listeners or time.monotonic() < shared.left_at + ABANDONED_SECONDS:
                return False
            if self._shared.get(key) is shared:
                del self._shared[key]
            return True

    def _leave(self, shared: _SharedAnswer[T]) -> None:
        with self._lock:
            shared.listeners -= 1
            shared.left_at = time.monotonic()

    def _drop_old(self) -> None:
        oldest = time.monotonic() - KEPT_SECONDS
        while self._complete:
            key, shared = next(iter(self._complete.items()))
            if shared.ended_at >= oldest and self._kept_tokens <= MAX_KEPT_TOKENS:
                break
            self._kept_tokens -= shared.size
            del self._complete[key], self._shared[key]


def _tokens(item: object) -> int:
    if isinstance(item, bytes):
        return 1 + len(item) // _TOKEN_BYTES
    return 1 + (len(item.logprob.top) if isinstance(item, TokenEvent) and item.logprob is not None else 0)
