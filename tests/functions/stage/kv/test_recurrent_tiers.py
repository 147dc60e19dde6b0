"""Conversations of models with recurrent layers, or shared KV, go on from memory, from another instance and from the store."""

from pathlib import Path

import pytest

from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.stage.models.layer_group import LayerGroup
from storage.store.embedded import EmbeddedStore
from storage.store.payload_store import PayloadStore
from tests.support.functions.kv_stages import LAYERS, KVStage, kv_stage, text
from tests.support.functions.stage_pipeline import build_groups, whole_model
from tests.support.functions.stage_server import StageServer
from tests.support.storage import tiny_models

NAMES = ["lfm2", "qwen3_5_text", "mamba2", "falcon_h1", "jamba"]
GEMMAS = ["gemma3n_text", "gemma4_text"]


def hybrid(name: str, kv_budget_bytes: int = 2**22) -> LayerGroup:
    return build_groups(name, (LAYERS,), "auto", kv_budget_bytes=kv_budget_bytes)[0]


def oracle(name: str, tokens: list[int]) -> list[int]:
    return tiny_models.greedy(whole_model(name), tokens, 6)


def whole_blocks(tokens: list[int]) -> int:
    """Tokens of a conversation that ended which a follow-up finds: all but the newest, in whole blocks."""
    return (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_goes_on_from_its_end_and_from_a_branch(name: str) -> None:
    with kv_stage(group=hybrid(name)) as stage:
        tokens = text(75)
        tokens += stage.converse("first", tokens)[1]
        stage.end("first", tokens)
        follow_up = [*tokens, *text(20, 7)]
        held, drawn = stage.converse("second", follow_up, 6)
        assert (held, drawn) == (whole_blocks(tokens), oracle(name, follow_up))
        stage.end("second", [*follow_up, *drawn])
        # Others begin alike, for 50 tokens. The first of them finds no state there, but leaves one for the next.
        for number, expected in enumerate((0, 48, 48)):
            other = [*tokens[:50], *text(30, 20 + number)]
            held, drawn = stage.converse(f"other {number}", other, 6)
            assert (held, drawn) == (expected, oracle(name, other))


def test_a_regenerated_answer_finds_its_prompt() -> None:
    with kv_stage(group=hybrid("lfm2")) as stage:
        tokens = text(70)
        drawn = stage.converse("first", tokens, 30)[1]
        stage.end("first", [*tokens, *drawn])
        assert stage.converse("again", tokens, 30) == (64, drawn)


@pytest.mark.parametrize("name", [*NAMES, *GEMMAS])
@pytest.mark.parametrize("ended", [True, False])
def test_another_instance_takes_over_with_the_state(name: str, ended: bool) -> None:
    server = StageServer(0, (LAYERS,), lambda: hybrid(name))
    try:
        there = KVStage(server.engine, None, None, None)  # type: ignore[arg-type]
        tokens = text(150)
        tokens += there.converse("moving", tokens, 9)[1]
        if ended:
            there.end("moving", tokens)
        with kv_stage(group=hybrid(name)) as stage:
            held, drawn = stage.converse("moving", tokens, 6, peers=(server.url,))
            assert stage.restores.failed == []
            assert held == (whole_blocks(tokens) if ended else len(tokens) - 1)
    finally:
        server.kill()
    assert drawn == oracle(name, tokens)


@pytest.mark.parametrize("name", [*NAMES, *GEMMAS])
def test_a_stage_that_was_at_zero_continues_from_the_store(name: str, tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as server, PayloadStore(server.settings, stall_seconds=1.0, retry_seconds=0.5) as store:
        with kv_stage(store=store, group=hybrid(name)) as stage:
            tokens = text(150)
            tokens += stage.converse("first", tokens)[1]
            stage.end("first", tokens)
            assert stage.writer is not None
            stage.writer.drain(stage.engine, 60.0)
        follow_up = [*tokens, *text(30, 9)]
        with kv_stage(store=store, group=hybrid(name)) as stage:
            held, drawn = stage.converse("second", follow_up, 6)
            assert (held, drawn) == (whole_blocks(tokens), oracle(name, follow_up))
            assert stage.restores.tokens == {"store": held}
        with kv_stage(store=store, group=hybrid(name)) as stage:  # the answer is generated again, after the prompt's end
            assert stage.reserve("again", tokens[:150]).held == whole_blocks(tokens[:150])
