"""How many threads a stage computes with, and how torch's threads wait, which must be set before torch is imported."""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

# OpenMP reads these when torch is loaded. A thread spins for so many turns: enough between parallel operators, and over soon
# after a pass. docs/log.md compares counts.
WAITING: Final = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}

_SMOOTHING: Final = 0.5
# Share of the time from which a stage counts as busy. Three stages that take turns with one micro-batch are busy for a third of
# the time each; if they share two cores, for two thirds.
_BUSY: Final = 0.58

_CGROUP_V2: Final = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1: Final = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


class PassThreads:
    """Chooses the threads of each pass for stages that share cores and whose threads wait for each other, as torch's do.

    A stage that is mostly idle waits for the others, so it has the cores for itself during its turn, and uses all threads. A
    busy stage keeps to its share; otherwise threads of several stages would wait for each other.
    """

    def __init__(self, threads: int, busy_threads: int) -> None:
        """busy_threads: of a busy stage; 0: `threads`."""
        self._threads = threads
        self._busy_threads = busy_threads or threads
        self._busy = 0.0  # share of the time, moving average over passes
        self._last: tuple[float, float] | None = None  # when the last pass began and ended

    def begin(self, now: float) -> int:
        """Threads of the pass that begins now. now: seconds of any clock."""
        if self._last is not None:
            began, ended = self._last
            self._busy += ((ended - began) / max(now - began, 1e-9) - self._busy) * _SMOOTHING
        return self._busy_threads if self._busy > _BUSY else self._threads

    def end(self, began: float, now: float) -> None:
        self._last = (began, now)


def thread_count(configured: int) -> int:
    """`configured`, or if that is 0 the whole cores within this process's CPU limit and affinity."""
    if configured:
        return configured
    cores, limit = usable_cores(), _cpu_limit()
    return cores if limit is None else max(1, min(cores, int(limit)))


def usable_cores() -> int:
    """Cores in this process's affinity mask. Ignores its CPU limit."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def set_openmp(environ: MutableMapping[str, str], threads: int) -> None:
    """Lets waiting threads sleep soon: if several stages share cores, spinning makes passes 2 to 5 times as slow."""
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
