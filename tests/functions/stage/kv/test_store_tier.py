"""Conversations into a real S3 server and back: the same bits go on, and whatever is wrong there is computed instead."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, Event
from typing import Any

import pytest

from eventing.wire.control import ReserveRow
from eventing.wire.events import Status
from eventing.wire.prefix_chain import BLOCK_TOKENS, packed
from functions.stage.kv import store_tier
from functions.stage.kv.store_tier import StoreTier
from functions.stage.models.kv_bytes import copied_kv
from storage.kv.kv_store import KVObjects
from storage.kv.sealed import Sealer
from storage.store.embedded import EmbeddedStore
from storage.store.payload_store import PayloadStore
from storage.store.settings import StoreSettings
from tests.support.functions.kv_stages import DTYPES, KVStage, chain_of, drawn_without_tiers, kv_stage, text
from tests.support.functions.stage_pipeline import wait_for
from tests.support.storage.storage import Fault, fault_proxy


@pytest.fixture
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreSettings]:
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as server:
        yield server.settings


@pytest.fixture
def store(settings: StoreSettings) -> Iterator[PayloadStore]:
    with PayloadStore(settings, stall_seconds=1.0, retry_seconds=0.5) as store:
        yield store


def first_turn(store: PayloadStore, dtype: str = "float32", length: int = 180, seed: int = 0) -> list[int]:
    """A conversation that a stage held when it ended, which it has drained; all its tokens."""
    with kv_stage(dtype, store) as stage:
        tokens = text(length, seed)
        tokens += stage.converse("first", tokens)[1]
        stage.end("first", tokens)
        drain(stage)
    return tokens


def drain(stage: KVStage) -> None:
    assert stage.writer is not None
    stage.writer.drain(stage.engine, 20.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_conversation_continues_after_its_stage_scaled_to_zero(store: PayloadStore, dtype: str) -> None:
    tokens = first_turn(store, dtype)
    follow_up = [*tokens, *text(40, seed=9)]
    with kv_stage(dtype, store) as stage:
        held, drawn = stage.converse("second", follow_up, 6)
        assert held == (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert stage.restores.tokens == {"store": held}
    assert drawn == drawn_without_tiers(dtype, follow_up)


def test_stored_parts_are_not_written_again_and_new_ones_are_added(store: PayloadStore) -> None:
    tokens = first_turn(store)
    before = {found.key: found.modified for found in store.list("kv/")}
    with kv_stage(store=store) as stage:
        longer = [*tokens, *text(60, seed=3)]
        stage.converse("second", longer, 1)
        stage.end("second", longer)
        drain(stage)
    after = {found.key: found.modified for found in store.list("kv/")}
    assert before.keys() < after.keys()
    assert {key: after[key] for key in before} == before
    with kv_stage(store=store) as stage:
        assert stage.reserve("third", longer).held == (len(longer) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_evicted_conversations_are_found_in_the_store(store: PayloadStore) -> None:
    with kv_stage(store=store) as stage:
        conversations = [text(240, seed) for seed in range(8)]  # more than the arena has
        for number, tokens in enumerate(conversations):
            stage.converse(str(number), tokens, 1)
            stage.end(str(number), tokens)
        assert stage.writer is not None
        wait_for(lambda: stage.writer.waiting_bytes == 0)
        held = [stage.reserve(f"again {number}", tokens, 1).held for number, tokens in enumerate(conversations[:1])]
        assert held == [224]
        assert stage.restores.tokens["store"] == 224


def test_a_shared_prefix_is_restored_for_another_conversation(store: PayloadStore) -> None:
    tokens = first_turn(store)
    other = [*tokens[:140], *text(90, seed=5)]
    with kv_stage(store=store) as stage:
        held, drawn = stage.converse("other", other, 6)
        assert 0 < held <= 128
        assert held % BLOCK_TOKENS == 0
    assert drawn == drawn_without_tiers("float32", other)


@pytest.mark.parametrize(
    "fault",
    [Fault(path="/kv/", flip_byte=5000), Fault(path="/kv/", end_after=3000), Fault(path="/kv/", status=404)],
    ids=["altered", "truncated", "gone"],
)
def test_a_part_damaged_in_transfer_is_computed_instead(settings: StoreSettings, store: PayloadStore, fault: Fault) -> None:
    tokens = first_turn(store)
    with fault_proxy(settings) as proxy, PayloadStore(proxy.settings, stall_seconds=1.0, retry_seconds=0.5) as through:
        fault.times = 1000
        proxy.faults.append(fault)
        with kv_stage(store=through) as stage:
            held, drawn = stage.converse("second", tokens, 6)
            assert held < 100
            assert stage.restores.failed == ([] if fault.status else ["store"])
    assert drawn == drawn_without_tiers("float32", tokens)


def test_an_altered_object_is_computed_instead_and_written_again(store: PayloadStore) -> None:
    tokens = first_turn(store)
    for found in store.list("kv/"):
        data = bytearray(store.get(found.key))
        data[len(data) // 2] ^= 1
        store.put(found.key, bytes(data))
    with kv_stage(store=store) as stage:
        held, drawn = stage.converse("second", tokens, 6)
        assert (held, stage.restores.failed) == (0, ["store"])
        stage.end("second", tokens)
        drain(stage)
    assert drawn == drawn_without_tiers("float32", tokens)
    with kv_stage(store=store) as stage:
        assert stage.reserve("third", tokens).held > 0


def test_a_store_that_is_away_or_slow_delays_reservations_only_briefly(settings: StoreSettings, store: PayloadStore) -> None:
    tokens = first_turn(store)
    away = PayloadStore(replace(settings, endpoint_url="http://127.0.0.1:1"), stall_seconds=1.0, retry_seconds=0.5)
    with fault_proxy(settings) as proxy:
        proxy.faults.append(Fault(path="/kv/", times=1000, stall_after=100))
        slow = PayloadStore(proxy.settings, stall_seconds=2.0, retry_seconds=8.0)
        for broken in (away, slow):
            with broken, kv_stage(store=broken) as stage:
                stage.estimate._rate.computed(100, 0.1)
                began = time.monotonic()
                held, drawn = stage.converse("second", tokens, 6)
                assert (held, stage.restores.failed) == (0, ["store"])
                assert time.monotonic() - began < 5
                if broken is away:
                    stage.end("second", tokens)
                    drain(stage)
                    assert time.monotonic() - began < 10
            assert drawn == drawn_without_tiers("float32", tokens)


def test_many_reservations_with_a_slow_store_are_answered_before_they_expire(
    store: PayloadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoreTier, "_part", lambda *_: time.sleep(0.3))
    with kv_stage(store=store) as stage:
        rows = [ReserveRow(str(seed), 0, 190, packed(chain_of(text(180, seed)))) for seed in range(6)]
        began = time.time()
        answers = stage.engine.reserve(rows, source="gateway", expires_at=began + 3)
        assert time.time() - began < 3
        assert [answer.status for answer in answers] == [Status.OK] * 6


def test_a_clients_short_deadline_does_not_mark_the_store_as_away(store: PayloadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = first_turn(store)
    part = StoreTier._part

    def slow(*asked: Any) -> Any:
        time.sleep(1.5)
        return part(*asked)

    monkeypatch.setattr(StoreTier, "_part", slow)
    with kv_stage(store=store) as stage:
        row = ReserveRow("in haste", 0, 200, packed(chain_of(tokens)))
        (answer,) = stage.engine.reserve([row], source="gateway", expires_at=time.time() + 1)
        assert (answer.status, answer.held) == (Status.OK, 0)
        held, drawn = stage.converse("patient", tokens, 6)
        assert held > 0
        assert drawn == drawn_without_tiers("float32", tokens)


def test_an_unexpected_error_does_not_end_the_writer(store: PayloadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with kv_stage(store=store) as stage:
        assert stage.writer is not None
        writer = stage.writer
        monkeypatch.setattr(writer, "_write", lambda *_: 1 // 0)
        tokens = text(100)
        stage.converse("first", tokens, 1)
        stage.end("first", tokens)
        drain(stage)
        assert writer._paused
        assert writer._thread is not None
        assert writer._thread.is_alive()
        monkeypatch.undo()
        writer._paused_until = 0.0
        drain(stage)
    assert list(store.list("kv/"))


def test_another_key_or_sharer_finds_nothing(store: PayloadStore) -> None:
    tokens = first_turn(store)
    with kv_stage(store=store, sealer=Sealer(b"o" * 32)) as stage:
        assert stage.reserve("second", tokens).held == 0
    with kv_stage(store=store) as stage:
        (row,) = stage.engine.reserve([ReserveRow("a", 0, 400, packed(chain_of(tokens, "another")))], source="gateway")
        assert row.held == 0


def test_a_full_arena_is_reported_and_no_tier_is_asked(store: PayloadStore) -> None:
    tokens = first_turn(store)
    with kv_stage(store=store) as stage:
        stage.reserve("large", text(1, 1), more=stage.engine.cache.free_tokens - 48)
        assert stage.reserve("second", tokens).status == "full"
        assert stage.restores.tokens == {}


def test_replicas_together_store_no_more_than_the_bound(store: PayloadStore) -> None:
    """Six pods drain at the same time, and have several times what may be stored."""
    bound = 2**22
    peaks: list[int] = []

    def drained(replica: int) -> None:
        with kv_stage(store=store, max_bytes=bound) as stage:
            for number in range(5):
                tokens = text(200, seed=10 * replica + number)
                stage.converse(str(number), tokens, 1)
                stage.end(str(number), tokens)
            all_drained.wait(30)
            drain(stage)

    all_drained = Barrier(6)
    with ThreadPoolExecutor(6) as replicas:
        running = [replicas.submit(drained, number) for number in range(6)]
        while not all(one.done() for one in running):
            peaks.append(sum(found.bytes for found in store.list("kv/")))
            time.sleep(0.01)
        for one in running:
            one.result()
    assert bound / 2 < max(peaks) <= bound


def test_copies_that_wait_for_a_slow_store_are_bounded(store: PayloadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, most_bytes = Event(), 2**19
    monkeypatch.setattr(store_tier, "WAITING_BYTES", most_bytes)
    put = KVObjects.put

    def slow(*arguments: Any) -> int:
        go_on.wait(30)
        return put(*arguments)

    monkeypatch.setattr(KVObjects, "put", slow)
    with kv_stage(store=store) as stage:
        assert stage.writer is not None
        copied = []
        monkeypatch.setattr(store_tier, "copied_kv", lambda *span: copied.append(copied_kv(*span)) or copied[-1])
        for number in range(12):  # more than the arena has
            tokens = text(240, seed=number)
            stage.converse(str(number), tokens, 1)
            stage.end(str(number), tokens)
        assert 0 < sum(map(len, copied)) <= most_bytes
        go_on.set()
        wait_for(lambda: stage.writer.waiting_bytes == 0)
        assert list(store.list("kv/"))
