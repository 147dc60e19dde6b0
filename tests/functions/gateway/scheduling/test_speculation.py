"""How many tokens are drafted, and what becomes of answers: nothing but that they come in fewer rounds."""

from functools import partial

import pytest

from eventing.wire.events import Row, Status
from functions.gateway.scheduling.batching import RowCosts, seconds_on
from functions.gateway.scheduling.speculation import Drafter, PromptLookup, SharedRates, draft_lengths, step_seconds
from tests.support.functions.gateway import counted, nothing_left, scheduling, submit, tokens_of
from tests.support.functions.stage_server import StageServer, counting_stages


def decodes(stage: StageServer) -> list[Row]:
    return [row for seen in stage.forwards for row in seen.rows if row.position >= 2]


@pytest.fixture
def even_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are taken to last the same whatever they carry: they last microseconds here, and a busy machine would decide."""
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
def test_a_prediction_that_goes_wrong_costs_only_its_rows(wrong_at: int) -> None:
    wanted = counted([3, 4], 40)
    expected = [*wanted[:wrong_at], 96, 96, *wanted[wrong_at + 1 :]]
    with counting_stages() as stages, scheduling(stages, draft_tokens=8) as scheduler:
        stream = submit(scheduler, [3, 4], 40, predicted_ids=expected)
        assert tokens_of(stream) == wanted
        assert stream.draft_tokens_accepted >= 8, "it comes back to what was expected"
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
def test_who_is_refused_for_what_was_drafted_goes_on_without() -> None:
    """Of a draft token's hidden states none may be finite; that is not the client's fault."""
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


def test_nothing_is_drafted_where_it_is_off() -> None:
    wanted = counted([3, 4], 20)
    with counting_stages(1) as (stage,), scheduling([stage], draft_tokens=0) as scheduler:
        assert tokens_of(submit(scheduler, [3, 4], 20, predicted_ids=wanted)) == wanted
    assert {row.draft_tokens for row in decodes(stage)} == {0}


# How many.


def dear(tokens: int) -> float:
    return float(tokens)


def free(tokens: int) -> float:
    return 1.0


def test_where_rows_are_free_all_is_sent_and_where_they_are_dear_nothing() -> None:
    assert draft_lengths([(8, 0.5), (3, 0.9), (0, 0.0)], free) == [8, 3, 0]
    assert draft_lengths([(8, 0.9), (3, 0.9)], dear) == [0, 0]
    assert draft_lengths([(8, 0.9)], lambda tokens: None) == [0], "not before anything was measured"


def test_the_likely_go_first_and_as_far_as_they_pay() -> None:
    def seconds(tokens: int) -> float:
        return 1 + 0.1 * tokens

    likely, unlikely = draft_lengths([(16, 0.95), (16, 0.2)], seconds)
    assert likely > 4
    assert unlikely <= 1


def test_steps_that_jump_do_not_hide_what_lies_behind() -> None:
    def seconds(tokens: int) -> float:
        return 1.0 if tokens <= 1 else 1.15  # the second row costs what sixteen cost

    assert draft_lengths([(12, 0.9)], seconds) == [12]


def drafter_of(tokens: list[int], shared: SharedRates | None = None) -> Drafter:
    return Drafter(PromptLookup(tokens), shared or SharedRates())


def test_chances_follow_what_accepted() -> None:
    repeats = drafter_of([1, 2, 3, 4] * 3)
    for _ in range(8):
        draft_tokens = repeats.draft(3)
        repeats.drawn([*draft_tokens, repeats.draft(4)[-1]])
    repeats.draft(1)
    assert repeats.chance > 0.9
    for number in range(30):
        repeats.draft(3)
        repeats.drawn([100 + number, 1, 2, 3, 4])
    repeats.draft(1)
    assert repeats.chance < 0.2


def test_draft_tokens_that_were_not_sent_are_learnt_from() -> None:
    """Where rows are dear none is sent before it is known that it comes true, so it is not to be sent to be known."""
    right, wrong = drafter_of([5, 6, 7, 8, 9] * 4), drafter_of([5, 6, 7, 8, 9] * 4)
    for step in range(6):
        assert right.draft(1) == ([5, 6, 7, 8, 9][step % 5],)
        right.drawn([5, 6, 7, 8, 9][step % 5 : step % 5 + 1])
    assert right.draft(1)
    assert right.chance > 0.75
    wrong.draft(1)
    before = wrong.chance
    wrong.drawn([50])
    wrong.drawn([5])
    wrong.drawn([6])
    assert wrong.draft(1), "5 and 6 stood there before"
    assert before == 0.5
    assert wrong.shared.long.rejected == 1.0


def test_a_new_sequence_begins_with_what_others_found() -> None:
    shared = SharedRates()
    for _ in range(40):
        other = drafter_of([1, 2, 3, 1, 2], shared)
        assert other.draft(4)
        other.drawn([70])
    new = drafter_of([4, 5, 6, 4, 5], shared)
    assert new.draft(1) == (6,)
    assert new.chance < 0.1, "short matches came to nothing"
    quoting = drafter_of([4, 5, 6, 7, 8, 4, 5, 6, 7], shared)
    assert quoting.draft(1) == (8,)
    assert quoting.chance == 0.5, "of long ones nothing is known yet"


# What rows cost.


def cost_of(costs: RowCosts, tokens: int) -> float | None:
    return seconds_on(costs.points(), tokens)


def test_costs_are_those_of_quick_steps_and_lines_between() -> None:
    costs = RowCosts()
    assert cost_of(costs, 1) is None
    for waited in [0.03, 0.0, 0.05, 0.0, 0.0, 0.0]:
        costs.step(1, 0.010 + waited)
        costs.step(16, 0.040 + waited)
    for _ in range(20):
        costs.step(1, 0.010)
        costs.step(16, 0.040)
    assert cost_of(costs, 1) == pytest.approx(0.010, rel=0.1)
    assert cost_of(costs, 16) == pytest.approx(0.040, rel=0.1)
    assert cost_of(costs, 8) == pytest.approx(0.024, rel=0.1)


def test_what_was_not_measured_is_tried_and_what_was_long_ago_again() -> None:
    costs = RowCosts()
    costs.step(1, 0.010)
    assert cost_of(costs, 9) == pytest.approx(0.010 * 1.16)
    costs.step(9, 0.100)
    assert cost_of(costs, 9) == pytest.approx(0.100)
    for _ in range(3000):
        costs.step(1, 0.010)
    assert cost_of(costs, 9) == pytest.approx(0.010 * 1.16)


def test_a_small_step_that_waited_does_not_make_further_tokens_free() -> None:
    """Seen with sixteen at once: one slow step of one row, and 17 to 32 rows were taken to cost what 16 cost."""
    costs = RowCosts()
    costs.step(1, 0.020)  # It waited.
    for tokens, seconds in ((4, 0.010), (16, 0.016), (24, 0.026)):
        costs.step(tokens, seconds)
    assert cost_of(costs, 1) == cost_of(costs, 4) == 0.010
    assert cost_of(costs, 16) == 0.016
    assert draft_lengths([(1, 0.5)] * 16, partial(cost_of, costs)) == [0] * 16


def test_a_draft_token_has_to_be_worth_more_than_it_costs() -> None:
    """Of ten rows, a draft token that makes 0.9 tokens for 9 % more time, as measured, would gain nothing on the whole."""
    assert draft_lengths([(1, 0.9)] * 10, lambda tokens: 1 + 0.08 * (tokens - 10)) == [0] * 10
    assert draft_lengths([(1, 0.9)] * 10, lambda tokens: 1 + 0.06 * (tokens - 10)) == [1] * 10


def test_one_micro_batch_pays_for_the_round_and_many_for_the_narrowest_stage() -> None:
    costs = [RowCosts(), RowCosts(), RowCosts()]
    for cost, seconds in zip(costs, [0.01, 0.03, 0.02], strict=True):
        cost.step(1, seconds)
    assert step_seconds(costs, 1, 0.0)(1) == pytest.approx(0.06)
    assert step_seconds(costs, 2, 0.0)(1) == pytest.approx(0.03)
    assert step_seconds(costs, 8, 0.0)(1) == pytest.approx(0.03)
    assert step_seconds(costs, 1, 0.03)(1) == pytest.approx(0.09), "the way is paid for with each round"
    assert step_seconds([*costs, RowCosts()], 1, 0.0)(1) is None
