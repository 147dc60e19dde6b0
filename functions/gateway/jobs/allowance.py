"""How many lines of batches are answered at the same time: as many as live traffic leaves."""

import threading
from collections.abc import Callable
from typing import Final

TICK_SECONDS: Final = 0.25
_FIRST: Final = 8


class Slot:
    """The place of one line that is being answered."""

    def __init__(self) -> None:
        self.preempted = False  # the line shall be given up, for live traffic
        self.is_waiting: Callable[[], bool] = lambda: True  # whether the pipeline has not begun it


class Allowance:
    """Limits the lines that are answered at once: more while no live request waits, fewer as soon as one does. Thread-safe.

    The number of places grows by a quarter every TICK_SECONDS, while the pipeline begins what it gets, and is halved while live
    requests wait for longer than that. Lines that have no place any more are given up, the newest first.
    """

    def __init__(self, most: int, waiting: Callable[[], int]) -> None:
        """waiting: number of all sequences that the scheduler has not begun."""
        self._most = most
        self._waiting = waiting
        self._allowed = min(_FIRST, most)
        self._slots: list[Slot] = []
        self._live_before = False
        self._changed = threading.Condition()

    def enter(self, stopped: Callable[[], bool]) -> Slot | None:
        """Waits for a place. None: `stopped` has become true."""
        with self._changed:
            while not stopped():
                if len(self._slots) < self._allowed:
                    slot = Slot()
                    self._slots.append(slot)
                    return slot
                self._changed.wait(TICK_SECONDS)
            return None

    def leave(self, slot: Slot) -> None:
        with self._changed:
            self._slots.remove(slot)
            self._changed.notify_all()

    def tick(self, least: int) -> None:
        """Adapts the number of places. least: places that live traffic does not take. Call it every TICK_SECONDS."""
        waiting = self._waiting()
        with self._changed:
            own = sum(slot.is_waiting() for slot in self._slots)
            live = waiting > own
            if live and self._live_before:
                self._allowed = max(least, min(self._allowed, len(self._slots)) // 2)
                for slot in self._slots[self._allowed :]:
                    slot.preempted = True
            elif not live and own <= 1 + len(self._slots) // 8:
                self._allowed = min(self._most, self._allowed + max(1, self._allowed // 4))
            self._live_before = live
            self._changed.notify_all()
