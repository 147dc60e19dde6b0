"""KV is reused only under the lineage that it was computed under: what computed it, at its stage and at all before it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from eventing.wire.control import ReleaseRow, ReserveRow
from eventing.wire.events import Row, Status
from eventing.wire.kv_query import KVQuery
from eventing.wire.prefix_chain import packed
from functions.gateway.stages.routes import Endpoint, Placement
from functions.stage.kv.peer_tier import hand_over
from functions.stage.models.kv_cache import KVBlocks
from functions.stage.models.layer_group import LayerGroup
from storage.store.embedded import EmbeddedStore
from storage.store.payload_store import PayloadStore
from tests.support.functions.gateway import nothing_left, scheduling, submit, tokens_of
from tests.support.functions.kv_stages import FINGERPRINT, KVStage, chain_of, kv_stage, native_stage, peer_tiers, text
from tests.support.functions.native_models import CUT, native_groups
from tests.support.functions.stage_pipeline import batch
from tests.support.functions.stage_server import StageServer, running

ONE, OTHER = "1" * 16, "2" * 16
TOKENS = text(97)


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PayloadStore]:
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as server, PayloadStore(server.settings) as store:
        yield store


def held(stage: KVStage, id_: str, lineage: str | None) -> int:
    """How many of TOKENS a new sequence finds; it is released again."""
    row = ReserveRow(id_, 0, len(TOKENS), packed(chain_of(TOKENS[:-1])))
    while (answer := stage.engine.reserve([row], source="gateway", lineage=lineage)[0]).restoring:
        pass
    assert answer.status is Status.OK
    stage.engine.release([ReleaseRow(id_, 0)], source="gateway")
    return answer.held


def compute(stage: KVStage, id_: str, first: int, end: int, lineage: str | None) -> None:
    row = Row(id_, 0, first, end - first, reserve_tokens=len(TOKENS) if first == 0 else None)
    (answer,) = stage.engine.handle(batch([row], TOKENS[first:end]), source="gateway", lineage=lineage).rows
    assert answer.status is Status.OK


def end(stage: KVStage, id_: str) -> None:
    stage.engine.release([ReleaseRow(id_, 0, packed(chain_of(TOKENS[:-1])))], source="gateway")


def test_kv_is_found_in_memory_and_in_the_store_under_its_lineage_only(store: PayloadStore) -> None:
    with kv_stage(store=store) as stage:
        compute(stage, "a", 0, 96, ONE)
        end(stage, "a")
        assert [held(stage, "b", lineage) for lineage in (OTHER, None, ONE)] == [0, 0, 96]
        assert stage.writer is not None
        stage.writer.drain(stage.engine, 20.0)
    with kv_stage(store=store) as stage:
        assert [held(stage, "c", lineage) for lineage in (OTHER, None, ONE)] == [0, 0, 96]


@pytest.mark.parametrize("then", [OTHER, None])
def test_tokens_computed_under_another_lineage_are_neither_found_nor_handed_over(then: str | None) -> None:
    with kv_stage() as stage:
        own = stage.engine.lineage(ONE)
        assert own is not None
        compute(stage, "a", 0, 48, ONE)
        compute(stage, "a", 48, 96, then)
        by_id = [KVQuery(FINGERPRINT, 0, first, first + 48, own, "", "a", 0, "gateway") for first in (0, 48)]
        found = hand_over(by_id[0], stage.engine)
        assert found is not None
        assert found[1] == 48
        assert hand_over(by_id[1], stage.engine) is None
        end(stage, "a")
        assert [held(stage, "b", lineage) for lineage in (OTHER, ONE)] == [0, 48]


def test_what_is_computed_again_under_one_lineage_is_found_as_a_whole() -> None:
    with kv_stage() as stage:
        compute(stage, "a", 0, 48, ONE)
        compute(stage, "a", 48, 96, OTHER)
        compute(stage, "a", 48, 96, ONE)
        end(stage, "a")
        assert held(stage, "b", ONE) == 96
        compute(stage, "c", 0, 48, ONE)
        compute(stage, "c", 0, 96, OTHER)
        end(stage, "c")
        assert held(stage, "d", OTHER) == 96


def test_a_running_sequence_is_not_found_by_what_another_lineage_made_of_it() -> None:
    with kv_stage() as stage:
        row = ReserveRow("a", 0, len(TOKENS), packed(chain_of(TOKENS[:-1])))
        stage.engine.reserve([row], source="gateway", lineage=ONE)
        compute(stage, "a", 0, 96, OTHER)
        assert [held(stage, "b", lineage) for lineage in (ONE, OTHER)] == [0, 0]


def test_later_stages_compute_again_what_another_kind_of_first_stage_began() -> None:
    """The first stage moves to another CPU: what the second and third hold of the conversation came from the first CPU."""
    make = native_stage("float32", with_peers=True)

    def on_another_cpu() -> LayerGroup:
        (group,) = native_groups("llama", "float32", CUT[:1])
        assert isinstance(group.kv, KVBlocks)
        group.kv.layout = replace(group.kv.layout, kind="native float32 another")
        return group

    def other(_: int) -> StageServer:
        return StageServer(0, CUT, on_another_cpu, tiers=lambda group: peer_tiers(group, 0))

    with running(make, len(CUT)) as stages, running(other, 1) as (moved,):
        placed = Placement([stage.url for stage in stages], watched=True)
        with scheduling(stages, placement=placed, draft_tokens=0) as scheduler:
            for index, stage in enumerate(stages):
                scheduler.endpoints_changed(index, [Endpoint(stage.url)])
            tokens = text(70)
            tokens += tokens_of(submit(scheduler, tokens, 10))
            nothing_left(stages)
            again = submit(scheduler, tokens, 4)
            expected = tokens_of(again)
            assert again.cached_tokens == 64
            nothing_left(stages)
            scheduler.endpoints_changed(0, [Endpoint(stages[0].url, ready=False, terminating=True), Endpoint(moved.url)])
            for stage in stages:
                stage.passes.clear()
            after = submit(scheduler, tokens, 4)
            assert tokens_of(after) == expected
            assert after.cached_tokens == 0
            for stage in (moved, *stages[1:]):
                assert any(position == 0 for each in stage.passes for position, _ in each)
            nothing_left([moved, *stages])
