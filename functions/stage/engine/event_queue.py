"""The queue of a stage's events. It chooses the events that the next forward pass merges."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, TypeVar

from eventing.problems import NotReady
from eventing.wire.events import Batch

_MERGED_TOKENS: Final = 512  # a pass with more tokens gains nothing, and each of its sequences waits for all of them

T = TypeVar("T")


class Work(Generic[T]):
    """A unit of work that a thread submits to the engine. The thread waits for `result`.

    The engine calls `answer` or `fail` exactly once. The class replaces concurrent.futures.Future, which takes four times as
    many Python calls.
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
        """Blocks until the work is done and returns the answer. Raises the error if the work failed. Call it once."""
        with self._pending:
            if self._error is not None:
                try:
                    raise self._error
                finally:
                    self._error = None  # in a cycle with its traceback's frames, it would hold the event's bytes
            return self._value


class ForwardEvent(Work[Batch]):
    """An event to compute in a forward pass. The result is the reply."""

    def __init__(
        self,
        batch: Batch,
        source: str,
        expires_at: float | None = None,
        arrived: float = 0.0,
        lineage: str | None = None,
    ) -> None:
        """Creates an event that waits for its pass.

        source: names the gateway. expires_at: seconds since the epoch; if None, the event never expires.

        arrived: time of arrival, from time.perf_counter(). lineage: of the KV that the rows will have; None if unknown.
        """
        super().__init__()
        self.batch = batch
        self.source = source
        self.lineage = lineage
        self.expires_at = expires_at
        self.arrived = arrived
        self.prompts = any(row.length - row.draft_tokens > 1 for row in batch.rows)  # it has a chunk of a prompt
        # Duration of the forward pass that computed the event, and tokens of all events in that pass. Set before the answer.
        self.pass_seconds = 0.0
        self.pass_tokens = 0
        self.ids: set[str] = set()  # of the rows; the queue fills it
        self.overtaken = False  # a chunk of a prompt has come before it; the queue sets it
        self.stale: set[int] = set()  # indexes of rows not to be computed: superseded by a newer step, or released


class Call(Work[Any]):
    """A function that the engine calls between two passes. The result is what the function returns."""

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__()
        self.action = action


class EventQueue:
    """Events and calls that wait for the engine. Thread-safe; only the thread that holds the engine's lock calls `take`.

    A pass merges events from the head of the queue: at most `max_merge`, and at most 1 / `num_stages` of the waiting events.
    Without the second limit all micro-batches would travel together, and only one stage would work at a time. There is one
    exception: if a chunk of a prompt is first, one event with decode steps may join it, which hardly delays the chunk. Events
    that share a sequence are never merged, and keep their order.

    A chunk of a prompt overtakes the decode steps that wait, since a first token needs few passes and an answer many. No event
    is overtaken twice, so that decode steps do not starve.
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

        If the queue already has a newer step of a row's sequence, marks the row as stale. wakes: whether to wake the engine's
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
            self._waiting.insert(self._place(event), event)
            if wakes:
                self._changed.notify()

    def _place(self, event: ForwardEvent) -> int:
        """Returns the index of a new event among those that wait, and marks the events that it overtakes."""
        place = len(self._waiting)
        while event.prompts and place:
            before = self._waiting[place - 1]
            if before.prompts or before.overtaken or not before.ids.isdisjoint(event.ids):
                break
            before.overtaken = True
            place -= 1
        return place

    def call(self, action: Callable[[], T]) -> T:
        """Makes the engine call `action` between two passes, and returns the result of `action`.

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
        """Blocks until there is work, the queue is closed, or the time has passed.

        Returns False only if the queue is closed and empty: no more work will follow.
        """
        with self._lock:
            self._changed.wait_for(lambda: self._calls or self._waiting or self._closed, timeout_seconds)
            return bool(self._calls or self._waiting) or not self._closed

    def take(self) -> tuple[list[Call], list[ForwardEvent]]:
        """Removes the engine's next work from the queue and returns it. Does not block.

        If there are calls (functions to run between two passes), returns all of them and no event. Otherwise returns the
        events that the next forward pass merges. Both lists are empty if there is no work.
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
        """Forgets the steps of computed events. Call it before the events are answered."""
        with self._lock:
            for event in events:
                for row in event.batch.rows:
                    steps = self._steps[event.source, row.id]
                    steps.remove((row.attempt, row.position))
                    if not steps:
                        del self._steps[event.source, row.id]

    def mark_released(self, id_: str, attempt: int, source: str) -> None:
        """Marks waiting rows of a released sequence as stale, so that they do not begin the sequence again.

        attempt: the released attempt. Rows of newer attempts are not marked.
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

        in_hand: work that the engine has already taken from the queue. It fails too.
        """
        with self._lock:
            self._closed = True
            abandoned: list[Work[Any]] = [*in_hand, *self._calls, *self._waiting]
            self._calls, self._waiting = [], []
            self._changed.notify()
        for work in abandoned:
            if not work.answered:
                work.fail(NotReady("the stage stopped before this was done"))
