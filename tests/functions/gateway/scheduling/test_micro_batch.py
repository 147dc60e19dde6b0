"""Micro-batches exchange sequences; events carry chunks of several prompts, and each grammar once."""

from array import array

import pytest

from eventing.wire.events import Grammar, Sampling, grammar_digest
from functions.gateway.scheduling import micro_batch
from functions.gateway.scheduling.batching import SchedulerLimits
from functions.gateway.scheduling.decide import migrate
from functions.gateway.scheduling.micro_batch import MicroBatch, first_batch, level, prompt_chunks
from functions.gateway.scheduling.sequence import Chunk, Progress, Prompt, RetryBudget, Sequence
from functions.gateway.scheduling.state import SchedulerState
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.stages.routes import Endpoint, Instance, Placement, Route


def sequence(
    number: int, prompt_tokens: int = 10, *, decoding: bool = False, failures: int = 0, grammar: str = "", stages: int = 1
) -> Sequence:
    sampling = Sampling(grammar=Grammar(grammar_digest(grammar), (2,), grammar)) if grammar else Sampling()
    prompt = Prompt(list(range(1, 1 + prompt_tokens)), 5, sampling=sampling)
    made = Sequence(f"id-{number}", number, prompt, TokenStream(5), Progress(stages), RetryBudget(failures), reserved=True)
    if decoding:
        chunk = made.progress.next_chunk(prompt_tokens, prompt_tokens)
        made.progress.send(chunk)
        for stage in range(stages):
            made.progress.held[stage] = chunk.end
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


@pytest.mark.parametrize(
    ("sizes", "too_many", "after"),
    [
        ((5, 1, 1), False, (3, 2, 2)),
        ((3, 2, 2), False, (3, 2, 2)),
        ((1, 5, 5), False, (1, 5, 5)),
        pytest.param((2, 3, 4), True, (0, 5, 4), id="one too many"),
    ],
)
def test_a_micro_batch_gives_sequences_to_smaller_ones_on_its_route(
    sizes: tuple[int, ...], too_many: bool, after: tuple[int, ...]
) -> None:
    own, *others = batches(*sizes)
    level(own, [own, *others], too_many=too_many, max_sequences=8)
    assert (len(own.sequences), *(len(other.sequences) for other in others)) == after
    assert all(each.route is batch.route for batch in (own, *others) for each in batch.sequences)


def crowded(lost: tuple[int, ...] = ()) -> SchedulerState:
    """Four micro-batches that decode, on the only instance of each of two stages, and a second instance that has just come.

    lost: stages whose instance has restarted.
    """
    placement = Placement(["http://0", "http://1"], watched=True)
    for stage in range(2):
        placement.update(stage, [Endpoint("http://old")])
    state = SchedulerState(placement, SchedulerLimits())
    for number in range(4):
        route = placement.place(1)
        assert route is not None
        state.micro_batches.append(MicroBatch(route))
        state.micro_batches[-1].join(sequence(number, decoding=True, stages=2))
        for stage in lost:
            state.micro_batches[-1].sequences[0].progress.missed(stage, 0)
    for stage in range(2):
        placement.update(stage, [Endpoint("http://old"), Endpoint("http://new")])
    return state


def moved(state: SchedulerState) -> tuple[int, int]:
    """How many micro-batches are at the new instance of each stage after some decisions."""
    for _ in range(6):
        migrate(state, now=0.0)
    routes = [batch.route.instances for batch in state.micro_batches]
    first, second = (sum(route[stage].url == "http://new" for route in routes) for stage in range(2))
    return first, second


@pytest.mark.parametrize(("lost", "expected"), [((), (1, 0)), ((0,), (2, 0)), ((1,), (0, 2)), ((0, 1), (2, 2))])
def test_micro_batches_share_a_new_instance_at_once_if_the_old_one_lost_their_kv(
    lost: tuple[int, ...], expected: tuple[int, int]
) -> None:
    """Two of four belong at each new instance. With KV the second waits until the first has been computed again."""
    state = crowded(lost)
    assert moved(state) == expected
    assert state.stats.migrations == {"balance": sum(expected)}


@pytest.mark.parametrize("waits", ["on its way", "without memory", "restored", "handed over", "follows"])
def test_a_micro_batch_whose_kv_is_on_its_way_to_a_crowded_instance_stays(waits: str) -> None:
    state = crowded(lost=(1,))
    for batch in state.micro_batches:
        each = batch.sequences[0]
        if waits == "on its way":
            chunk = each.progress.next_chunk(len(each.tokens), 4)
            assert chunk is not None
            each.progress.send(chunk)
        each.reserved = waits != "without memory"
        each.restoring = waits == "restored"
        each.handing_over = Instance(1, "http://left") if waits == "handed over" else None
        each.leader = sequence(9) if waits == "follows" else None
    assert moved(state) == (0, 0)


def test_sequences_do_not_change_to_another_route() -> None:
    own, other = batches(5, 1)
    other.route = Route([Instance(0, "http://b")])
    level(own, [own, other], too_many=True, max_sequences=8)
    assert (len(own.sequences), len(other.sequences)) == (5, 1)


def test_an_event_is_filled_with_chunks_of_several_prompts() -> None:
    sequences = [sequence(0, 10), sequence(1, 100), sequence(2, 100)]
    assert [(each.number, chunk.length) for each, chunk in prompt_chunks(sequences, 64)] == [(0, 10), (1, 54)]


def test_a_suspect_travels_alone() -> None:
    assert [each.number for each, _ in prompt_chunks([sequence(0), sequence(1, failures=1), sequence(2)], 64)] == [0, 2]
    assert [each.number for each, _ in prompt_chunks([sequence(1, failures=1), sequence(2)], 64)] == [1]


def sources(*sequences: Sequence, length: int = 3) -> list[str | None]:
    """Grammar sources of an event with a row of each sequence; None: the row draws nothing."""
    batch = first_batch([(each, Chunk(0, length, 0)) for each in sequences], 1)
    assert batch.token_ids == array("i", [1, 2, 3][:length] * len(sequences))
    sent = [row.sampling and row.sampling.grammar for row in batch.rows]
    full = [each.prompt.sampling.grammar for each in sequences]
    assert all(one is None or (other and one.digest == other.digest) for one, other in zip(sent, full, strict=True))
    return [one and one.source for one in sent]


def test_a_grammar_is_sent_until_a_token_is_drawn_and_again_after_a_failure() -> None:
    one = sequence(1, 3, grammar="start: /x/")
    assert sources(one, length=2) == [None]
    assert sources(one) == sources(one) == ["start: /x/"]
    one.progress.grammar_known = True  # as the first drawn token sets it
    assert sources(one) == [""]
    one.progress.missed(0, 3)
    assert sources(one) == ["start: /x/"]
    one.progress.grammar_known = True
    one.progress.restart()
    assert sources(one) == ["start: /x/"]


def test_an_event_carries_each_grammar_once_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["start: /x/", "start: /x/", "start: /y/", "start: /zzzz/"]
    sequences = [sequence(number, 3, grammar=text) for number, text in enumerate(texts)]
    assert sources(*sequences) == ["start: /x/", "", "start: /y/", "start: /zzzz/"]
    monkeypatch.setattr(micro_batch, "_MAX_GRAMMAR_BYTES", 22)
    assert sources(*sequences) == ["start: /x/", "", "start: /y/", ""]
