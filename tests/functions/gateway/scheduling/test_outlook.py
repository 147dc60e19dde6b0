"""What the gateway says of the pipeline to whoever watches: instances that come and go, routes, cold starts."""

import threading
from collections.abc import Callable

import pytest

from eventing.wire.control import WarmupReply
from eventing.wire.events import EventType
from functions.gateway.scheduling import wake_up
from functions.gateway.scheduling.pipeline_status import InstanceStatus
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.wake_up import WakeUps
from functions.gateway.stages.instances import Endpoint
from functions.gateway.stages.routes import Placement
from tests.support.functions.gateway import counted, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import Fault, Seen, counting_stages
from tests.support.functions.watched import watched


def middle(scheduler: Scheduler) -> dict[int, InstanceStatus]:
    return {instance.number: instance for instance in scheduler.status().stages[1].instances}


def states(scheduler: Scheduler) -> dict[int, str]:
    return {number: instance.state for number, instance in middle(scheduler).items()}


def test_instances_come_and_go_and_keep_their_numbers() -> None:
    with watched() as pipeline:
        first, second = (instance.url for instance in pipeline.instances)
        assert states(pipeline.scheduler) == {}
        assert pipeline.scheduler.status().stages[1].cold
        pipeline.publish(Endpoint(first, "m-00001"))
        pipeline.publish(Endpoint(first, "m-00001"), Endpoint(second, "m-00001", ready=False))
        assert states(pipeline.scheduler) == {1: "ready", 2: "starting"}
        pipeline.publish(Endpoint(first, "m-00001", terminating=True), Endpoint(second, "m-00001"))
        assert states(pipeline.scheduler) == {1: "leaving", 2: "ready"}
        pipeline.publish(Endpoint(second, "m-00001"))
        assert states(pipeline.scheduler) == {2: "ready"}
        pipeline.publish(Endpoint(first, "m-00001"), Endpoint(second, "m-00001"))
        assert states(pipeline.scheduler) == {2: "ready", 3: "ready"}
        assert middle(pipeline.scheduler)[3].revision == "m-00001"
        assert not pipeline.scheduler.status().stages[1].cold


def held_until(moment: threading.Event, type_: EventType) -> Callable[[Seen], Fault | None]:
    def inspect(seen: Seen) -> Fault | None:
        if seen.type == type_:
            assert moment.wait(20)
        return None

    return inspect


def test_an_answer_is_seen_with_its_route_and_its_stage_with_the_event_that_is_there() -> None:
    go_on = threading.Event()
    with watched() as pipeline:
        pipeline.publish_ends()
        pipeline.publish(Endpoint(pipeline.instances[0].url))
        pipeline.stages[1].inspect = held_until(go_on, EventType.FORWARD)
        stream = submit(pipeline.scheduler, [1, 2, 3], 4, client_id="me", request_id="mine")
        wait_until(lambda: middle(pipeline.scheduler)[1].event_seconds > 0)
        (answer,) = pipeline.scheduler.status().answers
        assert (answer.request_id, answer.client_id, answer.route, answer.tokens) == ("mine", "me", (1, 1, 1), 0)
        assert middle(pipeline.scheduler)[1].routes == 1
        before, after = (middle(pipeline.scheduler)[1].event_seconds for _ in range(2))
        assert after > before
        go_on.set()
        assert tokens_of(stream) == counted([1, 2, 3], 4)
        wait_until(lambda: not pipeline.scheduler.status().answers)
        seen = pipeline.scheduler.status()
        assert seen.tokens == 4
        assert [stage.steps for stage in seen.stages] == [4, 4, 4]


def test_a_cold_start_is_seen_while_it_lasts_and_afterwards() -> None:
    awake = threading.Event()
    with counting_stages() as stages:
        stages[2].inspect = held_until(awake, EventType.WARMUP)
        with scheduling(stages) as scheduler:
            scheduler.wake()
            wait_until(lambda: [stage.cold for stage in scheduler.status().stages] == [False, False, True])
            start = scheduler.status().stages[2].start
            assert start is not None
            assert start.ended is None
            awake.set()
            wait_until(lambda: not scheduler.status().stages[2].cold)
            start = scheduler.status().stages[2].start
            assert start is not None
            assert start.ended is not None
            assert start.ended > start.began


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(wake_up, "time", clock)
    return clock


@pytest.fixture
def cold() -> Placement:
    return Placement(["http://stage-0"], watched=True)


def test_a_pod_that_ran_before_it_was_asked_was_not_cold(clock: Clock, cold: Placement) -> None:
    wake_ups = WakeUps()
    wake_ups.begin(cold, all_stages=True)
    clock.now = 1.0
    wake_ups.stage_woke(0, WarmupReply("old", {"process": 0.1, "warm_up": 1.5}))
    assert wake_ups.last_start(0) is None
    wake_ups.round_over()
    wake_ups.begin(cold, all_stages=True)
    clock.now = 3.0
    wake_ups.stage_woke(0, WarmupReply("new", {"process": 0.1, "warm_up": 1.5}))
    last = wake_ups.last_start(0)
    assert last is not None
    assert (last.began, last.ended, last.phases["warm_up"]) == (1.0, 3.0, 1.5)
    wake_ups.round_over()
    wake_ups.begin(cold, all_stages=True)
    assert (again := wake_ups.last_start(0)) is not None
    assert again.ended is None


def test_a_start_that_failed_says_so(clock: Clock, cold: Placement) -> None:
    wake_ups = WakeUps()
    wake_ups.begin(cold, all_stages=True)
    clock.now = 2.0
    wake_ups.stage_failed(0, "timeout")
    last = wake_ups.last_start(0)
    assert last is not None
    assert (last.ended, last.cause, dict(last.phases)) == (2.0, "timeout", {})
    wake_ups.stage_failed(0, "nothing was under way")
    assert wake_ups.last_start(0) is last
