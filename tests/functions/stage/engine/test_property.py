"""Whatever happens to its events on the way, a sequence gets the tokens of the whole model in transformers.

Hypothesis draws cut, prompts, chunks, sampling and disturbances: duplicated, lost and late events, restarted stages, new
attempts. Micro-batches go through the same engines at the same time, each driven by a small gateway of its own.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eventing.wire.batch_codec import decode_batch, encode_batch, select_rows
from eventing.wire.events import Batch, Row, Sampling, Status, Want
from functions.stage.engine import forward_pass
from functions.stage.engine.engine import Engine
from functions.stage.models.build import Kind
from tests.support.functions.sampling import sample
from tests.support.functions.stage_pipeline import batch, build_groups, engines, through, whole_model
from tests.support.storage import tiny_models

NEW_TOKENS = 6
Event = Literal["none", "duplicate", "lost", "late", "attempt"]


@dataclass(slots=True)
class Conversation:
    id: str
    prompt: list[int]
    sampling: Sampling
    chunk: int
    token_ids: list[int] = field(init=False)
    attempt: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt)

    @property
    def is_done(self) -> bool:
        return len(self.token_ids) == len(self.prompt) + NEW_TOKENS

    def row(self) -> tuple[Row, list[int]]:
        new = self.token_ids[self.position : self.position + self.chunk]
        is_end = self.position + len(new) == len(self.token_ids)
        reserve = len(self.prompt) + NEW_TOKENS if self.position == 0 else None
        want = Want.TOKEN if is_end else Want.NONE
        return Row(self.id, self.attempt, self.position, len(new), want, self.sampling, reserve), new

    def heard(self, row: Row, sent: Row) -> None:
        if row.status is Status.MISS:
            assert row.held is not None
            assert row.held < self.position
            self.position = row.held
            return
        assert row.status is Status.OK, row
        self.position += sent.length
        if row.result is not None and row.result.tokens is not None:
            self.token_ids.extend(row.result.tokens)


@dataclass(slots=True)
class MicroBatch:
    """Drives its conversations to their end; disturbances happen one a round, while there are some."""

    conversations: list[Conversation]
    disturbances: list[tuple[Event, int]]
    past: list[tuple[int, Batch]] = field(default_factory=list)

    def drive(self, stages: Sequence[Engine]) -> list[list[int]]:
        rounds = 0
        while not all(conversation.is_done for conversation in self.conversations):
            rounds += 1
            assert rounds < 200, "the conversations do not come to their end"
            event, number = self.disturbances.pop() if self.disturbances else ("none", 0)
            self.round(stages, event, number)
        return [conversation.token_ids[len(conversation.prompt) :] for conversation in self.conversations]

    def round(self, stages: Sequence[Engine], event: Event, number: int) -> None:
        disturbed = number % len(stages)
        if event == "late" and self.past:
            stage, old = self.past[number % len(self.past)]
            stages[stage].handle(old, source="gateway")
        active = [conversation for conversation in self.conversations if not conversation.is_done]
        if event == "attempt":
            active[number % len(active)].attempt += 1
            active[number % len(active)].position = 0
        rows, tokens = zip(*(conversation.row() for conversation in active), strict=True)
        by_id = {row.id: (conversation, row) for conversation, row in zip(active, rows, strict=True)}
        into = batch(rows, [token for new in tokens for token in new])
        for index, engine in enumerate(stages):
            self.past.append((index, into))
            reply = over_the_wire(engine.handle(into, source="gateway"))
            if event == "duplicate" and index == disturbed:
                again = over_the_wire(engine.handle(into, source="gateway"))
                assert (again.rows, again.token_ids.tolist()) == (reply.rows, reply.token_ids.tolist())
            if event == "lost" and index == disturbed:
                return
            for row in reply.rows:
                if row.status is not Status.OK:
                    by_id[row.id][0].heard(row, by_id[row.id][1])
            good = [number for number, row in enumerate(reply.rows) if row.status is Status.OK]
            if not good:
                return
            into = select_rows(reply, good)
        for row in into.rows:
            by_id[row.id][0].heard(row, by_id[row.id][1])


def over_the_wire(reply: Batch) -> Batch:
    return decode_batch(b"".join(encode_batch(reply)))


tokens = st.integers(3, tiny_models.VOCAB_SIZE - 1)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**63 - 1),
)
conversations = st.builds(
    Conversation,
    id=st.uuids().map(str),
    prompt=st.lists(tokens, min_size=1, max_size=30),
    sampling=samplings,
    chunk=st.sampled_from([1, 3, 8, 64]),
)
disturbances = st.tuples(st.sampled_from(["none", "duplicate", "lost", "late", "attempt"]), st.integers(0, 1000))
micro_batches = st.builds(
    MicroBatch, conversations=st.lists(conversations, min_size=1, max_size=3), disturbances=st.lists(disturbances, max_size=8)
)
cuts = st.sets(st.integers(1, tiny_models.NUM_LAYERS - 1), max_size=3).map(
    lambda inner: tuple(zip([0, *sorted(inner)], [*sorted(inner), tiny_models.NUM_LAYERS], strict=True))
)


def expected(name: str, conversation: Conversation) -> list[int]:
    """By the whole model without any cache, one full pass for each token."""
    token_ids = list(conversation.prompt)
    for _ in range(NEW_TOKENS):
        logits = tiny_models.all_logits(whole_model(name), token_ids)[-1:]
        token = sample(logits.numpy()[0], conversation.sampling, len(token_ids), token_ids)
        assert token is not None
        token_ids.append(token)
    return token_ids[len(conversation.prompt) :]


@pytest.mark.parametrize(("name", "kind"), [("llama", "transformers"), ("mistral_sliding", "transformers"), ("llama", "llama")])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    cut=cuts,
    groups_of=st.lists(micro_batches, min_size=1, max_size=3),
    num_stages=st.sampled_from([1, 3]),
    max_merge=st.sampled_from([1, 2, 8]),
)
def test_tokens_are_the_whole_models_whatever_happens_on_the_way(
    name: str, kind: Kind, cut: tuple[tuple[int, int], ...], groups_of: list[MicroBatch], num_stages: int, max_merge: int
) -> None:
    groups = build_groups(name, cut, kind)
    with engines(groups, num_stages=num_stages, max_merge=max_merge) as stages, ThreadPoolExecutor(max_workers=3) as pool:
        answers = list(pool.map(lambda micro_batch: micro_batch.drive(stages), groups_of))
    for micro_batch, found in zip(groups_of, answers, strict=True):
        assert found == [expected(name, conversation) for conversation in micro_batch.conversations]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_restarted_stage_costs_a_prefill_and_no_token(stage: int) -> None:
    conversation = Conversation("a", [5, 9, 33, 7, 100], Sampling(temperature=1.0, seed=7), chunk=2)
    micro_batch = MicroBatch([conversation], [])
    with engines(build_groups("llama")) as stages, engines(build_groups("llama")) as fresh:
        while len(conversation.token_ids) < len(conversation.prompt) + 3:
            micro_batch.round(stages, "none", 0)
        stages[stage] = fresh[stage]
        assert micro_batch.drive(stages) == [expected("llama", conversation)]
        stages[stage] = fresh[stage]


def test_a_text_is_scored_as_by_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_pass, "_LOGITS_AT_ONCE", 64)
    text = [3 + number * 7 % 120 for number in range(200)]
    row = Row("a", 0, 0, len(text), Want.LOGPROBS, reserve_tokens=len(text))
    with engines(build_groups("llama")) as stages:
        (answer,) = through(stages, batch([row], text)).rows
    assert answer.result is not None
    whole = tiny_models.all_logits(whole_model("llama"), text).log_softmax(dim=-1)
    assert answer.result.logprobs == pytest.approx([float(whole[n, text[n + 1]]) for n in range(len(text) - 1)], abs=1e-4)
