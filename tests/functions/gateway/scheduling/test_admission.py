"""Who comes in: clients take turns, the queue is bounded, a burst shares reservations, nothing begins on an older revision."""

import threading
from contextlib import ExitStack

import pytest

from eventing.problems import QueueFull
from eventing.wire.events import EventType
from functions.gateway.stages.instances import Endpoint
from functions.gateway.stages.routes import Placement
from tests.support.functions.gateway import answers_of, counted, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import Seen, counting_stage, counting_stages, running


def test_clients_take_turns() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=1) as scheduler:
        stage.seconds = 0.005
        crowd = [submit(scheduler, [1], 6, client_id="crowd") for _ in range(12)]
        single = submit(scheduler, [2], 6, client_id="single")
        tokens_of(single)
        assert sum(stream.finish_reason is None for stream in crowd) >= 8
        for stream in crowd:
            tokens_of(stream)


def test_the_queue_is_bounded() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=2, queue_limit=3) as scheduler:
        stage.seconds = 0.02
        accepted = [submit(scheduler, [1], 5) for _ in range(2 * 2 + 3)]
        with pytest.raises(QueueFull, match="requests wait already"):
            submit(scheduler, [1], 5)
        for stream in accepted:
            assert tokens_of(stream) == counted([1], 5)
        answers_of(scheduler, [[1]], max_tokens=2)


def test_who_is_being_read_counts_as_waiting() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=1, queue_limit=1) as scheduler:
        with ExitStack() as stack:
            for _ in range(2 * 1 + 1):
                stack.enter_context(scheduler.entering())
            with pytest.raises(QueueFull, match="3 requests wait already"):
                stack.enter_context(scheduler.entering())
            with pytest.raises(QueueFull, match="3 requests wait already"):
                submit(scheduler, [1], 5)
        answers_of(scheduler, [[1]], max_tokens=2)


def test_a_burst_shares_reservations() -> None:
    go_on = threading.Event()

    def hold_reservations(seen: Seen) -> None:
        if seen.type == EventType.RESERVE:
            assert go_on.wait(20)

    with counting_stages() as stages, scheduling(stages, micro_batch_sequences=32) as scheduler:
        first = submit(scheduler, [1, 2], 2)
        tokens_of(first)  # The stages are awake.
        before = sum(seen.type == EventType.RESERVE for seen in stages[0].seen)
        stages[0].inspect = hold_reservations
        burst = [submit(scheduler, [3, number], 3) for number in range(24)]
        go_on.set()
        assert [tokens_of(stream) for stream in burst] == [counted([3, number], 3) for number in range(24)]
        reservations = sum(seen.type == EventType.RESERVE for seen in stages[0].seen) - before
    assert reservations <= 2 * len(stages)


def test_nothing_begins_on_an_older_revision_and_what_runs_there_ends_there() -> None:
    with running(lambda _: counting_stage(0, 1), 2) as (old, new):
        placement = Placement([old.url], watched=True)
        placement.update(0, [Endpoint(old.url, "s0-00001")])
        old.seconds = 0.01
        with scheduling([old], placement=placement) as scheduler:
            running_one = submit(scheduler, [1, 2], 60)
            wait_until(lambda: len(running_one.token_ids) > 3)
            scheduler.endpoints_changed(0, [Endpoint(old.url, "s0-00001"), Endpoint(new.url, "s0-00002")])
            seen_by_old = {id_ for seen in old.forwards for id_ in seen.ids}
            later = [submit(scheduler, [3, number], 4) for number in range(6)]
            assert [tokens_of(stream) for stream in later] == [counted([3, number], 4) for number in range(6)]
            assert running_one.finish_reason is None
            assert tokens_of(running_one) == counted([1, 2], 60)
            assert scheduler.stats().replays == {}
        assert {id_ for seen in old.forwards for id_ in seen.ids} == seen_by_old
        assert len({id_ for seen in new.forwards for id_ in seen.ids}) == len(later)
