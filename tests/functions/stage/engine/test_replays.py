"""Answers that break off at token 32 of 96 and are replayed by other stages in chunks of 16 do not differ, in any dtype.

Sixteen prompts go through engines of native stages, greedy and at temperature 1: first one by one, then eight at a time.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from eventing.wire.events import Sampling
from tests.support.functions.group_chain import tokens_of
from tests.support.functions.native_models import native_groups
from tests.support.functions.stage_pipeline import engines, generate

NEW_TOKENS: Final = 96
BROKEN_AT: Final = 32
PROMPTS: Final = [tokens_of(seed, 4 + 3 * seed) for seed in range(16)]


@pytest.mark.sampled
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "q4", "bfloat16/int8"])
def test_answers_that_are_replayed_do_not_differ(dtype: str, temperature: float) -> None:
    whole = answers(dtype, temperature, PROMPTS, NEW_TOKENS, chunk=256, at_once=1)
    begun = [prompt + tokens[:BROKEN_AT] for prompt, tokens in zip(PROMPTS, whole, strict=True)]
    replayed = answers(dtype, temperature, begun, NEW_TOKENS - BROKEN_AT, chunk=16, at_once=8)
    assert replayed == [tokens[BROKEN_AT:] for tokens in whole]
    assert len({tuple(tokens) for tokens in whole}) == len(PROMPTS)


def answers(
    dtype: str, temperature: float, texts: Sequence[list[int]], new_tokens: int, *, chunk: int, at_once: int
) -> list[list[int]]:
    """Answers of new stages; `at_once` texts run at the same time."""
    with engines(native_groups("llama", dtype)) as stages, ThreadPoolExecutor(at_once) as clients:
        asked = [
            clients.submit(
                generate, stages, str(seed), text, new_tokens, chunk=chunk, sampling=Sampling(temperature, seed=seed)
            )
            for seed, text in enumerate(texts)
        ]
        return [answer.result() for answer in asked]
