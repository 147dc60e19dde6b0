"""How many threads a stage computes with, and how torch's wait, which must be set before torch is imported."""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

WAITING: Final = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
"""Read by OpenMP when torch is loaded. A thread waits awake for so many turns: enough for what lies between two parallel
operators of a pass, and over soon after the pass; docs/log.md compares counts."""

_SMOOTHING: Final = 0.5
_BUSY: Final = 0.58
"""Three stages that take turns with one micro-batch are busy a third of the time each; sharing two cores, two thirds."""

_CGROUP_V2: Final = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1: Final = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


class PassThreads:
    """How many threads the next pass computes with, where stages share cores and threads wait for each other (in torch's
    operators): all while this stage is mostly idle.

    A stage that is idle for more than half of the time waits for the others, so that the cores are its own when it is its
    turn. One that is busy keeps to its share, or threads of several stages would wait for each other.
    """

    def __init__(self, threads: int, busy_threads: int) -> None:
        """busy_threads: 0 for `threads`, whatever happens."""
        self._threads = threads
        self._busy_threads = busy_threads or threads
        self._busy = 0.0
        """Share of the time, moving average over passes."""
        self._last: tuple[float, float] | None = None
        """When the last pass began and ended."""

    def begin(self, now: float) -> int:
        """Threads of the pass that begins now, in seconds of any one clock."""
        if self._last is not None:
            began, ended = self._last
            self._busy += ((ended - began) / max(now - began, 1e-9) - self._busy) * _SMOOTHING
        return self._busy_threads if self._busy > _BUSY else self._threads

    def end(self, began: float, now: float) -> None:
        self._last = (began, now)


def thread_count(configured: int) -> int:
    """`configured`, or for 0 the whole cores that this process may use: its CPU limit, or those it may run on."""
    if configured:
        return configured
    cores = usable_cores()
    limit = _cpu_limit()
    return cores if limit is None else max(1, min(cores, int(limit)))


def usable_cores() -> int:
    """Those that this process may run on, whatever its CPU limit."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def set_openmp(environ: MutableMapping[str, str], threads: int) -> None:
    """Threads that wait for more than an operator sleep: spinning costs 2 to 5 times where several stages share cores."""
    environ["OMP_NUM_THREADS"] = str(threads)
    environ.update(WAITING)


def _cpu_limit() -> float | None:
    """Cores that the cgroup allows, such as 1.5; None where there is no limit."""
    try:
        quota, period = _CGROUP_V2.read_text().split()
    except (OSError, ValueError):
        quota, period = _cpu_limit_v1()
    return int(quota) / int(period) if quota.isdigit() else None


def _cpu_limit_v1() -> tuple[str, str]:
    try:
        quota, period = (path.read_text().strip() for path in _CGROUP_V1)
    except OSError:
        return "max", "1"
    return quota, period
