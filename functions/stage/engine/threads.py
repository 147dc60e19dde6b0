"""How many threads a stage computes with, and how torch's threads wait, which must be set before torch is imported."""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

# OpenMP reads these when torch is loaded. An idle thread loops 2,000 times before it sleeps: long enough to be awake for the
# next operator of a pass, and short after its end. docs/log.md compares counts.
WAITING: Final = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}

_SMOOTHING: Final = 0.5
# A stage is busy if it computes for more than this share of the time. Three stages that compute
# one after the other do so for a third of the time each; three that keep two cores busy, for two thirds.
_BUSY: Final = 0.58

_CGROUP_V2: Final = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1: Final = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


class PassThreads:
    """Chooses the number of threads of each pass, for stages that share the cores of a machine and compute with torch.

    If a stage is mostly idle, the others wait while it computes: it has the cores for itself, and uses all threads. A busy
    stage uses fewer, because other stages compute at the same time, and torch's threads wait for each other.
    """

    def __init__(self, threads: int, busy_threads: int) -> None:
        """threads: of a pass while the stage is mostly idle. busy_threads: while it is busy; 0: as many as `threads`."""
        self._threads = threads
        self._busy_threads = busy_threads or threads
        self._busy = 0.0  # share of the time, moving average over passes
        self._last: tuple[float, float] | None = None  # when the last pass began and ended

    def begin(self, now: float) -> int:
        """The number of threads for the pass that begins now. now: seconds of any monotonic clock, the same as for `end`."""
        if self._last is not None:
            began, ended = self._last
            self._busy += ((ended - began) / max(now - began, 1e-9) - self._busy) * _SMOOTHING
        return self._busy_threads if self._busy > _BUSY else self._threads

    def end(self, began: float, now: float) -> None:
        """Counts a pass: it began at `began` and has ended `now`."""
        self._last = (began, now)


def thread_count(configured: int) -> int:
    """The threads to compute with: `configured`, or if that is 0 the whole cores that this process may use, at least one.

    These are limited by its CPU affinity and by the CPU quota of its cgroup.
    """
    if configured:
        return configured
    cores, limit = usable_cores(), _cpu_limit()
    return cores if limit is None else max(1, min(cores, int(limit)))


def usable_cores() -> int:
    """Cores in this process's affinity mask. Ignores its CPU limit."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def set_openmp(environ: MutableMapping[str, str], threads: int) -> None:
    """Sets OpenMP's variables in `environ`: its threads, and that one that waits soon sleeps. Call it before torch loads.

    If several stages share cores, threads that wait in a loop make passes 2 to 5 times as slow.
    """
    environ["OMP_NUM_THREADS"] = str(threads)
    environ.update(WAITING)


def _cpu_limit() -> float | None:
    """Cores that the cgroup allows, such as 1.5; None: no limit."""
    try:
        quota, period = _CGROUP_V2.read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (path.read_text().strip() for path in _CGROUP_V1)
        except OSError:
            return None
    return int(quota) / int(period) if quota.isdigit() else None
