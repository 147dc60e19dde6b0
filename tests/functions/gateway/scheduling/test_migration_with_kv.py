"""A micro-batch that migrates takes its KV along: nothing is computed again, and the answers are the same."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pytest

from eventing.wire.events import Sampling
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.stages.routes import Endpoint, Placement
from functions.stage.kv import peer_tier
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
    new: StageServer

    @property
    def old(self) -> StageServer:
        return self.stages[MIDDLE]

    def leave(self) -> None:
        self.scheduler.endpoints_changed(
            MIDDLE, [Endpoint(self.old.url, ready=False, terminating=True), Endpoint(self.new.url)]
        )

    def answers(self, sampling: Sampling, after: int | None = None) -> list[list[int]]:
        """after: the middle stage's instance leaves once so many tokens of each answer have come."""
        streams = [submit(self.scheduler, prompt, NEW_TOKENS, sampling=sampling) for prompt in prompts()]
        if after is not None:
            wait_until(lambda: all(len(stream.token_ids) >= after for stream in streams), "tokens of each")
            self.leave()
            wait_until(lambda: self.new.passes, "the migration")
        for stream in streams:
            tokens_of(stream)
        return [list(stream.token_ids) for stream in streams]


@contextmanager
def migration(dtype: str) -> Iterator[Migration]:
    make = native_stage(dtype, with_peers=True)
    with running(make, len(CUT)) as stages, running(lambda _: make(MIDDLE), 1) as (new,):
        placed = Placement([stage.url for stage in stages], watched=True)
        with scheduling(stages, placement=placed, chunk_tokens=64, draft_tokens=0) as scheduler:
            for index, stage in enumerate(stages):
                scheduler.endpoints_changed(index, [Endpoint(stage.url)])
            for stage in (*stages, new):
                stage.seconds = 0.002
            yield Migration(scheduler, stages, new)


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
        segments = [segment for each in pipeline.new.passes for segment in each]
        assert segments
        assert {length for _, length in segments} == {1}, "only the newest token of each"
        assert min(position for position, _ in segments) > 70
        assert all(length == 1 for each in pipeline.stages[0].passes[-20:] for _, length in each)
        nothing_left([*pipeline.stages, pipeline.new])


def test_a_penalized_sequence_computes_only_tokens_after_its_last_whole_block() -> None:
    expected = undisturbed("float32", PENALIZED)
    with migration("float32") as pipeline:
        assert pipeline.answers(PENALIZED, after=20) == expected
        assert min(position for each in pipeline.new.passes for position, _ in each) > 70


def test_without_a_hand_over_all_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = undisturbed("float32", SAMPLED)
    monkeypatch.setattr(peer_tier, "hand_over", lambda *_: None)
    with migration("float32") as pipeline:
        assert pipeline.answers(SAMPLED, after=20) == expected
        assert min(position for each in pipeline.new.passes for position, _ in each) == 0
        nothing_left([*pipeline.stages, pipeline.new])


def test_an_old_instance_that_dies_at_the_hand_over_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = undisturbed("float32", SAMPLED)
    with migration("float32") as pipeline:
        asked = []

        def die(*_: object) -> None:
            asked.append(1)
            pipeline.old.kill()

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
        assert min(position for each in pipeline.new.passes for position, _ in each) == second.cached_tokens
