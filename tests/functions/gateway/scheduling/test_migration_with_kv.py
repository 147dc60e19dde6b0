"""A micro-batch that migrates takes its KV along: nothing is computed again, and the answers are the same."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pytest

from eventing.wire.control import RESTORE_HOLD_SECONDS
from eventing.wire.events import Sampling
from eventing.wire.kv_query import KVQuery
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.stages.routes import Endpoint, Placement
from functions.stage.kv import peer_tier
from functions.stage.kv.peer_tier import SequenceReader
from tests.support.functions.gateway import nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.kv_stages import native_stage
from tests.support.functions.native_models import CUT
from tests.support.functions.stage_server import StageServer, running
from tests.support.storage import tiny_models

MIDDLE: Final = 1
NEW_TOKENS: Final = 100
SAMPLED: Final = Sampling(temperature=1.0, seed=7)
PENALIZED: Final = Sampling(temperature=1.0, seed=7, repetition_penalty=1.3, presence_penalty=0.5)


def prompts() -> list[list[int]]:
    """Some of their lengths are whole blocks, others are not."""
    dice = random.Random(5)
    return [dice.choices(range(3, tiny_models.VOCAB_SIZE), k=length) for length in (70, 81, 96, 113)]


@dataclass
class Migration:
    scheduler: Scheduler
    stages: list[StageServer]
    new: dict[int, StageServer]  # by stage

    def leave(self) -> None:
        for stage, new in self.new.items():
            old = Endpoint(self.stages[stage].url, ready=False, terminating=True)
            self.scheduler.endpoints_changed(stage, [old, Endpoint(new.url)])

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Position and length of what the middle stage's new instance has computed."""
        return [segment for each in self.new[MIDDLE].passes for segment in each]

    def answers(self, sampling: Sampling, after: int | None = None) -> list[list[int]]:
        """after: instances leave once so many tokens of each answer have come."""
        streams = [submit(self.scheduler, prompt, NEW_TOKENS, sampling=sampling) for prompt in prompts()]
        if after is not None:
            wait_until(lambda: all(len(stream.token_ids) >= after for stream in streams), "tokens of each")
            self.leave()
            wait_until(lambda: all(new.passes for new in self.new.values()), "the migration")
        for stream in streams:
            tokens_of(stream)
        return [list(stream.token_ids) for stream in streams]


@contextmanager
def migration(dtype: str, leaving: tuple[int, ...] = (MIDDLE,)) -> Iterator[Migration]:
    """leaving: the stages whose instances can leave."""
    make = native_stage(dtype, with_peers=True)
    with running(make, len(CUT)) as stages, running(lambda index: make(leaving[index]), len(leaving)) as new:
        placed = Placement([stage.url for stage in stages], watched=True)
        with scheduling(stages, placement=placed, chunk_tokens=64, draft_tokens=0) as scheduler:
            for index, stage in enumerate(stages):
                scheduler.endpoints_changed(index, [Endpoint(stage.url)])
            for stage in (*stages, *new):
                stage.seconds = 0.002
            yield Migration(scheduler, stages, dict(zip(leaving, new, strict=True)))


def undisturbed(dtype: str, sampling: Sampling) -> list[list[int]]:
    """The answers without a migration."""
    with migration(dtype) as pipeline:
        return pipeline.answers(sampling)


@pytest.mark.parametrize(
    ("dtype", "sampling"),
    [("float32", Sampling()), ("float32", SAMPLED), ("bfloat16", Sampling()), ("int8", SAMPLED), ("q4", Sampling())],
    ids=["fp32", "fp32-sampled", "bf16", "int8-sampled", "q4"],
)
def test_a_stage_that_leaves_hands_over_and_no_token_is_computed_again(dtype: str, sampling: Sampling) -> None:
    expected = undisturbed(dtype, sampling)
    with migration(dtype) as pipeline:
        assert pipeline.answers(sampling, after=20) == expected
        assert {length for _, length in pipeline.segments} == {1}, "only the newest token of each"
        assert min(position for position, _ in pipeline.segments) > 70
        assert all(length == 1 for each in pipeline.stages[0].passes[-20:] for _, length in each)
        nothing_left([*pipeline.stages, *pipeline.new.values()])


@pytest.mark.parametrize("leaving", [(MIDDLE,), (MIDDLE, 2)], ids=["one stage", "two stages"])
def test_a_hand_over_that_outlasts_the_reply_to_its_reservation_costs_no_token(
    leaving: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reservation is asked again while KV comes, and the other stages must not drop what they hold."""
    expected = undisturbed("float32", SAMPLED)
    hand_over = peer_tier.hand_over

    def slow(query: KVQuery, engine: SequenceReader) -> tuple[bytearray, int] | None:
        time.sleep(3 * RESTORE_HOLD_SECONDS)
        return hand_over(query, engine)

    monkeypatch.setattr(peer_tier, "hand_over", slow)
    with migration("float32", leaving) as pipeline:
        assert pipeline.answers(SAMPLED, after=20) == expected
        for new in pipeline.new.values():
            assert {length for each in new.passes for _, length in each} == {1}
        nothing_left([*pipeline.stages, *pipeline.new.values()])


def test_a_penalized_sequence_computes_only_tokens_after_its_last_whole_block() -> None:
    expected = undisturbed("float32", PENALIZED)
    with migration("float32") as pipeline:
        assert pipeline.answers(PENALIZED, after=20) == expected
        assert min(position for position, _ in pipeline.segments) > 70


def test_without_a_hand_over_all_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = undisturbed("float32", SAMPLED)
    monkeypatch.setattr(peer_tier, "hand_over", lambda *_: None)
    with migration("float32") as pipeline:
        assert pipeline.answers(SAMPLED, after=20) == expected
        assert min(position for position, _ in pipeline.segments) == 0
        nothing_left([*pipeline.stages, *pipeline.new.values()])


def test_an_old_instance_that_dies_at_the_hand_over_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = undisturbed("float32", SAMPLED)
    with migration("float32") as pipeline:
        asked = []

        def die(*_: object) -> None:
            asked.append(1)
            pipeline.stages[MIDDLE].kill()

        monkeypatch.setattr(peer_tier, "hand_over", die)
        assert pipeline.answers(SAMPLED, after=20) == expected
        assert asked


def test_an_idle_conversation_is_read_from_the_instance_that_leaves() -> None:
    with migration("float32") as pipeline:
        (prompt, *_) = prompts()
        first = submit(pipeline.scheduler, prompt, 20)
        tokens = [*prompt, *tokens_of(first)]
        nothing_left(pipeline.stages)
        pipeline.leave()
        second = submit(pipeline.scheduler, [*tokens, 5, 6, 7], 20)
        tokens_of(second)
        assert second.cached_tokens == (len(tokens) - 1) // 16 * 16
        assert min(position for position, _ in pipeline.segments) == second.cached_tokens
