"""Chooses how many threads a stage computes with, and sets how torch's threads wait.

The latter must happen before torch is imported.
"""

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

    A stage that is mostly idle usually computes while the other stages wait, so it uses all threads. A busy stage uses fewer
    threads: other stages compute at the same time, and torch's threads would wait for each other.
    """

    def __init__(self, threads: int, busy_threads: int) -> None:
        """Sets the two numbers of threads to choose from.

        threads: threads per pass while the stage is mostly idle.

        busy_threads: threads per pass while the stage is busy. If 0, `threads`.
        """
        self._threads = threads
        self._busy_threads = busy_threads or threads
        self._busy = 0.0  # share of the time, moving average over passes
        self._last: tuple[float, float] | None = None  # when the last pass began and ended

    def begin(self, now: float) -> int:
        """Returns the number of threads for the pass that begins now.

        now: seconds of a monotonic clock, the same clock as for `end`.
        """
        if self._last is not None:
            began, ended = self._last
            self._busy += ((ended - began) / max(now - began, 1e-9) - self._busy) * _SMOOTHING
        return self._busy_threads if self._busy > _BUSY else self._threads

    def end(self, began: float, now: float) -> None:
        """Counts a pass that began at `began` and has ended at `now`."""
        self._last = (began, now)


def thread_count(configured: int) -> int:
    """Returns how many threads to compute with.

    That is `configured`, unless it is 0. Then it is the number of whole cores that this process may use, at least one. The CPU
    affinity of the process and the CPU quota of its cgroup limit these cores.
    """
    if configured:
        return configured
    cores, limit = usable_cores(), _cpu_limit()
    return cores if limit is None else max(1, min(cores, int(limit)))


def usable_cores() -> int:
    """Returns the number of cores in the affinity mask of this process. Ignores the CPU quota."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def set_openmp(environ: MutableMapping[str, str], threads: int) -> None:
    """Sets OpenMP's variables in `environ`: the number of threads, and that a waiting thread soon sleeps.

    Call it before torch is imported. If several stages share cores, threads that wait in a loop make passes 2 to 5 times as
    slow.
    """
    environ["OMP_NUM_THREADS"] = str(threads)
    environ.update(WAITING)


def _cpu_limit() -> float | None:
    """Returns how many cores the cgroup allows, such as 1.5. None if there is no limit."""
    try:
        quota, period = _CGROUP_V2.read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (path.read_text().strip() for path in _CGROUP_V1)
        except OSError:
            return None
    return int(quota) / int(period) if quota.isdigit() else None
