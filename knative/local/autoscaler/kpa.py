"""How many pods a revision needs: Knative's autoscaler (pkg/autoscaler/scaling) as a pure function.

`scale` maps settings, state, ready pods and two averages to a decision and the next state. `Autoscaler` keeps the windows
and the state. Neither knows min-scale, max-scale or scaling to zero; `scaler` does. docs/scaling.md has the formulae, and tests
compare both with decisions recorded from Knative's own code.
"""

import math
from dataclasses import dataclass
from typing import Final

from knative.local.autoscaler.metric_window import WINDOWS, LinearWindow

TICK_SECONDS: Final = 2  # how often Knative decides


@dataclass(frozen=True, slots=True)
class DeciderSpec:
    """Settings of the autoscaler for one revision, which Knative derives from annotations and config-autoscaler."""

    target_value: float  # of the metric per pod: what the autoscaler aims for
    total_value: float  # of the metric per pod: what a pod can bear; target_value is utilization times this
    target_burst_capacity: float = 211.0  # 0: the activator only at zero; -1: always, and queue-proxies are not read
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    panic_threshold: float = 2.0  # panic begins when the panic average needs this many times the ready pods
    stable_window_seconds: float = 60.0
    panic_window_seconds: float = 6.0
    scale_down_delay_seconds: float = 0.0
    activation_scale: int = 0  # above 1: the least number of pods under any load
    reachable: bool = True  # False once no route leads to the revision: it may then scale in at any rate


@dataclass(frozen=True, slots=True)
class AutoscalerState:
    """The state that `scale` passes from one decision to the next."""

    panic_since: float | None = None  # when the panic threshold was last exceeded; None outside panic
    max_panic_pods: int = 0  # highest number of pods decided in this panic: in panic a revision does not scale in
    # (tick, pods) of the decisions within the scale-down delay that are or may become its maximum: ticks rise, pods fall.
    delayed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision of the autoscaler, to which `scaler` then applies min-scale, max-scale and the rules for scaling to zero."""

    desired_scale: int
    excess_burst_capacity: int  # requests that fit beyond load and target burst; negative: the activator buffers
    stable: float  # average of the metric over the stable window
    panic: float  # average of the metric over the panic window
    panicking: bool


def scale(
    spec: DeciderSpec, state: AutoscalerState, ready: int, stable: float, panic: float, now: float
) -> tuple[Decision, AutoscalerState]:
    """Returns a decision and the state after it.

    ready: number of ready pods. stable, panic: the metric of all pods together, averaged over the stable and the panic window.
    now: seconds of a monotonic clock.
    """
    pods = max(1, ready)
    wanted_panic = math.ceil(panic / spec.target_value)
    panic_since, max_panic_pods, delayed = state.panic_since, 0, state.delayed
    if wanted_panic / pods >= spec.panic_threshold:
        panic_since = now
    elif panic_since is not None and now > panic_since + spec.stable_window_seconds:
        panic_since = None

    desired = _bounded(spec, math.ceil(stable / spec.target_value), pods)
    if panic_since is not None:
        desired = max_panic_pods = max(desired, _bounded(spec, wanted_panic, pods), state.max_panic_pods)
    if spec.reachable and spec.scale_down_delay_seconds > 0:
        delayed = _delay(spec, delayed, desired, now)
        desired = delayed[0][1]
    if spec.target_burst_capacity > 0:
        excess = math.floor(ready * spec.total_value - spec.target_burst_capacity - panic)
    else:
        excess = 0 if spec.target_burst_capacity == 0 else -1
    decision = Decision(desired, excess, stable, panic, panic_since is not None)
    return decision, AutoscalerState(panic_since, max_panic_pods, delayed)


def _bounded(spec: DeciderSpec, wanted: int, pods: int) -> int:
    """Limits `wanted` by the scale rates from `pods`, then raises it to the activation scale if there is any load."""
    up = math.ceil(spec.max_scale_up_rate * pods)
    down = math.floor(pods / spec.max_scale_down_rate) if spec.reachable else 0
    desired = min(max(wanted, down), up)
    if wanted > 0 and spec.activation_scale > 1:
        desired = max(desired, spec.activation_scale)
    return desired


def _delay(spec: DeciderSpec, delayed: tuple[tuple[int, int], ...], desired: int, now: float) -> tuple[tuple[int, int], ...]:
    """Returns the delay window with `desired` added. Its first entry is the highest decision within the scale-down delay.

    Entries are (tick, pods). Of the decisions of one tick only the highest is kept.
    """
    tick = math.floor(now) // TICK_SECONDS
    ticks = math.ceil(spec.scale_down_delay_seconds / TICK_SECONDS)
    kept = [(at, pods) for at, pods in delayed if pods > desired and tick - at < ticks]
    if kept and kept[-1][0] == tick:
        return tuple(kept)
    return (*kept, (tick, desired))


class Autoscaler:
    """The autoscaler of one revision and one metric. Call `record` once a second and `decide` every `TICK_SECONDS`."""

    def __init__(
        self, spec: DeciderSpec, algorithm: str = "linear", *, ready: int, now: float, pods_report: bool = True
    ) -> None:
        """algorithm: how values are averaged, a key of `WINDOWS`. ready: number of pods ready already, 0 for a new revision.

        pods_report: False if only the activator reports (target burst capacity -1). If nothing was recorded, the load is then
        0; else it is unknown.
        """
        self.spec = spec
        self._pods_report = pods_report
        # With more than one ready pod it begins in panic, because without a history it must not scale in.
        self.state = AutoscalerState(panic_since=now if ready > 1 else None, max_panic_pods=ready)
        window = WINDOWS.get(algorithm, LinearWindow)
        self._stable, self._panic = window(spec.stable_window_seconds), window(spec.panic_window_seconds)

    def record(self, now: float, value: float) -> None:
        """Records the metric of the second `now`. value: requests in flight or per second, of all pods and the activator."""
        self._stable.record(now, value)
        self._panic.record(now, value)

    def decide(self, now: float, ready: int) -> Decision | None:
        """Decides from the recorded values. Returns None if the load is unknown: a stable window passed without a value."""
        if self._pods_report and self._stable.is_empty(now):
            return None
        stable, panic = self._stable.average(now), self._panic.average(now)
        decision, self.state = scale(self.spec, self.state, ready, stable, panic, now)
        return decision
