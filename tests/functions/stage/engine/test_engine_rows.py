"""The row contract: the answer to each row of an event. A row fails alone."""

import math
from array import array
from collections.abc import Iterator

import numpy as np
import pytest

from eventing.problems import EventTooLarge, MalformedEvent
from eventing.wire.batch_codec import decode_batch, encode_batch
from eventing.wire.control import ReleaseRow, ReserveRow
from eventing.wire.events import Batch, Row, Sampling, Status, Tensor, Want
from functions.stage.engine.engine import Engine
from functions.stage.engine.wire_tensors import hidden_array, wire_tensor
from functions.stage.models.floats import Array, Float32
from tests.support.functions.counting_group import HIDDEN, VOCAB, CountingGroup
from tests.support.functions.stage_pipeline import batch, drawn, engines, reserved

GATEWAY = "gateway"


class Stage:
    """One engine over a counting group that is the whole model."""

    def __init__(self, engine: Engine, group: CountingGroup) -> None:
        self.engine = engine
        self.group = group

    def step(self, id_: str, position: int, tokens: list[int], attempt: int = 0, reserve: int | None = None) -> Row:
        row = Row(id_, attempt, position, len(tokens), Want.TOKEN, reserve_tokens=reserve)
        (answer,) = self.engine.handle(batch([row], tokens), source=GATEWAY).rows
        return answer

    def begin(self, id_: str, tokens: list[int], attempt: int = 0, reserve: int = 20) -> int:
        return token_of(self.step(id_, 0, tokens, attempt, reserve))

    def spoil_logits(self, least: int, number: float) -> None:
        """Makes logits of sequences whose tokens add up to `least` or more contain `number`."""
        sound = self.group.logits

        def spoilt(hidden: Array) -> Float32:
            logits = sound(hidden)
            logits[hidden[:, 0] >= least, 9] = number
            return logits

        self.group.logits = spoilt  # type: ignore[method-assign]


def token_of(row: Row) -> int:
    (token,) = drawn(row)
    return token


@pytest.fixture
def stage() -> Iterator[Stage]:
    group = CountingGroup()
    with engines([group]) as (engine,):
        yield Stage(engine, group)


def test_a_sequence_goes_on_step_by_step(stage: Stage) -> None:
    assert stage.begin("a", [1, 2, 3]) == 6
    assert token_of(stage.step("a", 3, [6])) == 12
    assert token_of(stage.step("a", 4, [12])) == 24


def test_a_result_row_has_no_tokens_and_no_tensor(stage: Stage) -> None:
    row = Row("a", 0, 0, 3, Want.TOKEN, reserve_tokens=20)
    reply = stage.engine.handle(batch([row], [1, 2, 3]), source=GATEWAY)
    assert (len(reply.token_ids), reply.hidden) == (0, None)
    (answer,) = reply.rows
    assert (answer.length, answer.position, answer.reserve_tokens) == (0, 0, None)
    assert decode_batch(b"".join(encode_batch(reply))).rows == reply.rows


def test_a_row_that_wants_nothing_gets_nothing(stage: Stage) -> None:
    row = Row("a", 0, 0, 3, Want.NONE, reserve_tokens=20)
    (answer,) = stage.engine.handle(batch([row], [1, 2, 3]), source=GATEWAY).rows
    assert (answer.status, answer.result) == (Status.OK, None)


def test_a_duplicate_of_the_current_step_gives_the_same_answer(stage: Stage) -> None:
    stage.begin("a", [1, 2, 3])
    assert token_of(stage.step("a", 3, [6])) == 12
    assert token_of(stage.step("a", 3, [6])) == 12
    assert token_of(stage.step("a", 4, [12])) == 24


@pytest.mark.parametrize(("first", "second"), [(20, 20), (4, 40)], ids=["a duplicate", "a larger one"])
def test_a_first_row_that_comes_again_has_one_reservation(stage: Stage, first: int, second: int) -> None:
    stage.begin("a", [1, 2, 3], reserve=first)
    stage.begin("a", [1, 2, 3], reserve=second)
    assert stage.engine.cache.free_tokens == 100 - second


def test_a_rollback_drops_later_tokens(stage: Stage) -> None:
    stage.begin("a", [1, 2, 3])
    stage.step("a", 3, [50])
    assert token_of(stage.step("a", 1, [10])) == 11
    assert stage.step("a", 3, [1]).held == 2


def test_a_gap_is_a_miss_that_reports_held_tokens_and_changes_nothing(stage: Stage) -> None:
    stage.begin("a", [1, 2, 3])
    answer = stage.step("a", 5, [1])
    assert (answer.status, answer.held, answer.length) == (Status.MISS, 3, 0)
    assert token_of(stage.step("a", 3, [6])) == 12


@pytest.mark.parametrize(("position", "reserve"), [(0, None), (7, None), (7, 20)])
def test_an_unknown_sequence_is_a_miss(stage: Stage, position: int, reserve: int | None) -> None:
    answer = stage.step("unknown", position, [1], reserve=reserve)
    assert (answer.status, answer.held) == (Status.MISS, 0)
    assert stage.engine.cache.free_tokens == 100


def test_a_newer_attempt_begins_with_nothing_held(stage: Stage) -> None:
    stage.begin("a", [1, 2, 3])
    answer = stage.step("a", 3, [6], attempt=1)
    assert (answer.status, answer.held) == (Status.MISS, 0)
    assert stage.begin("a", [1, 2, 3], attempt=1) == 6
    assert stage.engine.cache.free_tokens == 80


def test_an_older_attempt_is_stale_and_touches_nothing(stage: Stage) -> None:
    stage.begin("a", [1, 2, 3], attempt=2)
    for late in (stage.step("a", 0, [9], attempt=1, reserve=20), stage.step("a", 3, [9], attempt=0)):
        assert (late.status, late.length, late.result) == (Status.STALE, 0, None)
    assert token_of(stage.step("a", 3, [6], attempt=2)) == 12


def test_a_sequence_that_does_not_fit_is_full(stage: Stage) -> None:
    stage.begin("a", [1], reserve=90)
    answer = stage.step("b", 0, [1], reserve=11)
    assert (answer.status, answer.held) == (Status.FULL, 0)
    assert stage.begin("c", [1], reserve=10) == 1
    assert stage.engine.cache.free_tokens == 0


def test_a_sequence_that_can_never_fit_is_invalid(stage: Stage) -> None:
    answer = stage.step("a", 0, [1], reserve=101)
    reason = "101 tokens to reserve will never fit: this stage's KV cache has 100"
    assert (answer.status, answer.reason) == (Status.INVALID, reason)
    assert reserved(stage.engine, [ReserveRow("a", 0, 101)], source=GATEWAY) == [Status.INVALID]


def test_a_row_beyond_its_reservation_is_invalid(stage: Stage) -> None:
    stage.begin("a", [1, 2, 3], reserve=4)
    assert token_of(stage.step("a", 3, [6])) == 12
    answer = stage.step("a", 4, [1])
    assert (answer.status, answer.reason) == (Status.INVALID, "the row ends at position 5, 4 tokens are reserved")


def test_reservations_are_idempotent_and_serve_first_rows(stage: Stage) -> None:
    wanted = [ReserveRow("a", 0, 30), ReserveRow("b", 0, 60), ReserveRow("c", 0, 20)]
    statuses = [Status.OK, Status.OK, Status.FULL]
    for _ in range(2):
        assert reserved(stage.engine, wanted, source=GATEWAY) == statuses
        assert stage.engine.cache.free_tokens == 10
    assert token_of(stage.step("a", 0, [4])) == 4
    assert token_of(stage.step("b", 0, [5], reserve=60)) == 5
    assert stage.engine.cache.free_tokens == 10
    assert reserved(stage.engine, [ReserveRow("a", 3, 30)], source=GATEWAY) == [Status.OK]
    assert reserved(stage.engine, [ReserveRow("a", 2, 30)], source=GATEWAY) == [Status.STALE]
    assert reserved(stage.engine, [ReserveRow("a", 4, 30)], source="another") == [Status.INVALID]


def test_a_release_frees_attempts_up_to_its_own(stage: Stage) -> None:
    stage.begin("a", [1], attempt=1)
    stage.begin("b", [1], attempt=1)
    releases = [ReleaseRow("a", 1), ReleaseRow("b", 0), ReleaseRow("unknown", 5)]
    assert stage.engine.release(releases, source="another") == 0
    assert stage.engine.release(releases, source=GATEWAY) == 1
    assert stage.engine.release(releases, source=GATEWAY) == 0
    assert (stage.engine.cache.free_tokens, len(stage.engine.sequences.by_id)) == (80, 1)
    assert stage.step("a", 1, [1], attempt=1).status is Status.MISS


def test_an_id_in_use_by_another_source_is_invalid(stage: Stage) -> None:
    stage.begin("a", [1, 2, 3])
    row = Row("a", 7, 0, 1, Want.TOKEN, reserve_tokens=20)
    (answer,) = stage.engine.handle(batch([row], [1]), source="another").rows
    assert (answer.status, answer.reason) == (Status.INVALID, "the id 'a' is in use by another source")
    assert token_of(stage.step("a", 3, [6])) == 12


def test_invalid_rows_leave_their_neighbours_unharmed(stage: Stage) -> None:
    rows = [
        Row("good", 0, 0, 2, Want.TOKEN, reserve_tokens=10),
        Row("vocabulary", 0, 0, 2, Want.TOKEN, reserve_tokens=10),
        Row("negative", 0, 0, 1, Want.TOKEN, reserve_tokens=10),
        Row("context", 0, 63, 2, Want.TOKEN, reserve_tokens=10),
        Row("empty", 0, 0, 0, Want.TOKEN, reserve_tokens=10),
        Row("before", 0, -1, 1, Want.TOKEN, reserve_tokens=10),
        Row("good", 0, 0, 1, Want.TOKEN, reserve_tokens=10),
        Row("passed on", 0, 0, 0, status=Status.FULL, held=0),
        Row("good too", 0, 0, 1, Want.TOKEN, reserve_tokens=10),
    ]
    reply = stage.engine.handle(batch(rows, [1, 2, 3, VOCAB, -1, 4, 5, 6, 7, 8]), source=GATEWAY)
    assert [row.id for row in reply.rows] == [row.id for row in rows]
    assert [row.reason for row in reply.rows] == [
        None,
        f"token id {VOCAB} is outside the vocabulary of {VOCAB}",
        f"token id -1 is outside the vocabulary of {VOCAB}",
        "the row ends at position 65, the model's context is 64 tokens",
        "the row has no tokens",
        "position -1 is negative",
        "the id 'good' is in the event twice",
        None,
        None,
    ]
    assert (token_of(reply.rows[0]), token_of(reply.rows[8])) == (3, 8)
    assert reply.rows[7] == rows[7]
    assert {row.status for row in reply.rows[1:7]} == {Status.INVALID}
    assert (stage.group.passes, stage.engine.cache.free_tokens) == ([[2, 1]], 80)


def test_a_sequence_whose_states_become_not_finite_fails_alone(stage: Stage) -> None:
    stage.group.not_a_number = 13
    rows = [Row(id_, 0, 0, 2, Want.TOKEN, reserve_tokens=10) for id_ in ("a", "b", "c")]
    reply = stage.engine.handle(batch(rows, [1, 2, 3, 13, 5, 6]), source=GATEWAY)
    assert reply.rows[1].status is Status.INVALID
    assert reply.rows[1].reason == "hidden states that came out of layer 1 are not finite"
    assert (token_of(reply.rows[0]), token_of(reply.rows[2])) == (3, 11)
    stage.group.not_a_number = None
    assert token_of(stage.step("b", 0, [3, 13])) == 16


def test_extreme_sampling_values_do_not_fail_a_pass(stage: Stage) -> None:
    extremes = (
        Sampling(temperature=1e-40, top_p=0.9),
        Sampling(temperature=1.0, top_p=1e-50),
        Sampling(temperature=1.0, repetition_penalty=1e-40),
    )
    rows = [Row(f"e{n}", 0, 0, 2, Want.TOKEN, each, reserve_tokens=10) for n, each in enumerate(extremes)]
    rows.append(Row("ordinary", 0, 0, 2, Want.TOKEN, reserve_tokens=10))
    reply = stage.engine.handle(batch(rows, [1, 2] * 4), source=GATEWAY)
    assert token_of(reply.rows[0]) == token_of(reply.rows[3]) == 3
    assert {row.status for row in reply.rows} == {Status.OK}
    assert stage.group.passes == [[2, 2, 2, 2]], "the pass was run again, row by row"


@pytest.mark.parametrize("want", [Want.TOKEN, Want.LOGPROBS])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_row_whose_logits_are_not_finite_fails_alone(stage: Stage, want: Want, wrong: float) -> None:
    sound = stage.group.logits
    stage.spoil_logits(15, wrong)
    rows = [Row(id_, 0, 0, 3, want, reserve_tokens=10) for id_ in "abc"]
    reply = stage.engine.handle(batch(rows, [1, 2, 3, 1, 14, 5, 5, 6, 1]), source=GATEWAY)
    assert [row.status for row in reply.rows] == [Status.OK, Status.INVALID, Status.OK]
    assert reply.rows[1].reason == "the logits of the row are not finite"
    stage.group.logits = sound  # type: ignore[method-assign]
    assert token_of(stage.step("b", 0, [3, 13])) == 16


def test_log_probabilities_are_of_each_token_but_the_first(stage: Stage) -> None:
    row = Row("a", 0, 0, 4, Want.LOGPROBS, reserve_tokens=10)
    (answer,) = stage.engine.handle(batch([row], [1, 1, 3, 5]), source=GATEWAY).rows
    assert answer.result is not None
    assert answer.result.tokens is None
    other = -math.log(VOCAB - 1 + math.e)
    hit = {0: other, 1: other + 1}
    # The group predicts 1 after 1, 2 after 1 1, and 5 after 1 1 3.
    assert answer.result.logprobs == pytest.approx([hit[1], hit[0], hit[1]])


@pytest.mark.parametrize(
    ("into", "problem", "message"),
    [
        (Batch((), memoryview(array("i"))), MalformedEvent, "has 0 rows"),
        (batch([Row(str(n), 0, 0, 1) for n in range(10_000)], [1] * 10_000), MalformedEvent, "has 10000 rows"),
        (batch([Row("a", 0, 0, 2)], [1, 2, 3]), MalformedEvent, "lengths add up to 2, there are 3 token ids"),
        (batch([Row("a", 0, 0, 4), Row("b", 0, 0, -1)], [1, 2, 3]), MalformedEvent, "there are 3 token ids"),
        (batch([Row("a", 0, 0, 70_000)], [1] * 70_000), EventTooLarge, "70000 tokens"),
        (
            Batch(
                (Row("a", 0, 0, 1),), memoryview(array("i", [1])), wire_tensor(np.zeros((1, HIDDEN), np.float32), "F32", "F32")
            ),
            MalformedEvent,
            "takes token ids alone",
        ),
    ],
)
def test_a_malformed_event_is_refused_as_a_whole(stage: Stage, into: Batch, problem: type[Exception], message: str) -> None:
    with pytest.raises(problem, match=message):
        stage.engine.handle(into, source=GATEWAY)
    assert stage.begin("a", [1]) == 1


def middle_batch(rows: list[Row], tokens: list[int], states: Array) -> Batch:
    return Batch(tuple(rows), memoryview(array("i", tokens)), wire_tensor(states, "F32", "F32"))


@pytest.fixture
def middle() -> Iterator[Stage]:
    group = CountingGroup(first_layer=2, last_layer=4, num_layers=6)
    with engines([group]) as (engine,):
        yield Stage(engine, group)


def test_rows_and_tokens_pass_through_unchanged_if_all_rows_are_ok(middle: Stage) -> None:
    rows = [Row("a", 0, 0, 2, Want.NONE, reserve_tokens=9), Row("b", 1, 0, 1, Want.TOKEN, reserve_tokens=9)]
    into = middle_batch(rows, [5, 6, 7], np.arange(12, dtype=np.float32).reshape(3, 4))
    reply = middle.engine.handle(into, source=GATEWAY)
    assert reply.rows is into.rows
    assert reply.token_ids is into.token_ids
    assert reply.hidden is not None
    assert hidden_array(reply.hidden, "F32")[:, 0].tolist() == [0.0, 4.0, 8.0]
    assert decode_batch(b"".join(encode_batch(reply))).rows == into.rows


def test_finite_states_pass_even_if_their_sum_is_not_finite(middle: Stage) -> None:
    rows = [Row(id_, 0, 0, 1, reserve_tokens=9) for id_ in "ab"]
    states = np.zeros((2, 4), np.float32)
    states[:, 0] = 3e38
    reply = middle.engine.handle(middle_batch(rows, [1, 2], states), source=GATEWAY)
    assert [row.status for row in reply.rows] == [Status.OK, Status.OK]


def test_failed_rows_are_removed_from_the_tensor(middle: Stage) -> None:
    rows = [Row(id_, 0, 0, 2, reserve_tokens=9) for id_ in "abc"] + [Row("d", 0, 5, 1)]
    states = np.arange(28, dtype=np.float32).reshape(7, 4)
    states[3, 2] = float("inf")
    reply = middle.engine.handle(middle_batch(rows, [1, 2, 3, 4, 5, 6, 7], states), source=GATEWAY)
    assert [row.status for row in reply.rows] == [Status.OK, Status.INVALID, Status.OK, Status.MISS]
    assert reply.rows[1].reason == "hidden states that came into layer 2 are not finite"
    assert [row.length for row in reply.rows] == [2, 0, 2, 0]
    assert reply.token_ids.tolist() == [1, 2, 5, 6]
    assert reply.hidden is not None
    assert hidden_array(reply.hidden, "F32")[:, 0].tolist() == [0.0, 4.0, 16.0, 20.0]
    assert decode_batch(b"".join(encode_batch(reply))).rows == reply.rows


def test_an_event_without_ok_rows_is_answered_with_statuses_only(middle: Stage) -> None:
    reply = middle.engine.handle(middle_batch([Row("a", 0, 3, 1)], [1], np.zeros((1, 4), np.float32)), source=GATEWAY)
    assert reply.rows[0].status is Status.MISS
    assert reply.hidden is None
    assert middle.engine.handle(reply, source=GATEWAY).rows == reply.rows


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, "no tensor, but layer 2 takes hidden states"),
        (wire_tensor(np.zeros((1, HIDDEN + 1), np.float32), "F32", "F32"), r"is F32 \[1, 5\], this stage takes F32 \[1, 4\]"),
        (wire_tensor(np.zeros((1, HIDDEN), np.uint16), "BF16", "BF16"), r"is BF16 \[1, 4\], this stage takes F32"),
        (wire_tensor(np.zeros((2, HIDDEN), np.float32), "F32", "F32"), r"is F32 \[2, 4\]"),
    ],
)
def test_another_models_tensor_is_refused(middle: Stage, tensor: Tensor | None, message: str) -> None:
    with pytest.raises(MalformedEvent, match=message):
        middle.engine.handle(Batch((Row("a", 0, 0, 1),), memoryview(array("i", [1])), tensor), source=GATEWAY)


# Draft tokens.


def drafted(stage: Stage, position: int, tokens: list[int], draft_tokens: int, want: Want = Want.TOKEN) -> Row:
    row = Row("a", 0, position, len(tokens), want, draft_tokens=draft_tokens)
    (answer,) = stage.engine.handle(batch([row], tokens), source=GATEWAY).rows
    return answer


def test_each_accepted_draft_token_gives_one_more_token(stage: Stage) -> None:
    assert stage.begin("a", [1, 2, 3]) == 6
    assert drawn(drafted(stage, 3, [6, 12, 24, 48], draft_tokens=3)) == (12, 24, 48, 96)
    assert token_of(stage.step("a", 7, [96])) == 96 * 2 % VOCAB


def test_nothing_counts_after_a_rejected_draft_token(stage: Stage) -> None:
    assert stage.begin("a", [1, 2, 3]) == 6
    assert drawn(drafted(stage, 3, [6, 12, 25, 48], draft_tokens=3)) == (12, 24)
    assert drawn(drafted(stage, 4, [12, 9], draft_tokens=1)) == (24,), (
        "the position takes back what was computed for draft tokens"
    )
    assert token_of(stage.step("a", 5, [24])) == 48


def test_a_draws_history_ends_before_the_draw(stage: Stage) -> None:
    """A repetition penalty does not count tokens among later draft tokens."""
    assert stage.begin("a", [1, 2, 3]) == 6
    row = Row("a", 0, 3, 3, Want.TOKEN, Sampling(repetition_penalty=1e9), draft_tokens=2)
    (answer,) = stage.engine.handle(batch([row], [6, 12, 24]), source=GATEWAY).rows
    assert drawn(answer) == (12, 24, 48)


def test_logits_that_are_not_finite_after_a_draft_token_keep_earlier_tokens(stage: Stage) -> None:
    assert stage.begin("a", [1, 2, 3]) == 6
    stage.spoil_logits(48, math.nan)
    assert drawn(drafted(stage, 3, [6, 12, 24, 48], draft_tokens=3)) == (12, 24)


def test_the_first_token_of_a_row_is_no_draft_token(stage: Stage) -> None:
    stage.begin("a", [1, 2, 3])
    refused = drafted(stage, 3, [6, 12], draft_tokens=2)
    assert refused.status is Status.INVALID
    assert refused.reason == "2 of the row's 2 tokens are draft tokens; the first must be known"


def test_draft_tokens_are_computed_even_if_the_row_wants_nothing(stage: Stage) -> None:
    """In an inner stage, or after a client has gone."""
    stage.begin("a", [1, 2, 3])
    answer = drafted(stage, 3, [6, 12], draft_tokens=1, want=Want.NONE)
    assert (answer.status, answer.result) == (Status.OK, None)
    assert token_of(stage.step("a", 4, [12])) == 24
