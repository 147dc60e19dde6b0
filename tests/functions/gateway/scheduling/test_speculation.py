"""Speculation: drafts, the number of draft tokens in a step, and answers that are equal and take fewer rounds."""

import random
from collections.abc import Callable

import pytest

from eventing.wire.events import Row, Status
from functions.gateway.scheduling.speculation import (
    MATCH_TOKENS,
    MAX_LOOKED_UP_TOKENS,
    Drafter,
    PromptLookup,
    Rates,
    draft_lengths,
    shared_rates,
    step_seconds,
)
from functions.gateway.scheduling.stats import RowCosts, seconds_on
from tests.support.functions.gateway import counted, nothing_left, scheduling, submit, tokens_of
from tests.support.functions.stage_server import StageServer, counting_stages


def decodes(stage: StageServer) -> list[Row]:
    return [row for seen in stage.forwards for row in seen.rows if row.position >= 2]


@pytest.fixture
def even_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are measured as equally long: real ones last microseconds here, and a busy machine would decide."""
    measured = RowCosts.step
    monkeypatch.setattr(RowCosts, "step", lambda costs, tokens, _seconds: measured(costs, tokens, 0.01))


@pytest.mark.usefixtures("even_steps")
def test_a_right_prediction_makes_an_answer_of_few_rounds() -> None:
    wanted = counted([3, 4], 60)
    with counting_stages() as stages, scheduling(stages, draft_tokens=8) as scheduler:
        stream = submit(scheduler, [3, 4], 60, predicted_ids=wanted)
        assert tokens_of(stream) == wanted
        nothing_left(stages)
    for stage in stages:
        assert len(decodes(stage)) <= 15, "60 tokens, most of them nine a round"
    assert stream.draft_tokens_accepted >= 45
    assert stream.draft_tokens_rejected == 0
    assert all(row.position + row.length <= 62 for row in decodes(stages[0])), "never more than is reserved"


@pytest.mark.usefixtures("even_steps")
@pytest.mark.parametrize("wrong_at", [0, 1, 5, 20])
def test_a_prediction_that_is_wrong_somewhere_costs_only_its_rows(wrong_at: int) -> None:
    wanted = counted([3, 4], 40)
    predicted = [*wanted[:wrong_at], 96, 96, *wanted[wrong_at + 1 :]]
    with counting_stages() as stages, scheduling(stages, draft_tokens=8) as scheduler:
        stream = submit(scheduler, [3, 4], 40, predicted_ids=predicted)
        assert tokens_of(stream) == wanted
        assert stream.draft_tokens_accepted >= 8, "it returns to the prediction"
        nothing_left(stages)


@pytest.mark.usefixtures("even_steps")
def test_an_end_of_text_among_draft_tokens_ends_the_answer() -> None:
    wanted = counted([3, 4], 60)
    end = wanted[20]
    until = wanted[: wanted.index(end)]
    with counting_stages() as stages, scheduling(stages, draft_tokens=8) as scheduler:
        stream = submit(scheduler, [3, 4], 60, predicted_ids=wanted, eos_ids=frozenset([end]))
        assert tokens_of(stream) == until
        assert stream.finish_reason == "stop"
        assert stream.completion_tokens == len(until) + 1
        nothing_left(stages)


@pytest.mark.usefixtures("even_steps")
def test_a_row_that_is_refused_for_its_draft_tokens_is_sent_without() -> None:
    """The hidden states of a draft token may not be finite, which is not the client's fault."""
    wanted = counted([3, 4], 30)
    poison = next(token for token in range(97) if token not in wanted)
    with counting_stages() as stages, scheduling(stages, draft_tokens=8) as scheduler:
        stages[0].group.not_a_number = poison
        stream = submit(scheduler, [3, 4], 30, predicted_ids=[*wanted[:9], poison, *wanted[9:]])
        assert tokens_of(stream) == wanted
        assert stream.finish_reason == "length"
        nothing_left(stages)
    refused = [row for seen in stages[0].forwards for row in seen.rows if row.draft_tokens and row.status is not Status.OK]
    assert not refused
    assert [row.draft_tokens for row in decodes(stages[0])][-5:] == [0] * 5


def test_nothing_is_drafted_if_speculation_is_off() -> None:
    wanted = counted([3, 4], 20)
    with counting_stages(1) as (stage,), scheduling([stage], draft_tokens=0) as scheduler:
        assert tokens_of(submit(scheduler, [3, 4], 20, predicted_ids=wanted)) == wanted
    assert {row.draft_tokens for row in decodes(stage)} == {0}


# How many draft tokens are sent.


def test_all_are_sent_if_rows_are_free_and_none_if_they_are_dear() -> None:
    assert draft_lengths([(8, 0.5), (3, 0.9), (0, 0.0)], lambda tokens: 1.0) == [8, 3, 0]
    assert draft_lengths([(8, 0.9), (3, 0.9)], float) == [0, 0]
    assert draft_lengths([(8, 0.9)], lambda tokens: None) == [0], "not before anything was measured"


def test_likely_draft_tokens_are_sent_first_as_far_as_they_pay() -> None:
    likely, unlikely = draft_lengths([(16, 0.95), (16, 0.2)], lambda tokens: 1 + 0.1 * tokens)
    assert likely > 4
    assert unlikely <= 1


@pytest.mark.parametrize(
    ("drafts", "seconds", "lengths"),
    [
        pytest.param([(12, 0.9)], lambda tokens: 1.0 if tokens <= 1 else 1.15, [12], id="the second row costs what 16 cost"),
        pytest.param([(1, 0.9)] * 10, lambda tokens: 1 + 0.08 * (tokens - 10), [0] * 10, id="0.9 tokens for 8 % more time"),
        pytest.param([(1, 0.9)] * 10, lambda tokens: 1 + 0.06 * (tokens - 10), [1] * 10, id="0.9 tokens for 6 % more time"),
    ],
)
def test_a_draft_token_must_be_worth_more_than_it_costs(
    drafts: list[tuple[int, float]], seconds: Callable[[int], float], lengths: list[int]
) -> None:
    assert draft_lengths(drafts, seconds) == lengths


def test_a_small_step_that_waited_does_not_make_further_tokens_free() -> None:
    """Seen with sixteen rows: after one slow step of one row, 17 to 32 rows were taken to cost what 16 cost."""
    costs = RowCosts()
    for tokens, measured in ((1, 0.020), (4, 0.010), (16, 0.016), (24, 0.026)):
        costs.step(tokens, measured)

    def seconds(tokens: int) -> float | None:
        return seconds_on(costs.points(), tokens)

    assert seconds(1) == seconds(4) == 0.010
    assert seconds(16) == 0.016
    assert draft_lengths([(1, 0.5)] * 16, seconds) == [0] * 16


def test_one_micro_batch_pays_for_the_round_and_many_for_the_narrowest_stage() -> None:
    costs = [RowCosts(), RowCosts(), RowCosts()]
    for cost, seconds in zip(costs, [0.01, 0.03, 0.02], strict=True):
        cost.step(1, seconds)
    assert step_seconds(costs, 1, 0.0)(1) == pytest.approx(0.06)
    assert step_seconds(costs, 2, 0.0)(1) == pytest.approx(0.03)
    assert step_seconds(costs, 8, 0.0)(1) == pytest.approx(0.03)
    assert step_seconds(costs, 1, 0.03)(1) == pytest.approx(0.09), "each round pays for the network"
    assert step_seconds([*costs, RowCosts()], 1, 0.0)(1) is None


# Chances of acceptance.


def drafter_of(tokens: list[int], shared: Rates | None = None) -> Drafter:
    return Drafter(PromptLookup(tokens), shared or shared_rates())


def test_the_chance_follows_what_was_accepted() -> None:
    repeats = drafter_of([1, 2, 3, 4] * 3)
    for _ in range(8):
        draft = repeats.draft(3)
        repeats.drawn([*draft, repeats.draft(4)[-1]])
    repeats.draft(1)
    assert repeats.chance > 0.9
    for number in range(30):
        repeats.draft(3)
        repeats.drawn([100 + number, 1, 2, 3, 4])
    repeats.draft(1)
    assert repeats.chance < 0.2


def test_the_chance_follows_drafts_that_were_not_sent() -> None:
    """If rows are dear, a draft token is sent only once it is likely, so its chance must be learnt without sending it."""
    right, wrong = drafter_of([5, 6, 7, 8, 9] * 4), drafter_of([5, 6, 7, 8, 9] * 4)
    for token in (5, 6, 7, 8, 9, 5):
        assert right.draft(1) == (token,)
        right.drawn([token])
    assert right.draft(1)
    assert right.chance > 0.75
    wrong.draft(1)
    assert wrong.chance == 0.5
    for token in (50, 5, 6):
        wrong.drawn([token])
    assert wrong.draft(1), "5 and 6 stood there before"
    assert wrong.shared[True].rejected == 1.0


def test_a_new_sequence_starts_with_the_rates_of_all_others() -> None:
    shared = shared_rates()
    for _ in range(40):
        other = drafter_of([1, 2, 3, 1, 2], shared)
        assert other.draft(4)
        other.drawn([70])
    new = drafter_of([4, 5, 6, 4, 5], shared)
    assert new.draft(1) == (6,)
    assert new.chance < 0.1, "short matches were rejected"
    quoting = drafter_of([4, 5, 6, 7, 8, 4, 5, 6, 7], shared)
    assert quoting.draft(1) == (8,)
    assert quoting.chance == 0.5, "nothing is known of long matches"


# Prompt lookup.


def naive_draft(tokens: list[int], max_tokens: int) -> tuple[tuple[int, ...], int]:
    """Tries every place: the longest of the lengths that are looked up, at its latest place."""
    for match in sorted(MATCH_TOKENS, reverse=True):
        for end in range(len(tokens) - 1, match - 1, -1):
            if tokens[end - match : end] == tokens[-match:] and match < len(tokens):
                return tuple((tokens[end:] * max_tokens)[:max_tokens]), match
    return (), 0


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_suffix_is_found_at_its_latest_place(seed: int) -> None:
    dice = random.Random(seed)
    # 1 and 2**24 have the same bytes in other places: a match must begin at a token.
    tokens = [dice.choice([0, 1, 256, 2**16, 2**24]) for _ in range(60)]
    lookup = PromptLookup(tokens[:20])
    for drawn in range(20, 60):
        assert lookup.draft(5) == naive_draft(tokens[:drawn], 5)
        lookup.add(tokens[drawn])


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3], [5, 1, 2, 5]], ids=["too short", "new", "one token matches"])
def test_nothing_is_drafted_without_a_match(tokens: list[int]) -> None:
    assert PromptLookup(tokens).draft(4) == ((), 0)


def test_a_repetition_is_drafted_to_go_on() -> None:
    assert PromptLookup([9, 1, 2, 3, 1, 2, 3]).draft(7)[0] == (1, 2, 3, 1, 2, 3, 1)


def test_an_answer_begins_with_its_prediction_and_may_come_back_to_it() -> None:
    lookup = PromptLookup([1, 2, 3], predicted=[10, 11, 12, 13, 14, 15])
    assert lookup.draft(3)[0] == (10, 11, 12)
    lookup.add(10)
    assert lookup.draft(3)[0] == (11, 12, 13)
    lookup.add(99)
    assert lookup.draft(3) == ((), 0)
    lookup.add(12)
    lookup.add(13)
    assert lookup.draft(2)[0] == (14, 15)


def test_only_the_latest_tokens_are_looked_up() -> None:
    far = PromptLookup([7, 8, 9, *range(100, 100 + MAX_LOOKED_UP_TOKENS), 7, 8])
    assert far.draft(1) == ((), 0)
