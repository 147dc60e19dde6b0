"""Who wakes a cold pipeline: a gateway that starts, for the request that started it, and every stage at once."""

import threading

from eventing.wire.events import EventType
from tests.support.functions.gateway import (
    Fault,
    Seen,
    StageServer,
    counted,
    counting_stages,
    scheduling,
    submit,
    tokens_of,
    wait_until,
)


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
        stream = submit(scheduler, [1, 2, 3], 4)  # waits for the same round
        awake.set()
        assert tokens_of(stream) == counted([1, 2, 3], 4)
        assert warm_ups(stages) == [1, 1, 1]
        assert scheduler.stats().wakes == 1


def test_a_pipeline_that_is_awake_is_left_alone() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        tokens_of(submit(scheduler, [1], 2))
        before = warm_ups(stages)
        scheduler.wake()
        tokens_of(submit(scheduler, [1], 2))
        assert warm_ups(stages) == before
