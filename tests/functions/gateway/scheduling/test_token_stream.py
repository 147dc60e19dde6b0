"""What a door sees of an answer: tokens, then how it ended."""

import pytest

from eventing.problems import DeadlineExceeded
from functions.gateway.scheduling.sequence import Prompt
from functions.gateway.scheduling.token_stream import TokenStream


def test_a_stream_has_ended_only_when_all_of_it_is_taken() -> None:
    """A door that waits in vain, and then sees the end, must not lose what came in between."""
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


def test_a_stream_hands_out_its_tokens_before_its_problem() -> None:
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
def test_a_sequence_without_prompt_or_answer_is_refused(prompt: list[int], max_tokens: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Prompt(prompt, max_tokens)
