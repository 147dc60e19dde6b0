"""Cold pipelines are woken all at once, by a gateway that starts or by waiting sequences; cold starts are noted."""

import threading

import pytest

from eventing.problems import PipelineUnavailable
from eventing.wire.control import WarmupReply
from eventing.wire.events import EventType
from functions.gateway.scheduling import wake_up
from functions.gateway.scheduling.wake_up import WakeUps
from functions.gateway.stages.routes import Placement
from tests.support.functions.gateway import counted, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import StageServer, counting_stages, inspecting, is_type
from tests.support.functions.watched import watched


def warm_ups(stages: list[StageServer]) -> list[int]:
    return [sum(map(is_type(EventType.WARMUP), stage.seen)) for stage in stages]


def test_waiting_sequences_wake_a_cold_pipeline_all_at_once() -> None:
    """No stage replies before all have been asked."""
    with watched() as cold:
        for stage in cold.stages:
            stage.inspect = inspecting(is_type(EventType.WARMUP), lambda: wait_until(lambda: all(warm_ups(cold.stages))))
        streams = cold.run(4, 5)
        wait_until(lambda: all(warm_ups(cold.stages)))
        assert not any(stage.forwards for stage in cold.stages)
        cold.publish_ready(cold.stages[1])
        cold.check(streams, 5)


def test_a_warm_pipeline_is_not_woken() -> None:
    with watched() as warm:
        warm.publish_ready(warm.stages[1])
        warm.check(warm.run(4, 5), 5)
        assert warm_ups(warm.stages) == [0, 0, 0]


def test_a_cold_start_that_takes_too_long_ends_waiting_sequences() -> None:
    with watched(cold_start_timeout_seconds=0.4) as cold:
        cold.publish_ready()
        (stream,) = cold.run(1, 5)
        with pytest.raises(PipelineUnavailable, match=r"no route for 0\.4 seconds; stages without an instance: 1"):
            tokens_of(stream)


def test_a_gateway_that_starts_wakes_all_stages_once() -> None:
    awake = threading.Event()
    with counting_stages() as stages, scheduling(stages) as scheduler:
        for stage in stages:
            stage.inspect = inspecting(is_type(EventType.WARMUP), awake.wait)
        scheduler.wake()
        wait_until(lambda: warm_ups(stages) == [1, 1, 1], "a warm-up event at every stage while all sleep")
        scheduler.wake()
        stream = submit(scheduler, [1, 2, 3], 4)  # waits for the same round
        awake.set()
        assert tokens_of(stream) == counted([1, 2, 3], 4)
        assert warm_ups(stages) == [1, 1, 1]
        assert scheduler.stats().wake_ups == 1
        scheduler.wake()
        tokens_of(submit(scheduler, [1], 2))
        assert warm_ups(stages) == [1, 1, 1], "all are awake"


# Cold starts.


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(wake_up, "time", clock)
    return clock


def begun() -> WakeUps:
    """A round for one cold stage."""
    wake_ups = WakeUps()
    wake_ups.begin(Placement(["http://stage-0"], watched=True), all_stages=True)
    return wake_ups


@pytest.mark.parametrize("replied_at", [1.0, 3.0])
def test_a_pod_that_ran_before_it_was_asked_was_not_cold(clock: Clock, replied_at: float) -> None:
    wake_ups = begun()
    clock.now = replied_at
    wake_ups.stage_woke(0, WarmupReply("boot", {"process": 0.1, "warm_up": 1.5}))
    last = wake_ups.last_start(0)
    if replied_at < 1.5:
        assert last is None
    else:
        assert (last.began, last.ended, last.phases["warm_up"]) == (0.0, 3.0, 1.5)


def test_a_cold_start_under_way_replaces_the_last_one(clock: Clock) -> None:
    wake_ups = begun()
    clock.now = 2.0
    wake_ups.stage_failed(0, "timeout")
    last = wake_ups.last_start(0)
    assert (last.ended, last.cause, dict(last.phases)) == (2.0, "timeout", {})
    wake_ups.stage_failed(0, "nothing was under way")
    assert wake_ups.last_start(0) is last
    wake_ups.round_over()
    wake_ups.begin(Placement(["http://stage-0"], watched=True), all_stages=True)
    assert wake_ups.last_start(0).ended is None
