"""The scheduler over real stage applications and engines, undisturbed: every token, and what is on the wire."""

import itertools

import pytest

from eventing.wire.events import EventType, Sampling, Want
from tests.support.functions.gateway import answers_of, nothing_left, scheduling, submit, tokens_of
from tests.support.functions.stage_server import counting_stages

PROMPTS = [[(7 * sequence + 3 * token) % 90 for token in range(1 + 5 * sequence)] for sequence in range(16)]


def test_many_sequences_are_exact() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        streams = answers_of(scheduler, PROMPTS, max_tokens=12)
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
        answers_of(scheduler, PROMPTS[:6], max_tokens=6)
        nothing_left(stages)


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
        answers_of(scheduler, PROMPTS[:5], max_tokens=4)
    for before, behind in itertools.pairwise(stages):
        assert {seen.reply for seen in before.forwards} == {seen.body for seen in behind.forwards}
