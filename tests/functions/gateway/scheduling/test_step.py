"""Rows of a step whose answers have a grammar: it is said in full once an event, until the last stage knows it."""

from array import array

import pytest

from eventing.wire.events import Grammar, Sampling, grammar_digest
from functions.gateway.scheduling import micro_batch
from functions.gateway.scheduling.progress import Chunk, Progress
from functions.gateway.scheduling.sequence import Prompt, Sequence
from functions.gateway.scheduling.token_stream import TokenStream


def sequence(number: int, source: str) -> Sequence:
    sampling = Sampling(grammar=Grammar(grammar_digest(source), (2,), source))
    return Sequence(f"s{number}", number, Prompt([1, 2, 3], 5, sampling=sampling), TokenStream(5), Progress(1))


def sources(*sequences: Sequence, length: int = 3) -> list[str | None]:
    """As an event with a row of each says them; None: nothing is drawn."""
    chunks = [(each, Chunk(0, length, 0)) for each in sequences]
    batch = micro_batch.first_batch(chunks, 1)
    assert batch.token_ids == array("i", [1, 2, 3][:length] * len(sequences))
    said = [row.sampling and row.sampling.grammar for row in batch.rows]
    whole = [each.prompt.sampling.grammar for each in sequences]
    assert all(one is None or (other and one.digest == other.digest) for one, other in zip(said, whole, strict=True))
    return [one and one.source for one in said]


def test_a_grammar_is_said_until_a_token_came_and_again_after_whatever_broke() -> None:
    one = sequence(1, "start: /x/")
    assert sources(one, length=2) == [None]
    assert sources(one) == sources(one) == ["start: /x/"]
    one.progress.grammar_known = True  # as `replies` does with the first token
    assert sources(one) == [""]
    one.progress.missed(0, 3)
    assert sources(one) == ["start: /x/"]
    one.progress.grammar_known = True
    one.progress.restart()
    assert sources(one) == ["start: /x/"]


def test_an_event_says_each_grammar_once_and_no_more_than_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["start: /x/", "start: /x/", "start: /y/", "start: /zzzz/"]
    assert sources(*[sequence(*each) for each in enumerate(texts)]) == ["start: /x/", "", "start: /y/", "start: /zzzz/"]
    monkeypatch.setattr(micro_batch, "_MAX_GRAMMAR_BYTES", 22)
    assert sources(*[sequence(*each) for each in enumerate(texts)]) == ["start: /x/", "", "start: /y/", ""]
