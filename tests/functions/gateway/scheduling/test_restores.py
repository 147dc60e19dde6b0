"""KV that comes slowly from a peer or the store: only the sequence that waits for it waits."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from eventing.wire.events import EventType
from eventing.wire.kv_query import KVQuery
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.stages import client
from functions.gateway.stages.routes import Endpoint, Placement
from functions.stage.engine.kv_tiers import RestoreRequest, SequenceGone
from functions.stage.kv import peer_tier
from tests.support.functions.gateway import WAIT_SECONDS, nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.kv_stages import native_stage
from tests.support.functions.native_models import CUT
from tests.support.functions.stage_server import StageServer, hold, inspecting, is_type, running
from tests.support.storage import tiny_models

MIDDLE: Final = 1


@dataclass
class SlowStore:
    """A tier that holds nothing, and says so only after `opened`; the prompts of one block it knows at once."""

    name: str = "store"
    opened: threading.Event = field(default_factory=threading.Event)
    asked: set[str] = field(default_factory=set)
    gone: list[str] = field(default_factory=list)

    def restore(self, request: RestoreRequest) -> int:
        if len(request.chain) > 1:
            self.asked.add(request.sequence[0])
            assert self.opened.wait(4 * WAIT_SECONDS)
            try:
                return request.with_cache(lambda cache, handle: cache.length(handle))
            except SequenceGone:
                self.gone.append(request.sequence[0])
                raise
        return request.held


@contextmanager
def slow_pipeline(**limits: int) -> Iterator[tuple[Scheduler, list[StageServer], SlowStore]]:
    """The middle stage asks the slow store."""
    store = SlowStore()

    def make(index: int) -> StageServer:
        return native_stage("float32", tiers=lambda _: [store] if index == MIDDLE else [])(index)

    try:
        with (
            running(make, len(CUT)) as stages,
            scheduling(stages, step_timeout_seconds=3 * WAIT_SECONDS, draft_tokens=0, **limits) as scheduler,
        ):
            yield scheduler, stages, store
    finally:
        store.opened.set()


def long_prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, tiny_models.VOCAB_SIZE), k=50)


def short_prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, tiny_models.VOCAB_SIZE), k=20)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reservation that is not answered does not fail before the test does."""
    monkeypatch.setattr(client, "RESERVATION_SECONDS", 3 * WAIT_SECONDS)


def test_others_are_admitted_and_computed_while_many_are_restored() -> None:
    with slow_pipeline() as (scheduler, stages, store):
        for stage in stages:
            stage.seconds = 0.005
        decoding = submit(scheduler, short_prompt(0), 400)
        wait_until(lambda: decoding.token_ids, "a token of the sequence that decodes")
        waiting = []
        for seed in range(1, 9):
            waiting.append(submit(scheduler, long_prompt(seed), 8))
            wait_until(lambda: len(store.asked) == len(waiting), "its restore beside the others'")
        before = len(decoding.token_ids)
        assert len(tokens_of(submit(scheduler, short_prompt(9), 8))) == 8
        wait_until(lambda: decoding.finish_reason or len(decoding.token_ids) > before + 10, "more of its tokens")
        assert not any(stream.token_ids for stream in waiting)
        store.opened.set()
        assert [len(tokens_of(stream)) for stream in waiting] == [8] * 8
        decoding.cancel()
        nothing_left(stages)


def test_a_sequence_beside_one_that_is_restored_in_the_same_reservation_does_not_wait() -> None:
    with slow_pipeline(stages_at_once=1) as (scheduler, stages, store):
        go_on = threading.Event()
        stages[0].inspect = inspecting(is_type(EventType.RESERVE), go_on.wait, times=1)
        submit(scheduler, short_prompt(0), 1)
        waiting, other = submit(scheduler, long_prompt(1), 8), submit(scheduler, short_prompt(2), 8)
        go_on.set()
        assert len(tokens_of(other)) == 8
        wait_until(lambda: store.asked, "the restore")
        assert not waiting.token_ids
        store.opened.set()
        assert len(tokens_of(waiting)) == 8
        nothing_left(stages)


def test_a_client_that_leaves_ends_its_restore() -> None:
    with slow_pipeline() as (scheduler, stages, store):
        waiting = submit(scheduler, long_prompt(1), 8)
        wait_until(lambda: store.asked, "the restore")
        waiting.cancel()
        nothing_left(stages)
        store.opened.set()
        wait_until(lambda: store.gone, "the end of the restore")
        nothing_left(stages)


def test_an_instance_that_is_left_keeps_what_is_fetched_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others go on meanwhile, and no token of the sequence that is fetched is computed again."""
    hand_over, opened, asked = peer_tier.hand_over, threading.Event(), threading.Event()

    def slow(query: KVQuery, engine: Any) -> Any:
        if query.end > len(short_prompt(2)):
            asked.set()
            assert opened.wait(4 * WAIT_SECONDS)
        return hand_over(query, engine)

    monkeypatch.setattr(peer_tier, "hand_over", slow)
    make = native_stage("float32", with_peers=True)
    with running(make, len(CUT)) as stages, running(lambda _: make(MIDDLE), 1) as (new,):
        placed = Placement([stage.url for stage in stages], watched=True)
        with scheduling(stages, placement=placed, draft_tokens=0) as scheduler:
            for index, stage in enumerate(stages):
                scheduler.endpoints_changed(index, [Endpoint(stage.url)])
            left = hold(stages[0], range(80, 110))
            moving = submit(scheduler, long_prompt(1), 60)
            wait_until(lambda: len(moving.token_ids) > 20, "some tokens")
            old = stages[MIDDLE]
            scheduler.endpoints_changed(MIDDLE, [Endpoint(old.url, ready=False, terminating=True), Endpoint(new.url)])
            left.set()
            assert asked.wait(WAIT_SECONDS)
            assert len(tokens_of(submit(scheduler, short_prompt(2), 8))) == 8
            assert len(old.engine.sequences.by_id) == 1
            opened.set()
            assert len(tokens_of(moving)) == 60
            assert max(length for each in new.passes for position, length in each if position >= 50) == 1
            nothing_left([*stages, new])
