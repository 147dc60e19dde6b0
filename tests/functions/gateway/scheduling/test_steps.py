"""Steps: how many are under way at the same time, and what each of them carries."""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from eventing.wire.events import EventType, Row
from tests.support.functions.gateway import (
    WAIT_SECONDS,
    answers_of,
    check,
    counted,
    nothing_left,
    scheduling,
    submit,
    tokens_of,
    wait_until,
)
from tests.support.functions.stage_server import Seen, StageServer, counting_stages, hold, inspecting, is_type


def at_once(events: list[Seen]) -> int:
    """The most events that were in flight at the same time."""
    moments = sorted([(seen.arrived, 1) for seen in events] + [(seen.left, -1) for seen in events])
    return max(itertools.accumulate(step for _, step in moments))


@contextmanager
def admitted_together(stage: StageServer) -> Iterator[None]:
    """Holds reservations until its end, so that requests submitted within it are admitted together. stage: the first."""
    go_on = threading.Event()
    stage.inspect = inspecting(is_type(EventType.RESERVE), go_on.wait)
    yield
    go_on.set()


@pytest.mark.slow
def test_each_stage_gets_a_micro_batch_of_equal_size() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        for stage in stages:
            stage.seconds = 0.01
        with admitted_together(stages[0]):
            streams = [submit(scheduler, [1, 2], 12) for _ in range(16)]
        check(streams, [[1, 2]] * 16, 12)
        nothing_left(stages)
    decodes = [seen for seen in stages[0].forwards if all(row.position > 1 for row in seen.rows)]
    everywhere = [seen for stage in stages for seen in stage.forwards]
    assert at_once(everywhere) >= 3
    assert {len(seen.rows) for seen in decodes[6:-6]} <= {5, 6}


def test_two_sequences_are_spread_over_micro_batches() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        answers_of(scheduler, [[1], [2]], max_tokens=5)
        assert {len(seen.rows) for seen in stages[0].forwards} == {1}
        answers_of(scheduler, [[3]], max_tokens=5)


def test_all_sequences_share_a_micro_batch_if_one_stage_computes_at_a_time() -> None:
    with counting_stages() as stages, scheduling(stages, stages_at_once=1) as scheduler:
        for stage in stages:
            stage.seconds = 0.002
        with admitted_together(stages[0]):
            streams = [submit(scheduler, [number] * 4, 20) for number in range(6)]
        check(streams, [[number] * 4 for number in range(6)], 20)
        together = [len(seen.rows) for seen in stages[0].forwards if seen.rows[0].length == 1]
    assert max(together) == 6
    assert together.count(6) >= 10, "every step is one event, once all have joined"


def test_sequences_join_and_leave_between_steps() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=4) as scheduler:
        stage.seconds = 0.005
        long = submit(scheduler, [5], 20_000)
        assert long.next_token(WAIT_SECONDS) is not None
        with admitted_together(stage):
            streams = [submit(scheduler, [number], 4) for number in (1, 2, 3)]
        check(streams, [[1], [2], [3]], 4)
        answers_of(scheduler, [[4, 4]], max_tokens=30)
        assert long.finish_reason is None
        assert [long.next_token(WAIT_SECONDS) for _ in range(59)] == counted([5], 60)[1:]
        long.cancel()
    assert {1, 4} <= {len(seen.rows) for seen in stage.forwards}


@pytest.mark.slow
def test_chunks_of_one_prompt_are_at_different_stages_at_the_same_time() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=8) as scheduler:
        for stage in stages:
            stage.seconds = 0.05
        tokens_of(submit(scheduler, [1] * 64, 2))
    chunks = [[seen for seen in stage.forwards if seen.rows[0].length == 8] for stage in stages]
    assert [len(of_stage) for of_stage in chunks] == [8, 8, 8]
    assert at_once([seen for of_stage in chunks for seen in of_stage]) >= 3
    assert [at_once(of_stage) for of_stage in chunks] == [1, 1, 1]


def test_running_decodes_wait_for_at_most_one_chunk() -> None:
    """Between two tokens of a running sequence, a stage computes at most one chunk of the prompts."""
    with counting_stages(max_merge=1) as stages, scheduling(stages, chunk_tokens=64) as scheduler:
        for stage in stages:
            stage.seconds = 0.002
        running = submit(scheduler, [1], 400)
        running.next_token(WAIT_SECONDS)
        prompts = [[number] * 1024 for number in range(3)]
        answers_of(scheduler, prompts, max_tokens=2)
        running.cancel()
    for stage in stages:
        waits = [_chunks_waited_for(stage, over, rows[0]) for over, rows in stage.queued if rows[0].length == 1]
        assert max(waits) == 1, "some waited for a chunk, none for two"


def _chunks_waited_for(stage: StageServer, over: int, step: Row) -> int:
    """Forward passes with a chunk between the arrival of a decode step and its own forward pass."""
    own = next((n for n, segments in enumerate(stage.passes) if (step.position, step.length) in segments), None)
    if own is None:  # its sequence was cancelled while it waited
        return 0
    return sum(any(length > 1 for _, length in segments) for segments in stage.passes[over:own])


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        go_on = hold(stages[0], [64])
        long = submit(scheduler, [1] * 640, 2)
        short = submit(scheduler, [2] * 20, 2)
        wait_until(lambda: scheduler.stats().running == 2)
        go_on.set()
        check([short, long], [[2] * 20, [1] * 640], 2)
    rows = [row for seen in stages[0].forwards for row in seen.rows]
    assert [row.id.endswith("-1") for row in rows].index(True) < 10, "the long prompt has forty chunks"


def test_chunks_of_prompts_go_by_client() -> None:
    """A greedy client's six prompts are computed as one client's: each of five others gets as many tokens per round."""
    with counting_stages(1) as (stage,), scheduling([stage], chunk_tokens=16, micro_batch_sequences=16) as scheduler:
        tokens_of(submit(scheduler, [9], 1))  # wakes the stage
        with admitted_together(stage):
            submitted = [submit(scheduler, [1] * 320, 2, client_id="greedy") for _ in range(6)]
            submitted += [submit(scheduler, [2 + number] * 320, 2, client_id=f"modest-{number}") for number in range(5)]
        for stream in submitted:
            tokens_of(stream)
    clients = [seen.token_ids[0] for seen in stage.forwards if len(seen.token_ids) == 16]
    all_there = max(clients.index(client) for client in range(1, 7))
    counts = Counter(clients[all_there : all_there + 60])
    assert max(counts[client] for client in range(1, 7)) - min(counts[client] for client in range(1, 7)) <= 2
