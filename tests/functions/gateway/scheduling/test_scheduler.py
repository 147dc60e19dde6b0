"""The scheduler over real stage applications and engines: every token, the events on the wire, and the ends of answers."""

import itertools
import threading
import time

import pytest

from eventing.problems import DeadlineExceeded, NotReady
from eventing.wire.events import EventType, Sampling, Want
from functions.gateway.scheduling import scheduler as scheduler_module
from functions.gateway.scheduling.sequence import Prompt
from functions.gateway.scheduling.token_stream import TokenStream
from tests.support.functions.gateway import WAIT_SECONDS, answers_of, counted, nothing_left, scheduling, submit, tokens_of
from tests.support.functions.stage_server import counting_stages, hold, inspecting, is_type

PROMPTS = [[(7 * sequence + 3 * token) % 90 for token in range(1 + 5 * sequence)] for sequence in range(16)]


@pytest.mark.slow
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
        assert 0 <= timings.queue_seconds < timings.time_to_first_token_seconds < timings.total_seconds
        assert timings.replays == 0


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_any_number_of_stages(num_stages: int) -> None:
    with counting_stages(num_stages) as stages, scheduling(stages, chunk_tokens=5) as scheduler:
        answers_of(scheduler, PROMPTS[:6], max_tokens=6)
        nothing_left(stages)


def test_rows_on_the_wire_say_what_they_want() -> None:
    sampling = Sampling(temperature=0.0, seed=7)
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        tokens_of(submit(scheduler, PROMPTS[8], 3, sampling=sampling))
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
    for before, after in itertools.pairwise(stages):
        assert {seen.reply for seen in before.forwards} == {seen.body for seen in after.forwards}


# How answers end.


def test_end_of_text_ends_the_answer_and_is_not_part_of_it() -> None:
    expected = counted([1, 2, 3], 6)
    with counting_stages() as stages, scheduling(stages) as scheduler:
        stream = submit(scheduler, [1, 2, 3], 50, eos_ids=[expected[4]])
        assert tokens_of(stream) == expected[:4]
    assert stream.finish_reason == "stop"
    assert stream.token_ids == expected[:4]
    assert stream.completion_tokens == 5


def test_a_cancelled_sequence_in_the_queue_is_never_sent() -> None:
    with counting_stages(1) as (stage,), scheduling([stage], micro_batch_sequences=1) as scheduler:
        go_on = hold(stage, range(10))
        running = [submit(scheduler, [1], 10) for _ in range(2)]
        submit(scheduler, [50], 10).cancel()
        go_on.set()
        for stream in running:
            tokens_of(stream)
        assert all(50 not in seen.token_ids for seen in stage.forwards)


def test_a_deadline_ends_running_and_waiting_sequences() -> None:
    with counting_stages() as stages, scheduling(stages, micro_batch_sequences=1) as scheduler:
        stages[1].seconds = 0.02
        late = [submit(scheduler, [1], 1000, deadline_seconds=0.3) for _ in range(9)]
        for stream in late:
            with pytest.raises(DeadlineExceeded, match=r"within 0\.3 seconds"):
                tokens_of(stream)
        stages[1].seconds = 0.0
        answers_of(scheduler, [[1, 2]], max_tokens=3)
        nothing_left(stages)


def test_closing_ends_all_answers_and_refuses_new_ones() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        stages[0].seconds = 0.02
        stream = submit(scheduler, [1], 1000)
        stream.next_token(WAIT_SECONDS)
        scheduler.close()
        with pytest.raises(NotReady, match="shutting down"):
            tokens_of(stream)
        with pytest.raises(NotReady, match="shutting down"):
            submit(scheduler, [1], 1)
        nothing_left(stages)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 1000], ids=["ended just before", "ended by closing"])
def test_closing_waits_until_the_stages_have_heard_all_releases(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections are closed next, so a release that was not sent would leave the memory taken until the lease ends."""
    with counting_stages() as stages, scheduling(stages) as scheduler:
        monkeypatch.setattr(scheduler_module, "_CLOSE_SECONDS", WAIT_SECONDS)
        closing = threading.Event()
        for stage in stages:
            stage.inspect = inspecting(is_type(EventType.RELEASE), lambda: closing.wait() and time.sleep(0.5))
            stage.seconds = 0.02
        submit(scheduler, [1], tokens).next_token(WAIT_SECONDS)
        assert all(stage.engine.sequences.by_id for stage in stages)
        closing.set()
        scheduler.close()
        assert not any(stage.engine.sequences.by_id for stage in stages)


# The stream of an answer.


def test_a_stream_has_ended_only_when_all_its_tokens_are_taken() -> None:
    """A reader that times out and then sees the end must not lose tokens that came in between."""
    stream = TokenStream(3, eos_ids=[9])
    assert stream.next_token(0.0) is None
    assert not stream.ended
    stream.put(5)
    stream.put(9)
    assert stream.finish_reason == "stop"
    assert not stream.ended
    assert stream.next_token() == 5
    assert stream.ended
    assert stream.next_token() is None


def test_a_stream_returns_its_tokens_before_its_problem() -> None:
    stream = TokenStream(3)
    stream.put(5)
    stream.fail(DeadlineExceeded("late"))
    stream.put(6)
    assert stream.next_token() == 5
    with pytest.raises(DeadlineExceeded, match="late"):
        stream.next_token()
    stream.cancel()
    assert stream.finish_reason is None


@pytest.mark.parametrize(("prompt", "max_tokens"), [([], 1), ([1], 0)])
def test_an_empty_prompt_and_an_empty_answer_are_refused(prompt: list[int], max_tokens: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Prompt(prompt, max_tokens)
