"""How sequences end, other than by their length or a failure of a stage."""

import time

import pytest

from eventing.problems import DeadlineExceeded, NotReady
from eventing.wire.events import EventType
from tests.support.functions.gateway import answers_of, counted, nothing_left, scheduling, submit, tokens_of
from tests.support.functions.stage_server import Seen, counting_stages


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
        stage.seconds = 0.01
        running = [submit(scheduler, [1], 10) for _ in range(2)]
        waiting = submit(scheduler, [50], 10)
        waiting.cancel()
        for stream in running:
            tokens_of(stream)
        assert all(50 not in seen.token_ids for seen in stage.forwards)


def test_a_deadline_ends_what_runs_and_what_waits() -> None:
    with counting_stages() as stages, scheduling(stages, micro_batch_sequences=1) as scheduler:
        stages[1].seconds = 0.02
        late = [submit(scheduler, [1], 100_0, deadline_seconds=0.3) for _ in range(9)]
        for stream in late:
            with pytest.raises(DeadlineExceeded, match=r"within 0\.3 seconds"):
                tokens_of(stream)
        stages[1].seconds = 0.0
        answers_of(scheduler, [[1, 2]], max_tokens=3)
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


@pytest.mark.parametrize("tokens", [1, 1000], ids=["which ended just before", "which it ends"])
def test_who_closes_has_told_the_stages_what_is_over(tokens: int) -> None:
    """Behind it the connections are closed: what was not told would be held until the lease ends, and remembered in part."""

    def slowly(seen: Seen) -> None:
        if seen.type == EventType.RELEASE:
            time.sleep(0.5)

    with counting_stages() as stages, scheduling(stages) as scheduler:
        for stage in stages:
            stage.inspect = slowly
            stage.seconds = 0.02
        submit(scheduler, [1], tokens).next_token(10)
        assert all(stage.engine.sequences for stage in stages)
        scheduler.close()
        assert not any(stage.engine.sequences for stage in stages)
