"""What the imports of a role cost, in processor time: a busy machine changes that little."""

import os
import resource
import subprocess
import sys
from pathlib import Path

from bench.coldstart_imports import PROGRAMS

ROOT = Path(__file__).resolve().parent.parent
TRIES = 2


def cpu_seconds(code: str) -> float:
    """Of a whole process that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_lean_stage_costs_little_more_than_torch() -> None:
    torch, stage = (min(cpu_seconds(PROGRAMS[name]) for _ in range(TRIES)) for name in ("import torch", "lean stage"))
    assert stage <= 1.35 * torch


def test_a_gateway_is_there_at_once() -> None:
    assert min(cpu_seconds(PROGRAMS["gateway"]) for _ in range(TRIES)) < 0.5
