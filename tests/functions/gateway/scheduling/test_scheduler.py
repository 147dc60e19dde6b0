"""The scheduler over real stage applications and engines, undisturbed: exactness, batching, fairness, limits."""

import itertools
import time

import pytest

from eventing.problems import DeadlineExceeded, InvalidRequest, NotReady, QueueFull
from eventing.wire.events import EventType, Row, Sampling, Want
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.token_stream import TokenStream
from tests.support.functions.gateway import (
    Seen,
    StageServer,
    counted,
    counting_stages,
    scheduling,
    submit,
    tokens_of,
    wait_until,
)

PROMPTS = [[(7 * sequence + 3 * token) % 90 for token in range(1 + 5 * sequence)] for sequence in range(16)]


def run(scheduler: Scheduler, prompts: list[list[int]], max_tokens: int) -> list[TokenStream]:
    """All at once; checks every token."""
    streams = [submit(scheduler, prompt, max_tokens) for prompt in prompts]
    for stream, prompt in zip(streams, prompts, strict=True):
        assert tokens_of(stream) == counted(prompt, max_tokens)
        assert stream.finish_reason == "length"
    return streams


def at_once(events: list[Seen]) -> int:
    """The most events that were at the stage or behind it at the same time."""
    moments = sorted([(seen.arrived, 1) for seen in events] + [(seen.left, -1) for seen in events])
    return max(itertools.accumulate(step for _, step in moments))


def nothing_left(stages: list[StageServer]) -> None:
    wait_until(lambda: not any(stage.engine.sequences for stage in stages), "the release of all sequences")
    assert all(stage.engine.free_tokens == stage.group.kv.capacity_tokens for stage in stages)


def test_many_sequences_are_exact() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        streams = run(scheduler, PROMPTS, max_tokens=12)
        nothing_left(stages)
        stats = scheduler.stats()
    assert stats.tokens == 16 * 12
    assert stats.prompt_tokens == sum(len(prompt) for prompt in PROMPTS)
    assert (stats.running, stats.waiting, stats.micro_batches) == (0, 0, 0)
    assert dict(stats.sequences) == {"length": 16}
    for timings in (stream.timings() for stream in streams):
        assert timings.queue_seconds is not None
        assert timings.time_to_first_token_seconds is not None
        assert timings.total_seconds is not None
        assert 0 <= timings.queue_seconds < timings.time_to_first_token_seconds < timings.total_seconds
        assert timings.replays == 0


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_any_number_of_stages(num_stages: int) -> None:
    with counting_stages(num_stages) as stages, scheduling(stages, chunk_tokens=5) as scheduler:
        run(scheduler, PROMPTS[:6], max_tokens=6)
        nothing_left(stages)


def test_end_of_text_ends_the_answer_and_is_not_part_of_it() -> None:
    expected = counted([1, 2, 3], 6)
    with counting_stages() as stages, scheduling(stages) as scheduler:
        stream = submit(scheduler, [1, 2, 3], 50, eos_ids=[expected[4]])
        assert tokens_of(stream) == expected[:4]
    assert stream.finish_reason == "stop"
    assert stream.token_ids == expected[:4]
    assert stream.completion_tokens == 5


def test_the_wire_says_what_each_row_is() -> None:
    sampling = Sampling(temperature=0.0, seed=7)
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        stream = submit(scheduler, PROMPTS[8], 3, sampling=sampling)
        tokens_of(stream)
    rows = [row for seen in stages[2].forwards for row in seen.rows]
    assert [(row.position, row.length, row.want) for row in rows] == [
        (0, 16, Want.NONE),
        (16, 16, Want.NONE),
        (32, 9, Want.TOKEN),
        (41, 1, Want.TOKEN),
        (42, 1, Want.TOKEN),
    ]
    assert [row.sampling for row in rows] == [None, None, sampling, sampling, sampling]
    assert [row.reserve_tokens for row in rows] == [44, None, None, None, None]
    assert [seen.type for seen in stages[1].seen][:2] == [EventType.WARMUP, EventType.RESERVE]


def test_bodies_pass_through_byte_for_byte() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        run(scheduler, PROMPTS[:5], max_tokens=4)
    for before, behind in itertools.pairwise(stages):
        assert {seen.reply for seen in before.forwards} == {seen.body for seen in behind.forwards}


def test_there_is_a_micro_batch_for_each_stage_and_they_are_equally_large() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        for stage in stages:
            stage.seconds = 0.01
        run(scheduler, [[1, 2]] * 16, max_tokens=12)
        nothing_left(stages)
    decodes = [seen for seen in stages[0].forwards if all(row.position > 1 for row in seen.rows)]
    everywhere = [seen for stage in stages for seen in stage.forwards]
    assert at_once(everywhere) >= 3
    assert {len(seen.rows) for seen in decodes[6:-6]} <= {5, 6}


def test_few_sequences_are_spread_and_a_single_one_is_not_split() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        run(scheduler, [[1], [2]], max_tokens=5)
        assert {len(seen.rows) for seen in stages[0].forwards} == {1}
        run(scheduler, [[3]], max_tokens=5)


def test_sequences_join_and_leave_at_step_boundaries() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=4) as scheduler:
        stage.seconds = 0.005
        long = submit(scheduler, [5], 60)
        assert long.next_token(10) is not None
        run(scheduler, [[1], [2], [3]], max_tokens=4)
        assert long.finish_reason is None
        run(scheduler, [[4, 4]], max_tokens=30)
        assert [long.next_token(10) for _ in range(59)] == counted([5], 60)[1:]
    assert {1, 4} <= {len(seen.rows) for seen in stage.forwards}


def test_chunks_of_one_prompt_are_in_different_stages_at_once_and_never_two_in_one() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=8) as scheduler:
        for stage in stages:
            stage.seconds = 0.02
        began = time.monotonic()
        stream = submit(scheduler, [1] * 64, 2)
        tokens_of(stream)
    chunks = [[seen for seen in stage.forwards if seen.rows[0].length == 8] for stage in stages]
    assert [len(of_stage) for of_stage in chunks] == [8, 8, 8]
    assert at_once([seen for of_stage in chunks for seen in of_stage]) >= 3
    assert [at_once(of_stage) for of_stage in chunks] == [1, 1, 1]
    assert chunks[2][-1].left - began < 8 * 3 * 0.02, "no faster than one chunk after the other"


def test_running_decodes_wait_for_at_most_one_chunk() -> None:
    """In steps, not in seconds: between two tokens of a running sequence a stage computes at most one chunk of the prompts."""
    with counting_stages(max_merge=1) as stages, scheduling(stages, chunk_tokens=64) as scheduler:
        for stage in stages:
            stage.seconds = 0.002
        running = submit(scheduler, [1], 400)
        running.next_token(10)
        prompts = [[number] * 1024 for number in range(3)]
        run(scheduler, prompts, max_tokens=2)
        running.cancel()
    for stage in stages:
        waits = [_chunks_waited_for(stage, over, rows[0]) for over, rows in stage.queued if rows[0].length == 1]
        assert max(waits) == 1, "it met chunks, and never two"


def test_where_one_stage_computes_at_a_time_all_sequences_travel_together() -> None:
    with counting_stages() as stages, scheduling(stages, stages_at_once=1) as scheduler:
        for stage in stages:
            stage.seconds = 0.002
        run(scheduler, [[number] * 4 for number in range(6)], max_tokens=20)
        together = [len(seen.rows) for seen in stages[0].forwards if seen.rows[0].length == 1]
    assert max(together) == 6
    assert together.count(6) >= 10, "but for those who came late, every step is one event"


def _chunks_waited_for(stage: StageServer, over: int, step: Row) -> int:
    """Passes with a chunk that began or ran on between the arrival of a decode step and its own pass."""
    own = next((n for n, segments in enumerate(stage.passes) if (step.position, step.length) in segments), None)
    if own is None:  # Its sequence was cancelled while it waited.
        return 0
    return sum(any(length > 1 for _, length in segments) for segments in stage.passes[over:own])


def test_prompts_take_turns() -> None:
    """A short prompt does not wait until a long one is through."""
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        for stage in stages:
            stage.seconds = 0.005
        long = submit(scheduler, [1] * 640, 2)
        wait_until(lambda: len(stages[0].forwards) > 3)
        short = submit(scheduler, [2] * 20, 2)
        tokens_of(short)
        assert long.timings().time_to_first_token_seconds is None
        assert tokens_of(long) == counted([1] * 640, 2)


def test_clients_take_turns() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=1) as scheduler:
        stage.seconds = 0.005
        crowd = [submit(scheduler, [1], 6, client_id="crowd") for _ in range(12)]
        single = submit(scheduler, [2], 6, client_id="single")
        tokens_of(single)
        assert sum(stream.finish_reason is None for stream in crowd) >= 8
        for stream in crowd:
            tokens_of(stream)


def test_cancelling_frees_memory_everywhere_at_once() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=8) as scheduler:
        stages[1].seconds = 0.05
        others = [submit(scheduler, [3], 8), submit(scheduler, [4] * 50, 4)]
        running, prefilling = submit(scheduler, [1], 1000), submit(scheduler, [2] * 400, 10)
        running.next_token(10)
        prefilling.cancel()
        running.cancel()
        assert running.finish_reason == prefilling.finish_reason == "cancelled"
        assert prefilling.next_token(1) is None
        assert [tokens_of(other) for other in others] == [counted([3], 8), counted([4] * 50, 4)]
        nothing_left(stages)
        assert scheduler.stats().sequences["cancelled"] == 2


def test_a_cancelled_sequence_in_the_queue_is_never_sent() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=1) as scheduler:
        stage.seconds = 0.01
        running = [submit(scheduler, [1], 10) for _ in range(2)]
        waiting = submit(scheduler, [50], 10)
        waiting.cancel()
        for stream in running:
            tokens_of(stream)
        assert all(50 not in seen.token_ids for seen in stage.forwards)


def test_the_queue_is_bounded() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=2, queue_limit=3) as scheduler:
        stage.seconds = 0.02
        accepted = [submit(scheduler, [1], 5) for _ in range(2 * 2 + 3)]
        with pytest.raises(QueueFull, match="requests wait already"):
            submit(scheduler, [1], 5)
        for stream in accepted:
            assert tokens_of(stream) == counted([1], 5)
        run(scheduler, [[1]], max_tokens=2)


def test_a_deadline_ends_what_runs_and_what_waits() -> None:
    with counting_stages() as stages, scheduling(stages, micro_batch_sequences=1) as scheduler:
        stages[1].seconds = 0.02
        late = [submit(scheduler, [1], 100_0, deadline_seconds=0.3) for _ in range(9)]
        for stream in late:
            with pytest.raises(DeadlineExceeded, match=r"within 0\.3 seconds"):
                tokens_of(stream)
        stages[1].seconds = 0.0
        run(scheduler, [[1, 2]], max_tokens=3)
        nothing_left(stages)


def test_an_invalid_row_fails_alone() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        good = [submit(scheduler, [5, 0], 5)]
        bad = submit(scheduler, [5, 1_000_000], 5)
        good += [submit(scheduler, [5, number], 5) for number in range(1, 4)]
        with pytest.raises(InvalidRequest, match="token id 1000000 is outside the vocabulary"):
            tokens_of(bad)
        for number, stream in enumerate(good):
            assert tokens_of(stream) == counted([5, number], 5)
        nothing_left(stages)


def test_what_can_never_fit_is_refused_and_holds_nobody_up() -> None:
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages) as scheduler:
        impossible = submit(scheduler, [1] * 60, 41)
        possible = submit(scheduler, [1] * 60, 40)
        with pytest.raises(InvalidRequest, match="101 tokens are more than a stage can ever hold"):
            tokens_of(impossible)
        assert tokens_of(possible) == counted([1] * 60, 40)
        nothing_left(stages)


def test_closing_ends_what_is_there_and_takes_nothing_new() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        stages[0].seconds = 0.02
        stream = submit(scheduler, [1], 1000)
        stream.next_token(10)
        scheduler.close()
        with pytest.raises(NotReady, match="shutting down"):
            tokens_of(stream)
        with pytest.raises(NotReady, match="shutting down"):
            submit(scheduler, [1], 1)
        nothing_left(stages)
