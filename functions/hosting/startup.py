"""The start of a function's process: its phases as seconds since the process began, and settings of allocator and collector."""

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
        """Marks the phase `process`, the start of Python itself, as ended."""
        self._began = time.monotonic() - _process_age_seconds()
        self._lock = threading.Lock()
        self._phases: dict[str, float] = {}
        self._listeners: list[Callable[[str, float], None]] = []
        self.loaded_bytes = self.total_bytes = 0  # of a stage's weights; 0 before the first came
        self.mark("process")

    def mark(self, phase: str) -> None:
        """Records that `phase` has ended now. Only its first mark counts."""
        seconds = time.monotonic() - self._began
        with self._lock:
            if phase in self._phases:
                return
            self._phases[phase] = round(seconds, 4)
            for tell in self._listeners:
                tell(phase, self._phases[phase])

    def report_to(self, tell: Callable[[str, float], None]) -> None:
        """Calls `tell` with every phase and its seconds: ended phases now, the others when they end."""
        with self._lock:
            self._listeners.append(tell)
            for phase, seconds in self._phases.items():
                tell(phase, seconds)

    def phases(self) -> dict[str, float]:
        """The seconds from the start of the process to the end of each phase that has ended."""
        with self._lock:
            return dict(self._phases)


@contextmanager
def without_collection() -> Iterator[None]:
    """Turns the garbage collector off while modules are imported, and excludes their objects from all later collections.

    Torch makes some 170,000 objects. Collections while their number grows take 0.15 s of a stage's start, later ones 0.05 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def use_few_arenas() -> None:
    """Lets all threads allocate from two arenas of glibc. Has no effect with other C libraries.

    Call it before there are threads.

    glibc makes up to eight arenas per core, and memory freed in one cannot be used by another. A gateway's hundreds of threads
    read large bodies now and then, and their 16 arenas grew for ever: 46 of 228 MiB were in use (docs/log.md). Most work holds
    the interpreter's lock, so threads seldom wait for an arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def return_free_memory(every_seconds: float = _TRIM_SECONDS) -> None:
    """Starts a thread that gives pages without live objects back to the kernel, again and again. Only with glibc.

    glibc itself returns only the end of an arena: after a burst, 30 of a gateway's 105 MiB were free and stayed resident.
    """

    def trim() -> None:
        while True:
            time.sleep(every_seconds)
            trim_memory()

    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        threading.Thread(target=trim, name="trim", daemon=True).start()


def trim_memory() -> None:
    """Gives pages without live objects back to the kernel. Has no effect with other C libraries than glibc."""
    malloc_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _process_age_seconds() -> float:
    """How long this process has existed, as the kernel reports it (to 10 ms)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): starttime is field 22, the third after the name is 0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
