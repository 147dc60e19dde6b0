"""Decides how many lines of batches are answered at the same time: as many as live traffic leaves capacity for."""

import threading
from collections.abc import Callable
from typing import Final

TICK_SECONDS: Final = 0.25
_FIRST: Final = 8


class Slot:
    """The right to answer one line of a batch."""

    def __init__(self) -> None:
        self.preempted = False  # the line shall be given up, for live traffic
        self.is_waiting: Callable[[], bool] = lambda: True  # whether the pipeline has not begun it


class Allowance:
    """Limits the lines that are answered at once: more while no live request waits, fewer as soon as one does. Thread-safe.

    The limit grows by a quarter every TICK_SECONDS, while the pipeline soon begins the lines that it gets. It is halved if live
    requests wait at two ticks in a row. Slots above the limit are then preempted, the newest first.
    """

    def __init__(self, most: int, waiting: Callable[[], int]) -> None:
        """Never allows more than `most` lines.

        `waiting` returns the number of all sequences that the scheduler has not begun.
        """
        self._most = most
        self._waiting = waiting
        self._allowed = min(_FIRST, most)
        self._slots: list[Slot] = []
        self._live_before = False
        self._changed = threading.Condition()

    def enter(self, stopped: Callable[[], bool]) -> Slot | None:
        """Waits for a slot and returns it. Returns None once `stopped` is true."""
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
        """Adapts the limit; call it every TICK_SECONDS. Live traffic cannot push it below `least` lines."""
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
