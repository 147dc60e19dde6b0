"""Micro-batches exchange sequences, and what one event carries of prompts."""

import pytest

from functions.gateway.scheduling.micro_batch import MicroBatch, level, prompt_chunks
from functions.gateway.scheduling.progress import Progress
from functions.gateway.scheduling.sequence import Prompt, RetryBudget, Sequence
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.stages.instances import Instance
from functions.gateway.stages.routes import Route


def sequence(number: int, prompt_tokens: int = 10, *, decoding: bool = False, strikes: int = 0) -> Sequence:
    prompt = Prompt([1] * prompt_tokens, 5)
    made = Sequence(f"id-{number}", number, prompt, TokenStream(5), Progress(1), RetryBudget(strikes), reserved=True)
    if decoding:
        chunk = made.progress.next_chunk(prompt_tokens, prompt_tokens)
        assert chunk is not None
        made.progress.send(chunk)
        made.progress.computed(0, chunk)
        made.progress.returned()
        made.tokens.append(1)
    return made


def batches(*sizes: int) -> list[MicroBatch]:
    route = Route([Instance(0, "http://a")])
    made = []
    for size in sizes:
        made.append(MicroBatch(Route(route.instances)))
        for number in range(size):
            made[-1].join(sequence(number, decoding=True))
    return made


@pytest.mark.parametrize(("sizes", "after"), [((5, 1, 1), (3, 2, 2)), ((3, 2, 2), (3, 2, 2)), ((1, 5, 5), (1, 5, 5))])
def test_a_micro_batch_gives_sequences_to_smaller_ones_on_its_route(sizes: tuple[int, ...], after: tuple[int, ...]) -> None:
    own, *others = batches(*sizes)
    level(own, [own, *others], too_many=False, max_sequences=8)
    assert (len(own.sequences), *(len(other.sequences) for other in others)) == after
    assert all(each.route is batch.route for batch in (own, *others) for each in batch.sequences)


def test_a_micro_batch_too_many_dissolves() -> None:
    own, *others = batches(2, 3, 4)
    level(own, [own, *others], too_many=True, max_sequences=8)
    assert [len(batch.sequences) for batch in (own, *others)] == [0, 5, 4]


def test_sequences_do_not_change_routes() -> None:
    own, other = batches(5, 1)
    other.route = Route([Instance(0, "http://b")])
    level(own, [own, other], too_many=True, max_sequences=8)
    assert (len(own.sequences), len(other.sequences)) == (5, 1)


def test_an_event_is_filled_with_chunks_of_several_prompts() -> None:
    sequences = [sequence(0, 10), sequence(1, 100), sequence(2, 100)]
    assert [(one.number, chunk.length) for one, chunk in prompt_chunks(sequences, 64)] == [(0, 10), (1, 54)]


def test_a_suspect_travels_alone() -> None:
    assert [one.number for one, _ in prompt_chunks([sequence(0), sequence(1, strikes=1), sequence(2)], 64)] == [0, 2]
    assert [one.number for one, _ in prompt_chunks([sequence(1, strikes=1), sequence(2)], 64)] == [1]
