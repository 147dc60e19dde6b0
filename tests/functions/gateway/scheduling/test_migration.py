"""Micro-batches migrate: away from instances that leave or die, and to new ones."""

import itertools
import random
import time

import pytest

from eventing.wire.events import EventType
from functions.gateway.scheduling import apply
from functions.gateway.stages.routes import Endpoint
from tests.support.functions.gateway import wait_until
from tests.support.functions.stage_server import Fault, hold
from tests.support.functions.watched import watched


@pytest.mark.slow
def test_a_terminating_instance_is_left_at_once_and_later_stages_compute_nothing_again() -> None:
    with watched() as pipeline:
        old, new = pipeline.instances
        pipeline.publish_ready(old)
        left = hold(pipeline.stages[0], range(40, 130))
        streams = pipeline.run(6, 120)
        wait_until(lambda: all(stream.token_ids for stream in streams), "a token of each")
        prompts_after = sum(row.position == 0 for seen in pipeline.stages[2].forwards for row in seen.rows)
        pipeline.publish(Endpoint(old.url, ready=False, terminating=True), Endpoint(new.url))
        left.set()
        wait_until(lambda: not old.engine.sequences.by_id, "leaving the terminating instance")
        left_at = len(old.forwards)
        pipeline.check(streams, 120)
        assert len(old.forwards) == left_at
        assert sum(row.position == 0 for seen in pipeline.stages[2].forwards for row in seen.rows) == prompts_after
        assert {stream.timings().replays for stream in streams} == {1}
        stats = pipeline.scheduler.stats()
        assert stats.replays == {"moved": 6}
        assert stats.migrations["leaving"] == 3


@pytest.mark.slow
def test_a_terminating_instance_without_another_serves_on_and_the_stage_is_woken() -> None:
    with watched() as pipeline:
        old, new = pipeline.instances
        pipeline.publish_ready(old)
        replaced = hold(pipeline.stages[0], range(100, 160))
        streams = pipeline.run(2, 150)
        wait_until(lambda: streams[0].token_ids, "its first token")
        pipeline.publish(Endpoint(old.url, ready=False, terminating=True))
        wait_until(lambda: EventType.WARMUP in {seen.type for seen in pipeline.stages[1].seen}, "the wake-up")
        pipeline.publish(Endpoint(old.url, ready=False, terminating=True), Endpoint(new.url))
        replaced.set()
        wait_until(lambda: new.forwards, "the migration")
        pipeline.check(streams, 150)


@pytest.mark.slow
def test_a_new_instance_gets_its_share_one_micro_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "_note_pass", lambda *_: None)  # on a busy machine one of them would be slow
    with watched() as pipeline:
        old, new = pipeline.instances
        pipeline.publish_ready(old)
        for stage in (*pipeline.stages, new):
            stage.seconds = 0.004
        found = hold(pipeline.stages[0], range(40, 110))
        streams = pipeline.run(24, 80)
        wait_until(lambda: streams[0].token_ids, "its first token")
        pipeline.publish(Endpoint(old.url), Endpoint(new.url))
        found.set()
        wait_until(lambda: len(new.engine.sequences.by_id) >= 8, "the migration of a micro-batch")
        pipeline.check(streams, 80)
        assert 1 <= pipeline.scheduler.stats().migrations["balance"] <= 4


@pytest.mark.slow
def test_a_slow_instance_gets_less_until_it_is_quick_again() -> None:
    with watched(micro_batch_sequences=6) as pipeline:
        slow, quick = pipeline.instances
        pipeline.publish_ready(slow, quick)
        for stage in (*pipeline.stages, quick):
            stage.seconds = 0.004
        streams = pipeline.run(24, 2_000)
        wait_until(lambda: len(slow.engine.sequences.by_id) == len(quick.engine.sequences.by_id) == 12, "equal shares")
        slow.seconds = 0.02
        wait_until(lambda: len(slow.engine.sequences.by_id) <= 6, "a micro-batch leaves the slow one")
        slow.seconds = 0.004
        wait_until(lambda: len(slow.engine.sequences.by_id) == len(quick.engine.sequences.by_id) == 12, "equal shares again")
        for stream in streams:
            stream.cancel()


@pytest.mark.slow
def test_service_urls_serve_until_the_watch_works() -> None:
    with watched() as pipeline:
        for stage in range(3):
            pipeline.scheduler.endpoints_changed(stage, None)
        found = hold(pipeline.stages[0], range(40, 70))
        streams = pipeline.run(4, 60)
        wait_until(lambda: streams[0].token_ids, "its first token")
        pipeline.publish(Endpoint(pipeline.instances[1].url))
        found.set()
        wait_until(lambda: pipeline.instances[1].engine.sequences.by_id, "the migration to the instance that the watch found")
        pipeline.check(streams, 60)


@pytest.mark.slow
def test_an_instance_that_dies_is_avoided() -> None:
    with watched() as pipeline:
        dying, other = pipeline.instances
        pipeline.publish_ready(dying, other)
        count = itertools.count()
        dying.inspect = lambda seen: Fault.KILLED if seen.type == EventType.FORWARD and next(count) == 10 else None
        pipeline.check(pipeline.run(8, 30), 30)
        assert other.forwards
        assert pipeline.scheduler.stats().replays.total() > 0


@pytest.mark.slow
def test_instances_that_come_and_go_at_random_lose_no_token() -> None:
    dice = random.Random(7)
    with watched(spares=2) as pipeline:
        pipeline.publish_ready(pipeline.instances[0])
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
            time.sleep(dice.uniform(0.02, 0.15))
        pipeline.publish(Endpoint(pipeline.instances[1].url))
        pipeline.check(streams, 80)
