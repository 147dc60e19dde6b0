"""Members of a fleet on a simulated clock: the gateway's own grants, and Knative's times for a pod that comes and goes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from functions.gateway.fleet.grant_record import Claim, GrantRecord, LocalRecord
from functions.gateway.fleet.grants import Grants, MemberPods
from knative.local.autoscaler.kpa import TICK_SECONDS
from knative.local.kubelet.pods import PodTiming

_START_SECONDS: Final = 2.65  # of a pod
_ANSWER_SECONDS: Final = 0.3
_WINDOW_SECONDS: Final = 6.0
_STEP_SECONDS: Final = 0.1
_REQUESTS_PER_SECOND: Final = 0.5
_QUIET_SECONDS: Final = PodTiming().drain_quiet_seconds
_BEGIN: Final = 1000.0


@dataclass(eq=False, slots=True)
class _Pod:
    until: float  # when it is ready, or gone if it leaves
    ready: bool = False
    leaving: bool = False


@dataclass(eq=False, slots=True)
class _Member:
    pods: list[_Pod] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)  # when each request came
    running: list[float] = field(default_factory=list)  # when each answer ends
    used_at: float = -_BEGIN

    def step(self, now: float, first_seconds: list[float], timeout_seconds: float, *, opened: bool) -> None:
        """Appends the seconds that requests waited. The last pod serves while it leaves."""
        self.running = [ends for ends in self.running if ends > now]
        self.pods = [each for each in self.pods if not (each.leaving and now >= each.until)]
        for pod in self.pods:
            if not pod.ready and now >= pod.until:
                pod.ready, self.used_at = True, now
        if self.waiting and opened:
            serving = [each for each in self.pods if each.ready and not each.leaving]
            serving += [each for each in self.pods if each.leaving]
            if serving:
                first_seconds += [now - came for came in self.waiting]
                self.running += [now + _ANSWER_SECONDS] * len(self.waiting)
                self.waiting = []
                if serving[0].leaving and timeout_seconds > _QUIET_SECONDS:
                    serving[0].until = now + _QUIET_SECONDS
            elif all(each.ready for each in self.pods):
                self.pods.append(_Pod(now + _START_SECONDS))
        if self.running:
            self.used_at = now
        if now // TICK_SECONDS != (now - _STEP_SECONDS) // TICK_SECONDS and now - self.used_at > _WINDOW_SECONDS:
            for pod in self.pods:
                if pod.ready and not pod.leaving:
                    pod.leaving, pod.until = True, now + min(_QUIET_SECONDS, timeout_seconds)


def simulate(members: int, seconds: float, devices: int, timeout_seconds: float) -> tuple[list[float], int]:
    """The seconds that each request waited, and the most pods at once. Requests draw members by Zipf's law.

    timeout_seconds: of a stage; it ends a drain.
    """
    dice, weights = random.Random(7), [1 / rank for rank in range(1, members + 1)]
    by_key = {f"m{number}": _Member() for number in range(members)}

    def pods_of(services: Sequence[str]) -> MemberPods:
        pods = by_key[services[0]].pods
        leaving = sum(each.leaving for each in pods)
        lasting = bool(pods) and leaving == len(pods)
        return MemberPods(len(pods), leaving - lasting, lasting or any(each.ready for each in pods))

    grants = Grants(devices, lambda: [(key,) for key in by_key], pods_of, LocalRecord())
    record, waits, peak = GrantRecord(), list[float](), 0
    now, due = _BEGIN, _BEGIN + dice.expovariate(_REQUESTS_PER_SECOND)
    while now < _BEGIN + seconds or any(each.waiting for each in by_key.values()):
        while due <= now and due < _BEGIN + seconds:
            by_key[f"m{dice.choices(range(members), weights)[0]}"].waiting.append(due)
            due += dice.expovariate(_REQUESTS_PER_SECOND)
        claims = {
            key: Claim(1, bool(each.running), each.waiting[0] if each.waiting else None)
            for key, each in by_key.items()
            if each.waiting or each.running
        }
        opened = grants.divide(record, claims, {key: each.used_at for key, each in by_key.items()}, now)
        for key, member in by_key.items():
            member.step(now, waits, timeout_seconds, opened=key in opened)
        peak, now = max(peak, sum(len(each.pods) for each in by_key.values())), now + _STEP_SECONDS
    return waits, peak
