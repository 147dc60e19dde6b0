"""Routes: placed on the instances that a watch knows, left, rebalanced, and broken."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from eventing.problems import PipelineUnavailable
from eventing.wire.events import EventType
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.stages.routes import Endpoint, Instance, Placement, Turnstile
from tests.support.functions.gateway import (
    Fault,
    StageServer,
    counted,
    counting_stage,
    counting_stages,
    scheduling,
    submit,
    tokens_of,
    wait_until,
)

SERVICES = ["http://stage-0", "http://stage-1"]


def placement(*urls: str) -> Placement:
    """Two stages: one instance of the first, `urls` of the second."""
    placed = Placement(SERVICES, watched=True)
    placed.update(0, [Endpoint("a")])
    placed.update(1, [Endpoint(url) for url in urls])
    return placed


def url(instance: Instance | None) -> str:
    assert instance is not None
    return instance.url


def test_a_new_route_takes_the_instances_with_the_fewest_routes() -> None:
    placed = placement("x", "y", "z")
    routes = [placed.place(10) for _ in range(6)]
    seconds = [route.instances[1].url for route in routes if route is not None]
    assert sorted(seconds[:3]) == sorted(seconds[3:]) == ["x", "y", "z"]
    assert routes[1] is not None
    routes[1].close()
    assert url(placed.least_used(1)) == seconds[1]


def test_instances_that_said_they_are_full_come_last() -> None:
    placed = placement("x", "y")
    full = placed.least_used(1)
    assert full is not None
    full.replied("boot", 50)
    assert url(placed.least_used(1, 50)) == full.url
    assert url(placed.least_used(1, 51)) != full.url


def test_only_the_current_revision_is_placed_on_and_old_routes_end_where_they_began() -> None:
    placed = Placement(SERVICES[:1], watched=True)
    placed.update(0, [Endpoint("old", "stage-0-00009")])
    route = placed.place(1)
    placed.update(0, [Endpoint("old", "stage-0-00009"), Endpoint("new", "stage-0-00010", ready=False)])
    assert url(placed.least_used(0)) == "old"
    placed.update(0, [Endpoint("old", "stage-0-00009"), Endpoint("new", "stage-0-00010")])
    assert url(placed.least_used(0)) == "new"
    assert route is not None
    assert placed.must_leave(route) is None
    assert placed.ready_counts() == [1]


def test_a_route_leaves_an_instance_that_terminates_once_there_is_another() -> None:
    placed = placement("x")
    route = placed.place(1)
    assert route is not None
    placed.update(1, [Endpoint("x", ready=False, terminating=True)])
    assert placed.must_leave(route) is None
    assert placed.strands(route)
    assert placed.cold() == [1]
    placed.update(1, [Endpoint("x", ready=False, terminating=True), Endpoint("y")])
    target = placed.must_leave(route)
    assert url(target) == "y"
    assert target is not None
    assert route.replace(target).routes == 0
    assert target.routes == 1
    placed.update(1, [])
    assert placed.strands(route)


def test_an_address_that_comes_back_is_another_instance() -> None:
    placed = placement("x")
    before = placed.least_used(1)
    placed.update(1, [])
    placed.update(1, [Endpoint("x")])
    assert placed.least_used(1) is not before


def test_two_routes_more_than_another_is_unbalanced() -> None:
    placed = placement("x")
    for _ in range(2):
        placed.place(1)
    placed.update(1, [Endpoint("x"), Endpoint("y")])
    uneven = placed.unbalanced()
    assert uneven is not None
    assert (uneven[0].url, uneven[1].url) == ("x", "y")
    placed.place(1)
    assert placed.unbalanced() is None


def test_a_broken_instance_is_left_alone_for_longer_each_time() -> None:
    placed = placement("x", "y")
    broken = placed.least_used(1)
    assert broken is not None
    moment, pauses = time.monotonic(), []
    for _ in range(4):
        broken.suspend(moment)
        pauses.append(broken.suspended_until - moment)
        moment = broken.suspended_until
    assert pauses == sorted(pauses)
    assert url(placed.least_used(1)) != broken.url
    assert placed.next_resumption() == broken.suspended_until
    broken.replied("boot", None)
    broken.suspend(moment)
    assert broken.suspended_until - moment < pauses[1]


def test_an_instance_that_dies_with_many_events_in_hand_broke_once() -> None:
    placed = placement("x")
    instance = placed.least_used(1)
    assert instance is not None
    placed.avoid(instance)
    resumption = instance.suspended_until
    for _ in range(15):
        placed.avoid(instance)
    assert (instance.failures, instance.suspended_until) == (1, resumption)


def test_without_a_watch_the_service_url_is_the_instance_once_it_is_awake() -> None:
    placed = Placement(SERVICES, watched=False)
    assert placed.cold() == [0, 1]
    assert placed.place(1) is None
    for stage in (0, 1):
        placed.woken(stage)
    route = placed.place(1)
    assert route is not None
    assert [instance.url for instance in route.instances] == SERVICES
    assert placed.ready_counts() == [0, 0], "unknown"
    placed.avoid(route.instances[1])
    assert placed.cold() == [1]


def test_a_turnstile_keeps_order() -> None:
    turnstile = Turnstile()
    first, second, third = (turnstile.queue() for _ in range(3))
    assert [turn.is_set() for turn in (first, second, third)] == [True, False, False]
    turnstile.leave()
    assert [turn.is_set() for turn in (second, third)] == [True, False]
    turnstile.leave()
    turnstile.leave()
    assert turnstile.idle


# Over real stages: stage 1 has several instances.


class Watched:
    """Three stages; `instances` are those of stage 1. What the watch would say is said by `publish`."""

    def __init__(self, stages: list[StageServer], scheduler: Scheduler, spare: list[StageServer]) -> None:
        self.stages = stages
        self.scheduler = scheduler
        self.instances = [stages[1], *spare]

    def publish(self, *of_middle: Endpoint) -> None:
        self.scheduler.endpoints_changed(1, of_middle)

    def publish_ends(self) -> None:
        for stage in (0, 2):
            self.scheduler.endpoints_changed(stage, [Endpoint(self.stages[stage].url)])

    def run(self, number: int, max_tokens: int) -> list[TokenStream]:
        return [submit(self.scheduler, prompt(index), max_tokens) for index in range(number)]

    def check(self, streams: list[TokenStream], max_tokens: int) -> None:
        for index, stream in enumerate(streams):
            assert tokens_of(stream) == counted(prompt(index), max_tokens)


def prompt(index: int) -> list[int]:
    return [index + 1] * (3 + index)


@contextmanager
def watched(spares: int = 1, **limits: float) -> Iterator[Watched]:
    with counting_stages() as stages:
        spare = [counting_stage(1) for _ in range(spares)]
        placed = Placement([stage.url for stage in stages], watched=True)
        try:
            with scheduling(stages, placement=placed, **limits) as scheduler:
                yield Watched(stages, scheduler, spare)
        finally:
            for stage in spare:
                stage.kill()


def forwards(stage: StageServer) -> int:
    return len(stage.forwards)


def test_a_cold_pipeline_is_woken_all_at_once_and_waited_for() -> None:
    with watched() as cold:
        streams = cold.run(4, 5)
        wait_until(lambda: all(EventType.WARMUP in {seen.type for seen in stage.seen} for stage in cold.stages))
        first = [stage.seen[0] for stage in cold.stages]
        assert max(seen.arrived for seen in first) - min(seen.arrived for seen in first) < 0.5
        assert not any(forwards(stage) for stage in cold.stages)
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


def test_a_terminating_instance_is_left_at_once_and_only_up_to_it_is_anything_computed_anew() -> None:
    with watched() as pipeline:
        old, new = pipeline.instances
        pipeline.publish_ends()
        pipeline.publish(Endpoint(old.url))
        streams = pipeline.run(6, 120)
        for stream in streams:
            assert stream.next_token(10) is not None
        prompts_behind = sum(row.position == 0 for seen in pipeline.stages[2].forwards for row in seen.rows)
        pipeline.publish(Endpoint(old.url, ready=False, terminating=True), Endpoint(new.url))
        wait_until(lambda: not old.engine.sequences, "leaving the terminating instance")
        left_at = forwards(old)
        rest = [[stream.next_token(10) for _ in range(119)] for stream in streams]
        assert rest == [counted(prompt(index), 120)[1:] for index in range(6)]
        assert forwards(old) == left_at
        assert sum(row.position == 0 for seen in pipeline.stages[2].forwards for row in seen.rows) == prompts_behind
        assert {stream.timings().replays for stream in streams} == {1}
        stats = pipeline.scheduler.stats()
        assert stats.replays == {"moved": 6}
        assert stats.moves["leaving"] == 3


def test_without_another_instance_a_terminating_one_serves_on_and_the_stage_is_woken() -> None:
    with watched() as pipeline:
        old, new = pipeline.instances
        pipeline.publish_ends()
        pipeline.publish(Endpoint(old.url))
        streams = pipeline.run(2, 150)
        assert streams[0].next_token(10) is not None
        pipeline.publish(Endpoint(old.url, ready=False, terminating=True))
        wait_until(lambda: EventType.WARMUP in {seen.type for seen in pipeline.stages[1].seen}, "the wake-up")
        pipeline.publish(Endpoint(old.url, ready=False, terminating=True), Endpoint(new.url))
        wait_until(lambda: forwards(new), "the move")
        assert [streams[0].next_token(10) for _ in range(149)] == counted(prompt(0), 150)[1:]
        assert tokens_of(streams[1]) == counted(prompt(1), 150)


def test_a_new_instance_is_given_its_share_one_micro_batch_at_a_time() -> None:
    with watched() as pipeline:
        old, new = pipeline.instances
        pipeline.publish_ends()
        pipeline.publish(Endpoint(old.url))
        for stage in (*pipeline.stages, new):
            stage.seconds = 0.004
        streams = pipeline.run(24, 80)
        assert streams[0].next_token(10) is not None
        pipeline.publish(Endpoint(old.url), Endpoint(new.url))
        wait_until(lambda: new.engine.sequences >= 8, "the move of a micro-batch")
        assert [streams[0].next_token(10) for _ in range(79)] == counted(prompt(0), 80)[1:]
        for index, stream in enumerate(streams[1:], 1):
            assert tokens_of(stream) == counted(prompt(index), 80)
        assert 1 <= pipeline.scheduler.stats().moves["balance"] <= 4


def test_without_the_right_to_watch_the_service_urls_serve_until_it_comes() -> None:
    with watched() as pipeline:
        for stage in range(3):
            pipeline.scheduler.endpoints_changed(stage, None)
        streams = pipeline.run(4, 60)
        assert streams[0].next_token(10) is not None
        pipeline.publish(Endpoint(pipeline.instances[1].url))
        wait_until(lambda: pipeline.instances[1].engine.sequences, "the move to the instance that is known now")
        assert [streams[0].next_token(10) for _ in range(59)] == counted(prompt(0), 60)[1:]
        for index in (1, 2, 3):
            assert tokens_of(streams[index]) == counted(prompt(index), 60)


def test_an_instance_that_dies_is_avoided() -> None:
    with watched() as pipeline:
        dying, other = pipeline.instances
        pipeline.publish_ends()
        pipeline.publish(Endpoint(dying.url), Endpoint(other.url))
        count = itertools.count()
        dying.inspect = lambda seen: Fault.KILLED if seen.type == EventType.FORWARD and next(count) == 10 else None
        pipeline.check(pipeline.run(8, 30), 30)
        assert forwards(other)
        assert pipeline.scheduler.stats().replays.total() > 0


def test_instances_that_come_and_go_at_random_cost_no_token() -> None:
    dice = random.Random(7)
    with watched(spares=2) as pipeline:
        pipeline.publish_ends()
        pipeline.publish(Endpoint(pipeline.instances[0].url))
        for stage in (*pipeline.stages, *pipeline.instances):
            stage.seconds = 0.002
        streams = pipeline.run(12, 80)
        until = time.monotonic() + 1.5
        while time.monotonic() < until and any(stream.finish_reason is None for stream in streams):
            states = [dice.choice([None, False, True, True]) for _ in pipeline.instances]
            pipeline.publish(
                *(
                    Endpoint(stage.url, ready=ready, terminating=not ready)
                    for stage, ready in zip(pipeline.instances, states, strict=True)
                    if ready is not None
                )
            )
            _until(time.monotonic() + dice.uniform(0.02, 0.15), lambda: all(s.over for s in streams))
        pipeline.publish(Endpoint(pipeline.instances[1].url))
        pipeline.check(streams, 80)


def _until(moment: float, over: Callable[[], bool]) -> None:
    while time.monotonic() < moment and not over():
        time.sleep(0.005)
