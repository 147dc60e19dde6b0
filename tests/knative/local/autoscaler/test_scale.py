"""The scaling function: the cases of Knative's own autoscaler tests, as facts."""

import math
from dataclasses import replace
from typing import Any

import pytest

from knative.local.autoscaler.kpa import Autoscaler, AutoscalerState, DeciderSpec, Decision, scale

UTILIZATION = 0.75
WINDOW = 60.0


def spec(target: float, burst: float, **changes: Any) -> DeciderSpec:
    return replace(
        DeciderSpec(
            target_value=target,
            total_value=target / UTILIZATION,
            target_burst_capacity=burst,
            max_scale_up_rate=10,
            max_scale_down_rate=10,
            panic_threshold=2,
            stable_window_seconds=WINDOW,
        ),
        **changes,
    )


def excess(target: float, burst: float, panic: float, pods: int) -> int:
    return math.floor(target / UTILIZATION * pods - burst - panic)


class Revision:
    """An autoscaler with its state, fed averages instead of windows."""

    def __init__(self, decider: DeciderSpec, state: AutoscalerState | None = None) -> None:
        self.spec = decider
        self.state = state or AutoscalerState(max_panic_pods=1)

    def ask(self, ready: int, stable: float, panic: float, now: float = 0.0) -> Decision:
        decision, self.state = scale(self.spec, self.state, ready, stable, panic, now)
        return decision


PANICKING = AutoscalerState(panic_since=-5.0, max_panic_pods=5)


@pytest.mark.parametrize(
    ("decider", "state", "ready", "stable", "panic", "desired"),
    [
        pytest.param(spec(10, 100), None, 1, 0, 0, 0, id="no load"),
        pytest.param(spec(10, 100), None, 1, 50, 50, 5, id="grows"),
        pytest.param(spec(10, 100), None, 5, 50, 50, 5, id="fits already"),
        pytest.param(spec(10, 75), None, 1, 1, 0, 1, id="a little load keeps one"),
        pytest.param(spec(1, 100), PANICKING, 5, 50, 30, 50, id="in panic, stable is larger"),
        pytest.param(spec(1, 100), PANICKING, 5, 20, 30, 30, id="in panic, panic is larger"),
        pytest.param(spec(10, 84), None, 1, 50, 100, 10, id="panic takes precedence"),
        pytest.param(spec(1, 1982, max_scale_up_rate=1.1), None, 2, 3, 3.1, 3, id="a small rate still adds one"),
        pytest.param(spec(10, 1982, max_scale_down_rate=1.1), None, 100, 1, 1, 90, id="small scale-down rate"),
        pytest.param(spec(10, 1982, max_scale_down_rate=1.1, reachable=False), None, 100, 1, 1, 1, id="unreachable"),
        pytest.param(spec(10, 61), None, 1, 1000, 1001, 10, id="scale-up is rate limited"),
        pytest.param(spec(10, 61), None, 100, 1, 1, 10, id="scale-down is rate limited"),
        pytest.param(spec(10, 81), None, 0, 1000, 888, 10, id="no pods count as one"),
        pytest.param(spec(10, 75, activation_scale=2), None, 1, 0, 0, 0, id="activation scale does not hold at zero"),
        pytest.param(spec(10, 75, activation_scale=2), None, 1, 1, 0, 2, id="activation scale"),
    ],
)
def test_desired_scale(
    decider: DeciderSpec, state: AutoscalerState | None, ready: int, stable: float, panic: float, desired: int
) -> None:
    decision = Revision(decider, state).ask(ready, stable, panic)
    assert decision.desired_scale == desired
    assert decision.excess_burst_capacity == excess(decider.target_value, decider.target_burst_capacity, panic, ready)


@pytest.mark.parametrize(("burst", "expected"), [(-1, -1), (0, 0), (100, math.floor(10 / 0.75 - 100 - 49))])
def test_excess_burst_capacity(burst: float, expected: int) -> None:
    assert Revision(spec(10, burst)).ask(1, 50, 49).excess_burst_capacity == expected


def test_panic_ends_a_stable_window_after_the_surge() -> None:
    revision = Revision(spec(1, 98))
    assert revision.ask(10, 11, 25, now=0).desired_scale == 25
    assert revision.ask(40, 30, 41, now=WINDOW / 2).desired_scale == 41
    assert revision.state.panic_since == 0, "below the threshold panic is not extended"
    assert revision.ask(55, 50, 56, now=WINDOW).panicking, "a stable window must have passed, not be passing"
    decision = revision.ask(55, 50, 56, now=WINDOW + 2)
    assert (decision.desired_scale, decision.panicking) == (50, False)


def test_a_new_surge_extends_panic() -> None:
    revision = Revision(spec(1, 98))
    revision.ask(10, 11, 25, now=0)
    assert revision.ask(40, 30, 80, now=30).desired_scale == 80
    assert revision.state.panic_since == 30


def test_panic_never_scales_in() -> None:
    revision = Revision(spec(10, 93))
    revision.ask(1, 100, 100, now=0)
    assert revision.ask(10, 100, 1000, now=0).desired_scale == 100
    assert revision.ask(10, 1, 1, now=30).desired_scale == 100
    assert revision.ask(10, 1, 1, now=61).desired_scale == 1


def test_load_that_grows_sixfold_each_tick() -> None:
    revision = Revision(spec(1, 101))
    pods = 1
    for load in (6, 36, 216, 1296):
        assert revision.ask(pods, load, load, now=pods).desired_scale == load
        assert revision.state.panic_since == pods
        pods = load
    assert revision.ask(pods, 1296, 1296, now=pods).desired_scale == 1296


def test_a_new_target_counts_at_once() -> None:
    revision = Revision(spec(10, 77))
    assert revision.ask(1, 100, 101).desired_scale == 10
    revision.spec = spec(1, 71)
    assert revision.ask(10, 100, 101).desired_scale == 100


def test_an_autoscaler_that_starts_with_several_pods_panics() -> None:
    assert Autoscaler(spec(10, 100), ready=5, now=7.0).state == AutoscalerState(panic_since=7.0, max_panic_pods=5)
    assert Autoscaler(spec(10, 100), ready=1, now=7.0).state.panic_since is None
    of_five = Autoscaler(spec(10, 100), ready=5, now=0.0).state
    assert Revision(spec(10, 100), of_five).ask(5, 0, 0, now=2).desired_scale == 5


def delayed(**changes: Any) -> DeciderSpec:
    return spec(10, 100, panic_threshold=100, scale_down_delay_seconds=300, **changes)


def test_scale_down_delay_holds_the_greatest_of_the_window() -> None:
    revision = Revision(delayed())
    assert revision.ask(1, 40, 40, now=2).desired_scale == 4
    assert revision.ask(1, 0, 0, now=300).desired_scale == 4
    assert revision.ask(1, 0, 0, now=302).desired_scale == 0


def test_scale_down_delay_falls_step_by_step() -> None:
    revision = Revision(delayed())
    minutes = [(9, 40, 4), (10, 30, 4), (11, 0, 4), (14, 0, 3), (15, 0, 0)]
    for minute, load, desired in minutes:
        assert revision.ask(1, load, load, now=60 * minute).desired_scale == desired, f"at minute {minute}"


def test_an_unreachable_revision_waits_for_nothing() -> None:
    revision = Revision(delayed())
    revision.ask(1, 40, 40, now=2)
    assert revision.ask(1, 0, 0, now=60).desired_scale == 4
    revision.spec = delayed(reachable=False)
    assert revision.ask(1, 0, 0, now=62).desired_scale == 0


def test_without_a_delay_two_decisions_of_a_tick_both_count() -> None:
    revision = Revision(spec(10, 100, panic_threshold=100))
    assert revision.ask(1, 40, 40, now=0).desired_scale == 4
    assert revision.ask(1, 20, 20, now=0.5).desired_scale == 2


@pytest.mark.parametrize(
    ("loads", "greatest"),
    [
        ((1,), (1,)),
        ((2, 1), (2, 2)),
        ((5, 6, 5, 5, 5, 5, 5), (5, 6, 6, 6, 6, 6, 5)),
        ((5, 8, 5, 7, 5, 5, 1, 4, 4, 4, 4, 9, 3, 4, 2, 1, 0), (5, 8, 8, 8, 8, 8, 7, 7, 5, 5, 4, 9, 9, 9, 9, 9, 4)),
    ],
)
def test_delay_window_of_five_ticks(loads: tuple[int, ...], greatest: tuple[int, ...]) -> None:
    revision = Revision(spec(1, 100, panic_threshold=1000, scale_down_delay_seconds=10, max_scale_down_rate=1000))
    got = tuple(revision.ask(1, load, load, now=2 * tick).desired_scale for tick, load in enumerate(loads))
    assert got == greatest


def test_decisions_of_one_tick_count_as_their_greatest() -> None:
    revision = Revision(spec(1, 100, panic_threshold=1000, scale_down_delay_seconds=10, max_scale_down_rate=1000))
    got = [revision.ask(1, load, load, now=1 + load / 100).desired_scale for load in (7, 6, 5, 1)]
    assert got == [7, 7, 7, 7]


def test_without_data_there_is_no_decision() -> None:
    autoscaler = Autoscaler(spec(10, 100), ready=1, now=0)
    assert autoscaler.decide(0, 1) is None
    autoscaler.record(1, 30)
    decision = autoscaler.decide(2, 1)
    assert decision is not None
    assert decision.desired_scale == 3
    assert autoscaler.decide(1 + WINDOW + 1, 1) is None


def test_silence_is_no_load_if_only_the_activator_reports() -> None:
    decision = Autoscaler(spec(10, -1), ready=1, now=0, pods_report=False).decide(0, 1)
    assert decision is not None
    assert (decision.desired_scale, decision.excess_burst_capacity) == (0, -1)
