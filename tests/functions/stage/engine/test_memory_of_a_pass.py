"""A long text in a single event, as scoring sends it: memory grows with its tokens, never with their square."""

from typing import Any

import pytest
import torch

from eventing.wire.events import Row, Status, Want
from functions.stage.engine import forward_pass
from functions.stage.engine.event_queue import ForwardEvent
from functions.stage.engine.forward_pass import ForwardPass
from functions.stage.models.build import Kind, build_layer_group
from functions.stage.models.layer_group import LayerGroup
from functions.stage.models.llama import attention
from functions.stage.models.transformers import group as transformers_group
from tests.support.functions.allocations import Allocations
from tests.support.functions.borders import raw
from tests.support.functions.forward_passes import passes_of
from tests.support.functions.group_chain import tokens_of
from tests.support.functions.stage_pipeline import batch, tensors, whole_model
from tests.support.storage import tiny_models

TOKENS = 1024
SQUARE_BYTES = TOKENS * TOKENS * 4
CASES: list[tuple[Kind, str]] = [
    ("llama", "mistral_sliding"),
    ("llama", "llama"),
    ("llama", "smollm3"),
    ("transformers", "mistral_sliding"),
    ("transformers", "gemma2"),
]


def build(kind: Kind, name: str, dtype: str = "float32", **changes: Any) -> LayerGroup:
    config = tiny_models.tiny_config(name, **changes)
    return build_layer_group(kind, config, raw(tensors(name)), 0, 6, dtype, "cpu", 2**25)


def scored(running: ForwardPass, token_ids: list[int], position: int = 0) -> tuple[float, ...]:
    row = Row("a", 0, position, len(token_ids), Want.LOGPROBS, reserve_tokens=2 * len(token_ids) if position == 0 else None)
    (reply,) = running.run([ForwardEvent(batch([row], token_ids), "gateway")])
    (answer,) = reply.rows
    assert answer.status is Status.OK, answer
    assert answer.result is not None
    assert answer.result.logprobs is not None
    return answer.result.logprobs


@pytest.fixture(autouse=True)
def little_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of large models, scaled down to tiny ones."""
    monkeypatch.setattr(forward_pass, "_TOKENS_AT_ONCE", 200, raising=False)
    monkeypatch.setattr(attention, "_MASK_NUMBERS", 2**14, raising=False)
    monkeypatch.setattr(transformers_group, "_SCORES_AT_ONCE", 2**16, raising=False)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_memory_does_not_grow_with_the_square_of_a_text(kind: Kind, name: str) -> None:
    running = passes_of(build(kind, name, max_position_embeddings=2 * TOKENS))
    for position in (0, TOKENS):
        with Allocations() as made:
            scored(running, tokens_of(1, TOKENS), position)
        assert made.largest_bytes <= SQUARE_BYTES / 8, made.largest_by


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_text_scored_in_parts_has_the_whole_models_log_probabilities(kind: Kind, name: str) -> None:
    running = passes_of(build(kind, name))
    text = tokens_of(3, 250)
    logits = tiny_models.all_logits(whole_model(name), text)
    expected = logits[:-1].log_softmax(dim=-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    assert scored(running, text) == pytest.approx(expected.tolist(), abs=2e-3)


def test_rows_of_several_texts_are_split_at_token_limits() -> None:
    running = passes_of(build("llama", "llama"))
    texts = [tokens_of(seed, length) for seed, length in ((4, 150), (5, 60), (6, 1), (7, 240))]
    alone = [scored(passes_of(build("llama", "llama")), text) for text in texts]
    rows = [Row(str(n), 0, 0, len(text), Want.LOGPROBS, reserve_tokens=250) for n, text in enumerate(texts)]
    (reply,) = running.run([ForwardEvent(batch(rows, [token for text in texts for token in text]), "gateway")])
    for row, expected in zip(reply.rows, alone, strict=True):
        assert row.result is not None
        assert row.result.logprobs == pytest.approx(expected, abs=2e-3)
