"""The pipeline status that the page shows: instances that come and go, routes, cold starts."""

import threading

from eventing.wire.events import EventType
from eventing.wire.generation import ProgressEvent
from functions.gateway.scheduling.pipeline_status import InstanceStatus
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.stages.routes import Endpoint
from tests.support.functions.gateway import counted, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import counting_stages, inspecting, is_type
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


def test_the_status_has_a_running_answers_route_and_the_events_at_its_stages() -> None:
    go_on = threading.Event()
    with watched() as pipeline:
        pipeline.publish_ready(pipeline.instances[0])
        pipeline.stages[1].inspect = inspecting(is_type(EventType.FORWARD), go_on.wait)
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


def test_the_status_has_a_cold_start_while_it_lasts_and_afterwards() -> None:
    awake = threading.Event()
    with counting_stages() as stages:
        stages[2].inspect = inspecting(is_type(EventType.WARMUP), awake.wait)
        with scheduling(stages) as scheduler:
            scheduler.wake()
            wait_until(lambda: [stage.cold for stage in scheduler.status().stages] == [False, False, True])
            start = scheduler.status().stages[2].start
            assert start.ended is None
            awake.set()
            wait_until(lambda: not scheduler.status().stages[2].cold)
            start = scheduler.status().stages[2].start
            assert start.ended > start.began


def test_an_answer_says_what_it_awaits() -> None:
    awake, go_on = threading.Event(), threading.Event()
    limits = {"micro_batch_sequences": 1, "chunk_tokens": 16, "stages_at_once": 1}
    with counting_stages(1, capacity_tokens=200) as (stage,):
        stage.inspect = inspecting(is_type(EventType.WARMUP), awake.wait)
        with scheduling([stage], **limits) as scheduler:
            first = submit(scheduler, [1] * 64, 4)
            seen = first.progress()
            assert (seen.awaits, seen.stage, seen.stages, seen.percent) == ("start", 1, 1, None)
            stage.inspect = inspecting(lambda seen: seen.type == EventType.FORWARD and seen.rows[0].position == 32, go_on.wait)
            awake.set()
            wait_until(lambda: first.progress().percent == 50)
            assert first.progress() == ProgressEvent("prompt", "prompt, 50 %", percent=50)
            others = [submit(scheduler, [2] * 100, 60), submit(scheduler, [3], 4)]
            wait_until(lambda: [other.progress().awaits for other in others] == ["memory", "turn"])
            assert others[1].progress().waiting in (1, 2)
            go_on.set()
            assert tokens_of(first) == counted([1] * 64, 4)
            assert first.progress() is None
            assert tokens_of(others[1]) == counted([3], 4)
