"""Log-probabilities of prompt and answer do not depend on chunks, draft tokens and failures."""

import math

import pytest

from eventing.wire.generation import TokenLogprob
from tests.support.functions.counting_group import VOCAB
from tests.support.functions.gateway import counted, nothing_left, scheduling, submit, tokens_of
from tests.support.functions.stage_server import Fault, counting_stages, on_forwards

PROMPT = [7, 7, 14, 28, 50, 3, 2, 1, 1, 90, 5]
LOG_SUM = math.log(math.e + VOCAB - 1)  # counting stages have the logit 1 for the next token, 0 for every other


def expected(tokens: list[int], position: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens from `position` on, each with the most probable token."""
    found = []
    for index in range(position, len(tokens)):
        next_token = sum(tokens[:index]) % VOCAB
        found.append(TokenLogprob(tokens[index], (tokens[index] == next_token) - LOG_SUM, ((next_token, 1 - LOG_SUM),)))
    return found


def same(found: list[TokenLogprob], wanted: list[TokenLogprob]) -> bool:
    return [(one.token_id, one.top[0][0]) for one in found] == [(one.token_id, one.top[0][0]) for one in wanted] and [
        one.logprob for one in found
    ] == pytest.approx([one.logprob for one in wanted], abs=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 4, 256])
@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_a_prompt_is_scored_in_any_chunks(chunk_tokens: int, max_tokens: int) -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=chunk_tokens) as scheduler:
        stream = submit(scheduler, PROMPT, max_tokens, scored=True, top_logprobs=1)
        tokens = tokens_of(stream)
        assert tokens == counted(PROMPT, max_tokens)
        assert stream.finish_reason == "length"
        assert same(stream.prompt_logprobs(), expected(PROMPT, 1))
        drawn = stream.logprobs[:max_tokens]
        assert same([one for one in drawn if one], expected(PROMPT + tokens, len(PROMPT)))
        nothing_left(stages)


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_prompt_of_one_token_has_nothing_to_score(max_tokens: int) -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        stream = submit(scheduler, [7], max_tokens, scored=True)
        assert tokens_of(stream) == counted([7], max_tokens)
        assert stream.prompt_logprobs() == []
        nothing_left(stages)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("fault", [Fault.REPLY_LOST, Fault.REFUSED, Fault.KILLED_RESTARTED, Fault.TWICE])
def test_scores_are_the_same_if_a_stage_breaks_meanwhile(stage: int, fault: Fault) -> None:
    with counting_stages(3) as stages, scheduling(stages, chunk_tokens=3) as scheduler:
        stages[stage].inspect = on_forwards(fault, 3)
        stream = submit(scheduler, PROMPT, 3, scored=True, top_logprobs=1)
        assert tokens_of(stream) == counted(PROMPT, 3)
        assert same(stream.prompt_logprobs(), expected(PROMPT, 1))
        nothing_left(stages)


def test_draft_tokens_change_no_log_probability() -> None:
    """The answer repeats one token, which is drafted."""
    zeros = [0] * 8
    with counting_stages() as stages, scheduling(stages, draft_tokens=4) as scheduler:
        stream = submit(scheduler, zeros, 24, top_logprobs=1)
        assert tokens_of(stream) == counted(zeros, 24)
        assert stream.draft_tokens_accepted > 0
        drawn = stream.logprobs[:24]
        assert same([one for one in drawn if one], expected(zeros + [0] * 24, 8))
