"""Virtual time: events in the order of their moments, and the product's code reads the same clock."""

import heapq
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from unittest import mock


class Clock:
    """Calls functions at moments of a virtual time, which begins at 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()  # events of one moment come in the order in which they were added

    def after(self, seconds: float, event: Callable[[], object]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))

    def _read(self) -> float:
        return self.now

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = until

    @contextmanager
    def instead_of_real_time(self, seed: int) -> Iterator[None]:
        """Inside it, time.monotonic() is this clock, and jitter repeats with the seed. One at a time in a process."""
        before = random.getstate()
        random.seed(seed)
        try:
            with mock.patch.object(time, "monotonic", self._read):
                yield
        finally:
            random.setstate(before)
