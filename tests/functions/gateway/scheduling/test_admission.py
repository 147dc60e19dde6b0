"""Admission: clients share a bounded queue, a burst shares reservations, nothing begins on an older revision."""

import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from eventing.problems import QueueFull
from eventing.wire.events import EventType
from functions.gateway.answers.service import BACKGROUND
from functions.gateway.scheduling.waiting import AGEING_TURNS, FairQueue, MemoryBacklog
from functions.gateway.stages.routes import Endpoint, Placement
from tests.support.functions.gateway import answers_of, counted, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import counting_stage, counting_stages, hold, inspecting, is_type, running


class SequenceStub(SimpleNamespace):
    __hash__ = object.__hash__


def waiting(client_id: str, number: int, priority: int = 0) -> Any:
    prompt = SimpleNamespace(client_id=client_id, priority=priority, turn=(client_id, priority))
    return SequenceStub(number=number, prompt=prompt, reserve_tokens=10 * (number + 1), overtaken_tokens=0, overtook=())


def drain(queue: FairQueue) -> list[int]:
    """Numbers of all sequences in the order in which they are taken."""
    numbers = []
    while (sequence := queue.peek()) is not None:
        queue.take(sequence)
        numbers.append(sequence.number)
    return numbers


def test_the_queue_gives_each_client_its_turn() -> None:
    queue = FairQueue()
    for number, client in enumerate("aaaabbc"):
        queue.push(waiting(client, number))
    returned = waiting("a", 9)
    second = next(sequence for sequence in queue if sequence.number == 1)
    assert queue.remove(second)
    assert not queue.remove(second)
    queue.returned.append(returned)
    assert len(queue) == len(list(queue)) == 7
    assert queue.peek() == returned
    assert queue.peek(most_tokens=60).number == 0
    assert queue.peek(most_tokens=9) is None
    assert drain(queue) == [9, 0, 4, 6, 2, 5, 3]
    assert len(queue) == 0


def test_what_was_refused_counts_for_no_sequence_as_overtaken() -> None:
    """Two micro-batches that ask at once may refuse each other at every stage: all that overtook are then in the backlog."""
    backlog, large, small = MemoryBacklog(), waiting("a", 7), waiting("a", 1)
    backlog.add(large)
    before = backlog.overtaking_tokens()
    backlog.overtaken(small)
    assert backlog.overtaking_tokens() == before - small.reserve_tokens
    backlog.add(small)
    assert backlog.overtaking_tokens(besides=small) == before


def test_a_sequence_that_needs_too_much_does_not_hide_others_of_its_client() -> None:
    queue = FairQueue()
    for number in (5, 2, 1):
        queue.push(waiting("a", number))
    assert queue.peek(most_tokens=50).number == 2
    assert queue.peek().number == 5


def test_the_queue_serves_higher_priorities_first_in_three_of_four_turns() -> None:
    queue = FairQueue()
    for number, (client, priority) in enumerate([("low", -1), ("a", 0), ("a", 0), ("b", 0), *[("high", 10**12)] * 4]):
        queue.push(waiting(client, number, priority))
    queue.returned.append(waiting("low", 9, -1))
    assert drain(queue) == [9, 4, 5, 6, 0, 7, 1, 3, 2]


def test_what_a_client_asks_in_the_background_does_not_hold_up_its_other_requests() -> None:
    queue = FairQueue()
    for number, priority in enumerate([-BACKGROUND, -BACKGROUND, 0]):
        queue.push(waiting("a", number, priority))
    assert drain(queue) == [2, 0, 1]


def test_a_low_priority_is_served_however_many_of_higher_ones_come() -> None:
    queue = FairQueue()
    queue.push(waiting("low", 999, -1))
    for turn in range(100):
        for client in ("high", "higher"):
            queue.push(waiting(client, turn, 5))
        sequence = queue.peek()
        queue.take(sequence)
        if sequence.number == 999:
            break
    assert turn < 2 * AGEING_TURNS


def test_a_crowd_does_not_hold_up_a_single_request_of_another_client() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=1) as scheduler:
        go_on = hold(stage, range(6))
        crowd = [submit(scheduler, [1], 6, client_id="crowd") for _ in range(12)]
        single = submit(scheduler, [2], 6, client_id="single")
        go_on.set()
        for stream in (single, *crowd):
            tokens_of(stream)
    assert stage.prompts_begun.index(2) <= 4, "eight and more of the crowd begin after it"


def test_the_queue_is_bounded() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=2, queue_limit=3) as scheduler:
        go_on = hold(stage, range(5))
        accepted = [submit(scheduler, [1], 5) for _ in range(2 * 2 + 3)]
        with pytest.raises(QueueFull, match="requests wait already"):
            submit(scheduler, [1], 5)
        go_on.set()
        for stream in accepted:
            assert tokens_of(stream) == counted([1], 5)
        answers_of(scheduler, [[1]], max_tokens=2)


def test_a_request_that_is_being_read_counts_as_waiting() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=1, queue_limit=1) as scheduler:
        with ExitStack() as stack:
            for _ in range(2 * 1 + 1):
                stack.enter_context(scheduler.entering(""))
            with pytest.raises(QueueFull, match="3 requests wait already"):
                stack.enter_context(scheduler.entering(""))
            with pytest.raises(QueueFull, match="3 requests wait already"):
                submit(scheduler, [1], 5)
        answers_of(scheduler, [[1]], max_tokens=2)


def test_five_modest_clients_get_places_in_a_queue_that_a_greedy_one_has_filled() -> None:
    """The greedy one's newest requests give way, those that run go on, and it gets no place of the others."""
    modest = [f"modest-{number}" for number in range(5)]
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=2, queue_limit=12) as scheduler:
        go_on = threading.Event()
        stage.inspect = inspecting(is_type(EventType.FORWARD), go_on.wait)
        greedy = [submit(scheduler, [1], 5, client_id="greedy") for _ in range(2 * 2 + 12)]
        with pytest.raises(QueueFull, match="requests wait already"):
            submit(scheduler, [1], 5, client_id="greedy")
        served = [submit(scheduler, [2], 5, client_id=client) for client in modest for _ in range(2)]
        with pytest.raises(QueueFull, match="requests wait already"):
            submit(scheduler, [1], 5, client_id="greedy")
        go_on.set()
        assert [tokens_of(stream) for stream in served] == [counted([2], 5)] * 10
        kept = greedy[: -len(served)]
        assert [tokens_of(stream) for stream in kept] == [counted([1], 5)] * len(kept)
        for stream in greedy[len(kept) :]:
            with pytest.raises(QueueFull, match="another client asked"):
                tokens_of(stream)


def test_a_request_that_is_being_read_gives_way_too() -> None:
    limits = {"micro_batch_sequences": 1, "queue_limit": 1}
    with counting_stages(1) as stages, scheduling(stages, **limits) as scheduler, ExitStack() as stack:
        for _ in range(2 * 1):
            stack.enter_context(scheduler.entering("greedy"))
        with pytest.raises(QueueFull, match="another client asked"), scheduler.entering("greedy"):
            modest = submit(scheduler, [1], 5, client_id="modest")
        assert tokens_of(modest) == counted([1], 5)


def test_a_burst_shares_reservations() -> None:
    go_on = threading.Event()
    with counting_stages() as stages, scheduling(stages, micro_batch_sequences=32) as scheduler:
        tokens_of(submit(scheduler, [1, 2], 2))  # wakes the stages
        before = sum(seen.type == EventType.RESERVE for seen in stages[0].seen)
        stages[0].inspect = inspecting(is_type(EventType.RESERVE), go_on.wait)
        burst = [submit(scheduler, [3, number], 3) for number in range(24)]
        go_on.set()
        assert [tokens_of(stream) for stream in burst] == [counted([3, number], 3) for number in range(24)]
        reservations = sum(seen.type == EventType.RESERVE for seen in stages[0].seen) - before
    assert reservations <= 2 * len(stages)


@pytest.mark.slow
def test_sequences_end_on_the_revision_where_they_began_and_none_begins_on_an_older_one() -> None:
    with running(lambda _: counting_stage(0, 1), 2) as (old, new):
        placement = Placement([old.url], watched=True)
        placement.update(0, [Endpoint(old.url, "s0-00001")])
        go_on = hold(old, range(10, 60))
        with scheduling([old], placement=placement) as scheduler:
            early = submit(scheduler, [1, 2], 60)
            wait_until(lambda: len(early.token_ids) > 3)
            scheduler.endpoints_changed(0, [Endpoint(old.url, "s0-00001"), Endpoint(new.url, "s0-00002")])
            seen_by_old = {id_ for seen in old.forwards for id_ in seen.ids}
            later = [submit(scheduler, [3, number], 4) for number in range(6)]
            assert [tokens_of(stream) for stream in later] == [counted([3, number], 4) for number in range(6)]
            go_on.set()
            assert tokens_of(early) == counted([1, 2], 60)
            assert scheduler.stats().replays == {}
        assert {id_ for seen in old.forwards for id_ in seen.ids} == seen_by_old
        assert len({id_ for seen in new.forwards for id_ in seen.ids}) == len(later)
