"""Who wakes a cold pipeline: a gateway that starts, whoever waits, and every stage at once."""

import threading

import pytest

from eventing.problems import PipelineUnavailable
from eventing.wire.events import EventType
from functions.gateway.stages.instances import Endpoint
from tests.support.functions.gateway import counted, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import Fault, Seen, StageServer, counting_stages
from tests.support.functions.watched import watched


def test_a_cold_pipeline_is_woken_all_at_once_and_waited_for() -> None:
    with watched() as cold:
        streams = cold.run(4, 5)
        wait_until(lambda: all(EventType.WARMUP in {seen.type for seen in stage.seen} for stage in cold.stages))
        first = [stage.seen[0] for stage in cold.stages]
        assert max(seen.arrived for seen in first) - min(seen.arrived for seen in first) < 0.5
        assert not any(stage.forwards for stage in cold.stages)
        cold.publish_ends()
        cold.publish(Endpoint(cold.stages[1].url))
        cold.check(streams, 5)


def test_a_warm_pipeline_is_not_woken() -> None:
    with watched() as warm:
        warm.publish_ends()
        warm.publish(Endpoint(warm.stages[1].url))
        warm.check(warm.run(4, 5), 5)
        assert all(EventType.WARMUP not in {seen.type for seen in stage.seen} for stage in warm.stages)


def test_a_cold_start_that_takes_too_long_is_an_error_of_those_who_wait() -> None:
    with watched(cold_start_timeout_seconds=0.4) as cold:
        cold.publish_ends()
        (stream,) = cold.run(1, 5)
        with pytest.raises(PipelineUnavailable, match=r"no route for 0\.4 seconds; stages without an instance: 1"):
            tokens_of(stream)


def asleep_until(stages: list[StageServer], awake: threading.Event) -> None:
    """Warm-up events wait, as at a stage whose weights are still coming."""

    def inspect(seen: Seen) -> Fault | None:
        if seen.type == EventType.WARMUP:
            assert awake.wait(20)
        return None

    for stage in stages:
        stage.inspect = inspect


def warm_ups(stages: list[StageServer]) -> list[int]:
    return [sum(seen.type == EventType.WARMUP for seen in stage.seen) for stage in stages]


def test_all_stages_are_woken_at_once_and_once() -> None:
    awake = threading.Event()
    with counting_stages() as stages, scheduling(stages) as scheduler:
        asleep_until(stages, awake)
        scheduler.wake()
        wait_until(lambda: warm_ups(stages) == [1, 1, 1], "a warm-up event at every stage while all sleep")
        scheduler.wake()
        stream = submit(scheduler, [1, 2, 3], 4)  # Waits for the same round.
        awake.set()
        assert tokens_of(stream) == counted([1, 2, 3], 4)
        assert warm_ups(stages) == [1, 1, 1]
        assert scheduler.stats().wake_ups == 1


def test_a_pipeline_that_is_awake_is_left_alone() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        tokens_of(submit(scheduler, [1], 2))
        before = warm_ups(stages)
        scheduler.wake()
        tokens_of(submit(scheduler, [1], 2))
        assert warm_ups(stages) == before
