"""The vector of a text does not depend on chunks, other texts and failures."""

from itertools import accumulate

import pytest

from eventing.wire.events import Pooling
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.token_stream import TokenStream
from tests.support.functions.gateway import nothing_left, scheduling, submit, tokens_of
from tests.support.functions.stage_server import Fault, counting_stages, on_forwards

TEXT = [7, 7, 14, 28, 50, 3, 2, 1, 1, 90, 5]


def expected(text: list[int], pooling: Pooling) -> list[float]:
    """Counting stages have [sum of the tokens so far, 0, 0, 0] as hidden states."""
    sums = list(accumulate(text))
    return [sums[-1] if pooling is Pooling.LAST else sum(sums) / len(sums), 0, 0, 0]


def ask(scheduler: Scheduler, text: list[int], pooling: Pooling, **settings: object) -> TokenStream:
    return submit(scheduler, text, 0, pooling=pooling, **settings)


def vector_of(stream: TokenStream) -> list[float]:
    assert tokens_of(stream) == []
    assert stream.finish_reason == "length"
    return stream.vector


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 256])
@pytest.mark.parametrize("text", [TEXT, [9]], ids=["long", "one token"])
def test_a_text_becomes_a_vector_in_any_chunks(text: list[int], chunk_tokens: int, pooling: Pooling) -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=chunk_tokens) as scheduler:
        assert vector_of(ask(scheduler, text, pooling)) == pytest.approx(expected(text, pooling), rel=1e-6)
        nothing_left(stages)


def test_a_text_in_one_chunk_is_not_split() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=2) as scheduler:
        stream = ask(scheduler, TEXT, Pooling.MEAN, in_one_chunk=True)
        assert vector_of(stream) == pytest.approx(expected(TEXT, Pooling.MEAN), rel=1e-6)
        for stage in stages:
            assert {(0, len(TEXT))} in stage.passes
        nothing_left(stages)


def test_texts_share_passes_with_prompts() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=8) as scheduler:
        streams = [ask(scheduler, [*TEXT, number], pooling) for number in range(12) for pooling in Pooling]
        answer = submit(scheduler, TEXT, 3)
        assert len(tokens_of(answer)) == 3
        for index, stream in enumerate(streams):
            number, pooling = index // 2, list(Pooling)[index % 2]
            assert vector_of(stream) == pytest.approx(expected([*TEXT, number], pooling), rel=1e-6)
        nothing_left(stages)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("in_one_chunk", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("fault", [Fault.REPLY_LOST, Fault.REFUSED, Fault.KILLED_RESTARTED, Fault.TWICE])
def test_vectors_are_the_same_if_a_stage_breaks_meanwhile(
    fault: Fault, stage: int, in_one_chunk: bool, pooling: Pooling
) -> None:
    with counting_stages(3) as stages, scheduling(stages, chunk_tokens=3) as scheduler:
        stages[stage].inspect = on_forwards(fault, 1 if in_one_chunk else 3)
        stream = ask(scheduler, TEXT, pooling, in_one_chunk=in_one_chunk)
        assert vector_of(stream) == pytest.approx(expected(TEXT, pooling), rel=1e-6)
        nothing_left(stages)
