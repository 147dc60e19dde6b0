"""The start of a function's process: when its phases end, and settings of the memory allocator and the garbage collector."""

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

# In the order in which they end unless some overlap: Python runs, libraries are imported, the store answered, the first and the
# last byte of the weights arrived, the weights lie in the layers, one step has run.
PHASES: Final = ("process", "import", "connect", "first_byte", "last_byte", "place", "warm_up")

_M_ARENA_MAX: Final = -8  # mallopt(3)
_ARENAS: Final = 2
_TRIM_SECONDS: Final = 30.0


class StartUp:
    """Records when each phase of the start ends, in seconds since the process began. Thread-safe."""

    def __init__(self) -> None:
        """Records that the phase `process`, the start of Python itself, has ended."""
        self._began = time.monotonic() - _process_age_seconds()
        self._lock = threading.Lock()
        self._phases: dict[str, float] = {}
        self._listeners: list[Callable[[str, float], None]] = []
        self.loaded_bytes = self.total_bytes = 0  # of a stage's weights; 0 before the first came
        self.mark("process")

    def mark(self, phase: str) -> None:
        """Records that `phase` has ended now. Further calls for the same phase have no effect."""
        seconds = time.monotonic() - self._began
        with self._lock:
            if phase in self._phases:
                return
            self._phases[phase] = round(seconds, 4)
            for tell in self._listeners:
                tell(phase, self._phases[phase])

    def report_to(self, tell: Callable[[str, float], None]) -> None:
        """Calls `tell` with the name and the end of every phase: now for ended phases, and later when others end.

        The end is in seconds since the process began.
        """
        with self._lock:
            self._listeners.append(tell)
            for phase, seconds in self._phases.items():
                tell(phase, seconds)

    def phases(self) -> dict[str, float]:
        """Returns when each ended phase ended, in seconds since the process began."""
        with self._lock:
            return dict(self._phases)


@contextmanager
def without_collection() -> Iterator[None]:
    """Context manager that turns the garbage collector off while modules are imported.

    At its end it excludes all objects so far from later collections. Torch makes some 170,000 objects: collections while their
    number grows take 0.15 s of a stage's start, and later ones 0.05 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def use_few_arenas() -> None:
    """Makes all threads allocate from two arenas of glibc. Call it before other threads start.

    No effect with other C libraries. glibc makes up to eight arenas per core, and memory freed in one cannot be used by
    another. A gateway's hundreds of threads read large bodies now and then, and their 16 arenas grew for ever: 46 of 228 MiB
    were in use (docs/log.md). Most work holds the interpreter's lock, so threads seldom wait for an arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def return_free_memory(every_seconds: float = _TRIM_SECONDS) -> None:
    """Starts a thread that regularly returns unused pages to the kernel. Has no effect with other C libraries than glibc.

    glibc itself returns only the end of an arena: after a burst, 30 of a gateway's 105 MiB were free and stayed resident.
    """

    def trim() -> None:
        while True:
            time.sleep(every_seconds)
            trim_memory()

    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        threading.Thread(target=trim, name="trim", daemon=True).start()


def trim_memory() -> None:
    """Returns unused pages to the kernel. Has no effect with other C libraries than glibc."""
    malloc_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _process_age_seconds() -> float:
    """Returns how long this process has existed, as the kernel reports it (with a precision of 10 ms)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): starttime is field 22, the third after the name is 0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
