"""The phases of a function's start, as seconds since its process began."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

PHASES: Final = ("process", "import", "connect", "first_byte", "last_byte", "place", "warm_up")
"""In the order in which they end, were nothing overlapping: Python runs, libraries are imported, the store answered, weights
began to arrive, all arrived, they lie in the layers, one step has run."""


def process_age_seconds() -> float:
    """How long this process has existed, by the kernel's account (to 10 ms)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): starttime is field 22, the third behind the name is 0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


class StartUp:
    """Marks phases from any thread."""

    def __init__(self) -> None:
        """Marks `process`."""
        self._began = time.monotonic() - process_age_seconds()
        self._lock = threading.Lock()
        self._phases: dict[str, float] = {}
        self._listeners: list[Callable[[str, float], None]] = []
        self.mark("process")

    def mark(self, phase: str, at: float | None = None) -> None:
        """The phase ended now, or at this reading of time.monotonic(). The first mark of a phase counts."""
        seconds = (time.monotonic() if at is None else at) - self._began
        with self._lock:
            if phase in self._phases:
                return
            self._phases[phase] = round(seconds, 4)
            for tell in self._listeners:
                tell(phase, self._phases[phase])

    def report_to(self, tell: Callable[[str, float], None]) -> None:
        """`tell` gets every phase with its seconds: those that have ended at once, the others when they end."""
        with self._lock:
            self._listeners.append(tell)
            for phase, seconds in self._phases.items():
                tell(phase, seconds)

    def phases(self) -> dict[str, float]:
        """Phase → seconds from the start of the process to its end, of the phases that ended."""
        with self._lock:
            return dict(self._phases)
