"""The queue of a stage's events, and the choice of those that the next forward pass merges."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, TypeVar

from eventing.problems import NotReady
from eventing.wire.events import Batch

_MERGED_TOKENS: Final = 512  # a pass with more tokens gains nothing, and each of its sequences waits for all of them

T = TypeVar("T")


class Work(Generic[T]):
    """Work that one thread hands to the engine, and its result, for which that thread waits. Answer it or fail it exactly once.

    It is a smaller concurrent.futures.Future, which would take four times as many Python calls.
    """

    def __init__(self) -> None:
        self.answered = False
        self._value: T
        self._error: BaseException | None = None
        self._pending = threading.Lock()
        self._pending.acquire()

    def answer(self, value: T) -> None:
        self._value, self.answered = value, True
        self._pending.release()

    def fail(self, error: BaseException) -> None:
        self._error, self.answered = error, True
        self._pending.release()

    def result(self) -> T:
        """Blocks until there is an answer. Raises the error if the work failed. Call it once."""
        with self._pending:
            if self._error is not None:
                try:
                    raise self._error
                finally:
                    self._error = None  # in a cycle with its traceback's frames, it would hold the event's bytes
            return self._value


class ForwardEvent(Work[Batch]):
    """An event to compute in a forward pass; its result is the reply."""

    def __init__(
        self,
        batch: Batch,
        source: str,
        expires_at: float | None = None,
        arrived: float = 0.0,
        lineage: str | None = None,
    ) -> None:
        """source: names the gateway. expires_at: seconds since the epoch; None: never. arrived: time.perf_counter().

        lineage: of the KV that the event's rows get; None: unknown.
        """
        super().__init__()
        self.batch = batch
        self.source = source
        self.lineage = lineage
        self.expires_at = expires_at
        self.arrived = arrived
        self.prompts = any(row.length - row.draft_tokens > 1 for row in batch.rows)  # it has a chunk of a prompt
        # The forward pass that computed it: its seconds, and the tokens of all events that it merged. Set before the answer.
        self.pass_seconds = 0.0
        self.pass_tokens = 0
        self.ids: set[str] = set()  # of the rows; the queue fills it
        self.stale: set[int] = set()  # indexes of rows not to be computed: superseded by a newer step, or released


class Call(Work[Any]):
    """A function that the engine calls between two passes; its result is what the function returns."""

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__()
        self.action = action


class EventQueue:
    """Events and calls that wait for the engine. Thread-safe; only the thread that holds the engine's lock calls `take`.

    A pass merges the events at the head of the queue, at most `max_merge` and at most one in `num_stages` of those that wait.
    Without the second limit all micro-batches would travel as one convoy: one stage would work and the others would idle. Only
    a decode step joins a prompt's chunk that is first: it comes sooner than in a pass of its own, and the chunk hardly later.
    Events that share a sequence are never merged, and keep their order.
    """

    def __init__(self, num_stages: int, max_merge: int) -> None:
        self._num_stages = num_stages
        self._max_merge = max_merge
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._calls: list[Call] = []
        self._waiting: list[ForwardEvent] = []
        # (source, id) → attempt and position of its rows that wait or are being computed
        self._steps: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        self._closed = False

    def put(self, event: ForwardEvent, *, wakes: bool = True) -> None:
        """Adds an event. Raises NotReady after `close`.

        Marks rows of the event that are older than others of their sequence as stale. wakes: whether to wake the engine's
        thread; False if the caller will compute the event itself.
        """
        with self._lock:
            if self._closed:
                raise NotReady("the stage takes no more work: it is shutting down")
            for index, row in enumerate(event.batch.rows):
                event.ids.add(row.id)
                step = (row.attempt, row.position)
                steps = self._steps[event.source, row.id]
                if steps and step < max(steps):
                    event.stale.add(index)
                steps.append(step)
            self._waiting.append(event)
            if wakes:
                self._changed.notify()

    def call(self, action: Callable[[], T]) -> T:
        """Has the engine call `action` between two passes, and returns its result.

        Raises NotReady after `close`, and what `action` raises.
        """
        call = Call(action)
        with self._lock:
            if self._closed:
                raise NotReady("the stage takes no more work: it is shutting down")
            self._calls.append(call)
            self._changed.notify()
        result: T = call.result()
        return result

    def wait(self, timeout_seconds: float) -> bool:
        """Blocks until there is work or the time is over.

        False only if the queue is closed and empty, so that no work will come.
        """
        with self._lock:
            self._changed.wait_for(lambda: self._calls or self._waiting or self._closed, timeout_seconds)
            return bool(self._calls or self._waiting) or not self._closed

    def take(self) -> tuple[list[Call], list[ForwardEvent]]:
        """Removes and returns the engine's next work, without waiting: two empty lists if there is none.

        Calls (functions to be called between two passes) come first: all of them and no event. Otherwise the events that the
        next forward pass merges.
        """
        with self._lock:
            if self._calls:
                calls, self._calls = self._calls, []
                return calls, []
            limit = min(self._max_merge, -(-len(self._waiting) // self._num_stages))
            chosen: list[ForwardEvent] = []
            left: list[ForwardEvent] = []
            seen_ids: set[str] = set()
            tokens = 0
            for event in self._waiting:
                fits = not chosen or tokens + len(event.batch.token_ids) <= _MERGED_TOKENS
                joins = len(chosen) == 1 < self._max_merge and chosen[0].prompts and not event.prompts
                if (len(chosen) < limit or joins) and fits and seen_ids.isdisjoint(event.ids):
                    chosen.append(event)
                    tokens += len(event.batch.token_ids)
                else:
                    left.append(event)
                seen_ids |= event.ids
            self._waiting = left
            return [], chosen

    def wake(self) -> None:
        """Wakes the engine's thread if work waits. Call it after another thread has computed an event."""
        if self._calls or self._waiting:
            with self._lock:
                self._changed.notify()

    def done(self, events: Iterable[ForwardEvent]) -> None:
        """Ends the bookkeeping of events that have been computed. Call it before they are answered."""
        with self._lock:
            for event in events:
                for row in event.batch.rows:
                    steps = self._steps[event.source, row.id]
                    steps.remove((row.attempt, row.position))
                    if not steps:
                        del self._steps[event.source, row.id]

    def mark_released(self, id_: str, attempt: int, source: str) -> None:
        """Marks waiting rows of a released sequence as stale, so that they do not begin it again.

        attempt: the one released; rows of it and of older attempts are marked.
        """
        with self._lock:
            for event in self._waiting:
                if event.source == source and id_ in event.ids:
                    for index, row in enumerate(event.batch.rows):
                        if row.id == id_ and row.attempt <= attempt:
                            event.stale.add(index)

    def close(self) -> None:
        """Refuses new work. Work that waits is still computed."""
        with self._lock:
            self._closed = True
            self._changed.notify()

    def abandon(self, in_hand: Iterable[Work[Any]] = ()) -> None:
        """Closes the queue and fails all unanswered work with NotReady.

        in_hand: work that was taken from the queue already, and fails too.
        """
        with self._lock:
            self._closed = True
            abandoned: list[Work[Any]] = [*in_hand, *self._calls, *self._waiting]
            self._calls, self._waiting = [], []
            self._changed.notify()
        for work in abandoned:
            if not work.answered:
                work.fail(NotReady("the stage stopped before this was done"))
