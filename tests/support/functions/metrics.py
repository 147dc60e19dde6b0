"""Reads metrics of function processes."""

import re

from functions.gateway.fleet.overview import MemberState
from tests.support.functions.functions import FunctionProcess


def metric(function: FunctionProcess, name: str) -> float:
    """Sum over all labels; 0 if there is none yet."""
    page: str = function.get("/metrics")[1]
    values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, values))


def member_state(model: str, pods: int = 1, pod_seconds: float = 1.0, wait: float | None = None) -> MemberState:
    """A member of a fleet with one stage. wait: seconds for which its oldest request waits for a device."""
    return MemberState(
        model=model,
        state="serving",
        stages=1,
        pods=pods,
        pod_seconds=pod_seconds,
        tokens_per_second=0.0,
        running=0,
        waiting=0,
        device_wait_seconds=wait,
    )
