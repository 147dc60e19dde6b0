"""How many threads a stage computes with, and how they wait. Must be set before torch is imported."""

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

_CGROUP_V2: Final = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1: Final = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def thread_count(configured: int) -> int:
    """`configured`, or for 0 the whole cores that this process may use: its CPU limit, or those it may run on."""
    if configured:
        return configured
    cores = len(os.sched_getaffinity(0))
    limit = _cpu_limit()
    return cores if limit is None else max(1, min(cores, int(limit)))


def set_openmp(environ: MutableMapping[str, str], threads: int) -> None:
    """Threads that wait for work sleep: spinning costs 2 to 5 times where several stages share cores."""
    environ["OMP_NUM_THREADS"] = str(threads)
    environ["OMP_WAIT_POLICY"] = "passive"


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
