"""Answers without a length of their own: memory for them is reserved as they grow."""

import pytest

from eventing.problems import InvalidRequest
from tests.support.functions.gateway import counted, nothing_left, scheduling, submit, tokens_of
from tests.support.functions.stage_server import counting_stages


def test_an_answer_that_outgrows_its_memory_goes_on_with_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("functions.gateway.scheduling.sequence.FIRST_RESERVED_TOKENS", 8)
    with counting_stages(capacity_tokens=200) as stages, scheduling(stages) as scheduler:
        stream = submit(scheduler, [1, 2, 3], 60, open_ended=True)
        assert tokens_of(stream) == counted([1, 2, 3], 60)
        assert stream.finish_reason == "length"
        assert scheduler.stats().grown == 3, "8, 16, 32 and 60 tokens"
        assert not scheduler.stats().replays
        nothing_left(stages)


def test_many_that_could_fill_the_context_run_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them alone may want all of the memory, in the end; none of them breaks off, and none waits for ever."""
    monkeypatch.setattr("functions.gateway.scheduling.sequence.FIRST_RESERVED_TOKENS", 8)
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages) as scheduler:
        prompts = [[number] for number in range(1, 9)]
        streams = [submit(scheduler, prompt, 90, open_ended=True) for prompt in prompts]
        assert submit(scheduler, [5], 4).next_token(10) == 5
        for stream, prompt in zip(streams, prompts, strict=True):
            assert tokens_of(stream) == counted(prompt, 90)
        nothing_left(stages)


@pytest.mark.parametrize("capacity", [20, 31, 64, 65, 67])
def test_it_ends_where_a_stage_can_hold_no_more(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    """Another context's worth was promised by nobody: it ends as one that has come to its length."""
    monkeypatch.setattr("functions.gateway.scheduling.sequence.FIRST_RESERVED_TOKENS", 16)
    with counting_stages(capacity_tokens=capacity) as stages, scheduling(stages) as scheduler:
        stream = submit(scheduler, [1, 2, 3, 4], 400, open_ended=True)
        assert tokens_of(stream) == counted([1, 2, 3, 4], capacity - 4)
        assert stream.finish_reason == "length"
        nothing_left(stages)


def test_a_prompt_that_never_fits_is_refused() -> None:
    with counting_stages(capacity_tokens=50) as stages, scheduling(stages) as scheduler:
        with pytest.raises(InvalidRequest, match="more than a stage can ever hold"):
            tokens_of(submit(scheduler, [1] * 60, 400, open_ended=True))
        nothing_left(stages)
