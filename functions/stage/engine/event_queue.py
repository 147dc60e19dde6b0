"""The events that are at a stage, waiting or being computed, and which of them the next pass takes."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from eventing.problems import NotReady
from eventing.wire.events import Batch

_MERGED_TOKENS: Final = 512
"""A pass with more tokens gains nothing from more, and each of its sequences waits for all of them."""


@dataclass(eq=False, slots=True)
class WaitingEvent:
    batch: Batch
    source: str
    expires_at: float | None
    arrived: float
    """By `time.perf_counter`."""
    stale: set[int] = field(default_factory=set)
    """Indexes of rows that must not be computed: older than a step that was here already, or released meanwhile."""
    reply: "Future[Batch]" = field(default_factory=Future)
    ids: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = frozenset(row.id for row in self.batch.rows)


@dataclass(eq=False, slots=True)
class Call:
    """Something for the engine's thread to do between two passes."""

    action: Callable[[], Any]
    reply: "Future[Any]" = field(default_factory=Future)


def most_merged(waiting: int, num_stages: int, max_merge: int) -> int:
    """Events in one pass, of so many that wait."""
    return min(max_merge, -(-waiting // num_stages))


class EventQueue:
    """Filled by many threads, emptied by the one whose turn it is.

    A pass merges the events at the head, at most `max_merge` and at most the stage's share of what waits: with
    `num_stages` in the pipeline, one in so many. Merged without that limit, all micro-batches would travel as one convoy
    with one stage working and the others idle. Events that share a sequence never meet in a pass, and keep their order.
    """

    def __init__(self, num_stages: int, max_merge: int) -> None:
        self._num_stages = num_stages
        self._max_merge = max_merge
        self._changed = threading.Condition()
        self._calls: list[Call] = []
        self._waiting: list[WaitingEvent] = []
        self._here: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        """(source, id) → attempt and position of the rows that wait or are computed."""
        self._closed = False

    def put(self, event: WaitingEvent, *, wakes: bool = True) -> None:
        """wakes: the engine's thread; not where who brings it will take it. Raises NotReady once closed."""
        with self._changed:
            self._refuse_when_closed()
            for index, row in enumerate(event.batch.rows):
                step = (row.attempt, row.position)
                here = self._here[event.source, row.id]
                if here and step < max(here):
                    event.stale.add(index)
                here.append(step)
            self._waiting.append(event)
            if wakes:
                self._changed.notify()

    def call(self, call: Call) -> None:
        """Raises NotReady once closed."""
        with self._changed:
            self._refuse_when_closed()
            self._calls.append(call)
            self._changed.notify()

    def wait(self, timeout_seconds: float) -> bool:
        """Until something is to be taken, for so long at most. False once closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._waiting or self._closed, timeout_seconds)
            return bool(self._calls or self._waiting) or not self._closed

    def take(self) -> list[Call] | list[WaitingEvent]:
        """Calls, else the events of the next pass, if there are any."""
        with self._changed:
            if self._calls:
                calls, self._calls = self._calls, []
                return calls
            return self._next_events()

    def wake(self) -> None:
        """The engine's thread, if something is left for it."""
        with self._changed:
            if self._calls or self._waiting:
                self._changed.notify()

    def done(self, events: Iterable[WaitingEvent]) -> None:
        """These events are at the stage no more."""
        with self._changed:
            for event in events:
                for row in event.batch.rows:
                    here = self._here[event.source, row.id]
                    here.remove((row.attempt, row.position))
                    if not here:
                        del self._here[event.source, row.id]

    def mark_released(self, id_: str, attempt: int, source: str) -> None:
        """What still waits of a released sequence must not bring it back."""
        with self._changed:
            for event in self._waiting:
                if event.source == source and id_ in event.ids:
                    event.stale.update(
                        index for index, row in enumerate(event.batch.rows) if row.id == id_ and row.attempt <= attempt
                    )

    def close(self) -> None:
        """Takes nothing more; what waits stays to be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def abandon(self, in_hand: Sequence[Call | WaitingEvent] = ()) -> None:
        """Closes, and answers NotReady to all that waits, and to what is in hand and has no answer yet."""
        with self._changed:
            self._closed = True
            abandoned: list[Call | WaitingEvent] = [*in_hand, *self._calls, *self._waiting]
            self._calls, self._waiting = [], []
            self._changed.notify()
        for work in abandoned:
            if not work.reply.done():
                work.reply.set_exception(NotReady("the stage stopped before this was done"))

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise NotReady("the stage takes no more work: it is shutting down")

    def _next_events(self) -> list[WaitingEvent]:
        limit = most_merged(len(self._waiting), self._num_stages, self._max_merge)
        chosen: list[WaitingEvent] = []
        left: list[WaitingEvent] = []
        ids: set[str] = set()
        tokens = 0
        for event in self._waiting:
            fits = not chosen or tokens + len(event.batch.token_ids) <= _MERGED_TOKENS
            if len(chosen) < limit and fits and ids.isdisjoint(event.ids):
                chosen.append(event)
                tokens += len(event.batch.token_ids)
            else:
                left.append(event)
            ids |= event.ids
        self._waiting = left
        return chosen
