"""The same on a simulated clock: the gateway's own decisions, and Knative's times for a pod that comes and goes."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Final

from bench.many.devices import RATE
from bench.report import table
from functions.gateway.fleet.grant_record import Claim, GrantRecord, LocalRecord
from functions.gateway.fleet.grants import Grants, MemberPods
from knative.local.autoscaler.kpa import TICK_SECONDS
from knative.local.kubelet.pods import PodTiming

START_SECONDS: Final = 2.65  # of a pod
ANSWER_SECONDS: Final = 0.3
WINDOW_SECONDS: Final = 6.0
_FIRST_SECONDS: Final = 0.05  # of a first token from a pod that is ready
_STEP_SECONDS: Final = 0.1
_QUIET_SECONDS: Final = PodTiming().drain_quiet_seconds
_BEGIN: Final = 1000.0
_PATIENCE_SECONDS: Final = 600.0  # request_timeout_seconds of a gateway


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests whose moments are drawn. weights: of each model; seconds: for how long; rate: of all, a second."""

    told: str
    weights: Sequence[float]
    seconds: float
    rate: float


def by_zipf(members: int, seconds: float) -> Traffic:
    told = f"{RATE:g} requests a second for {seconds:g} s, models drawn by Zipf's law"
    return Traffic(told, [1 / rank for rank in range(1, members + 1)], seconds, RATE)


_OF_LMSYS: Final = (4002, 703, 702, 611, 533, 272, 176, 168, 163, 159, 116, 100, 94, 84, 75, 68, 65)
_LMSYS_SECONDS: Final = 43_200.0
LMSYS: Final = Traffic(
    "four hours of LMSYS-Chat-1M's 17 models, each as often as on its day 55, 0.19 requests a second "
    "(Duan et al., MuxServe, ICML 2024, `benchmark/chatlmsys`)",
    _OF_LMSYS,
    14_400.0,
    sum(_OF_LMSYS) / _LMSYS_SECONDS,
)
"""Requests for each model in half a day. Of the first one MuxServe has the sum only."""


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


@dataclass(frozen=True, slots=True)
class Simulated:
    first_seconds: Sequence[float]
    replica_seconds: float
    peak: int


def simulate(
    traffic: Traffic, devices: int | None, timeout_seconds: float, window_seconds: float = WINDOW_SECONDS
) -> Simulated:
    """devices: None: KPA for each member, which leaves a pod that terminates. timeout_seconds: of a stage; it ends a drain.

    window_seconds: infinite: each member always has its pod.
    """
    dice, members, weights, seconds = random.Random(7), len(traffic.weights), traffic.weights, traffic.seconds
    by_key = {f"m{number}": _Member() for number in range(members)}
    if math.isinf(window_seconds):
        for member in by_key.values():
            member.pods.append(_Pod(_BEGIN))
    lasts = devices is not None  # the last pod serves while it leaves

    def pods_of(services: Sequence[str]) -> MemberPods:
        pods = by_key[services[0]].pods
        leaving = sum(each.leaving for each in pods)
        lasting = bool(pods) and leaving == len(pods)
        return MemberPods(len(pods), leaving - lasting, lasting or any(each.ready for each in pods))

    grants = Grants(devices or members, lambda: [(key,) for key in by_key], pods_of, LocalRecord())
    record, first_seconds, pod_seconds, peak = GrantRecord(), list[float](), 0.0, 0
    now, due = _BEGIN, _BEGIN + dice.expovariate(traffic.rate)
    while now < _BEGIN + seconds or any(each.waiting for each in by_key.values()):
        while due <= now and due < _BEGIN + seconds:
            by_key[f"m{dice.choices(range(members), weights)[0]}"].waiting.append(due)
            due += dice.expovariate(traffic.rate)
        opened = set(by_key)
        if devices is not None:
            claims = {
                key: Claim(1, bool(each.running), each.waiting[0] if each.waiting else None)
                for key, each in by_key.items()
                if each.waiting or each.running
            }
            opened = grants.divide(record, claims, {key: each.used_at for key, each in by_key.items()}, now)
        for key, member in by_key.items():
            _step(member, now, first_seconds, timeout_seconds, window_seconds, opened=key in opened, lasts=lasts)
        pods = sum(len(each.pods) for each in by_key.values())
        pod_seconds, peak, now = pod_seconds + pods * _STEP_SECONDS, max(peak, pods), now + _STEP_SECONDS
    return Simulated(first_seconds, pod_seconds, peak)


def _step(
    member: _Member,
    now: float,
    first_seconds: list[float],
    timeout_seconds: float,
    window_seconds: float,
    *,
    opened: bool,
    lasts: bool,
) -> None:
    member.running = [ends for ends in member.running if ends > now]
    member.pods = [each for each in member.pods if not (each.leaving and now >= each.until)]
    for pod in member.pods:
        if not pod.ready and now >= pod.until:
            pod.ready, member.used_at = True, now
    if member.waiting and opened:
        serving = [each for each in member.pods if each.ready and not each.leaving]
        serving += [each for each in member.pods if each.leaving and lasts]
        if serving:
            first_seconds += [now - came + _FIRST_SECONDS for came in member.waiting]
            member.running += [now + ANSWER_SECONDS] * len(member.waiting)
            member.waiting = []
            if serving[0].leaving and timeout_seconds > _QUIET_SECONDS:
                serving[0].until = now + _QUIET_SECONDS
        elif all(each.ready for each in member.pods):
            member.pods.append(_Pod(now + START_SECONDS))
    if member.running:
        member.used_at = now
    if now // TICK_SECONDS != (now - _STEP_SECONDS) // TICK_SECONDS and now - member.used_at > window_seconds:
        for pod in member.pods:
            if pod.ready and not pod.leaving:
                pod.leaving, pod.until = True, now + min(_QUIET_SECONDS, timeout_seconds)


def markdown(members: int, devices: int, seconds: float) -> str:
    columns = ["", "first token p50, p95", "longest", "failures", "replica-seconds", "of static", "most pods"]
    lines = [
        "## Many models on few devices, simulated",
        "",
        f"`python -m bench.many --members {members} --devices {devices} --seconds {seconds:g} --simulated`: a pod starts in "
        f"{START_SECONDS:g} s, an answer takes {ANSWER_SECONDS:g} s, and a request that waits for more than "
        f"{_PATIENCE_SECONDS:g} s has failed.",
    ]
    for traffic in (by_zipf(members, seconds), LMSYS):
        static = simulate(traffic, None, 600.0, math.inf)
        found = {
            "a static pod for each model": static,
            "KPA for each, no bound": simulate(traffic, None, 600.0),
            **{
                f"`max_devices: {count}`, `timeout_seconds: {timeout:g}`": simulate(traffic, count, timeout)
                for count in (devices, devices - 2)
                for timeout in (600.0, 20.0, 10.0)
            },
        }
        rows = [
            [
                name,
                f"{median(each.first_seconds):.2f}, {quantiles(each.first_seconds, n=20, method='inclusive')[18]:.2f} s",
                f"{max(each.first_seconds):.1f} s",
                f"{sum(waited > _PATIENCE_SECONDS for waited in each.first_seconds)} of {len(each.first_seconds)}",
                f"{each.replica_seconds:.0f}",
                f"{each.replica_seconds / static.replica_seconds:.2f} ×",
                each.peak,
            ]
            for name, each in found.items()
        ]
        lines += ["", f"{traffic.told[0].upper()}{traffic.told[1:]}:", "", table(columns, rows)]
    return "\n".join(lines)
