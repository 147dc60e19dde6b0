"""Reads metrics of function processes."""

import asyncio
import re

from functions.gateway.fleet.overview import MemberState
from knative.commands.local_pods import read_metrics
from knative.local.kubelet.pods import LocalPod
from tests.support.functions.functions import FunctionProcess


def metric(function: FunctionProcess, name: str) -> float:
    """Sum over all labels; 0 if there is none yet."""
    page: str = function.get("/metrics")[1]
    values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, values))


async def pod_metrics(pod: LocalPod) -> dict[str, float]:
    """Metrics of a pod: name → value, summed over labels. A pod that does not answer, as on a busy machine, is asked again."""
    while not (samples := await asyncio.to_thread(read_metrics, {"metrics_port": pod.metrics_port})):
        await asyncio.sleep(0.1)
    return samples


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
