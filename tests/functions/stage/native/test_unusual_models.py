"""Forty tiny models of unusual sizes in float32: greedy tokens are those of transformers' `generate`, and layers run in C."""

from collections.abc import Mapping
from typing import Any, Final

import pytest
import torch

from functions.stage.models.build import Kind, build_layer_group
from functions.stage.models.native.group import NativeGroup
from tests.support.functions.borders import raw
from tests.support.functions.group_chain import GroupChain, by_plan, tokens_of
from tests.support.functions.native_models import finished
from tests.support.storage import tiny_models

NEW_TOKENS: Final = 12
TOLERANCE: Final = 1e-4


def heads(heads: int, kv_heads: int, head_dim: int, hidden_size: int = 32, **others: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden_size,
        **others,
    }


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default", **parameters}}


LLAMA3: Final = rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
BIASES: Final = {"attention_bias": True, "mlp_bias": True}
TIED: Final = {"tie_word_embeddings": True}

MODELS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    # How many query heads share a key head.
    "every head its own": ("llama", heads(5, 5, 8, 40)),
    "two share": ("llama", heads(6, 3, 8, 36)),
    "three share": ("llama", heads(9, 3, 8, 36)),
    "five share": ("llama", heads(5, 1, 8, 40)),
    "seven share": ("llama", heads(14, 2, 8, 56)),
    "eight share": ("llama", heads(8, 1, 8)),
    "nine share, more than are computed together": ("llama", heads(9, 1, 8, 36)),
    "seventeen share": ("llama", heads(17, 1, 4, 34)),
    "one head": ("llama", heads(1, 1, 32)),
    # Head sizes.
    "heads of 2": ("llama", heads(4, 2, 2)),
    "heads of 6": ("llama", heads(4, 2, 6)),
    "heads of 10": ("llama", heads(4, 2, 10)),
    "heads of 14": ("llama", heads(4, 4, 14)),
    "heads of 16": ("llama", heads(4, 2, 16)),
    "heads of 18": ("llama", heads(4, 2, 18)),
    "heads of 30": ("llama", heads(2, 1, 30)),
    "heads of 48": ("llama", heads(2, 1, 48)),
    "heads of 80": ("llama", heads(3, 1, 80, 48)),
    "heads of 112": ("llama", heads(2, 2, 112)),
    "heads of 256": ("llama", heads(2, 1, 256)),
    # Widths that are no whole number of vectors or tiles.
    "hidden size 20": ("llama", heads(2, 1, 10, 20)),
    "hidden size 36, inner size 50": ("llama", heads(3, 1, 12, 36, intermediate_size=50)),
    "hidden size 100, inner size 7": ("llama", heads(5, 1, 20, 100, intermediate_size=7)),
    "inner size 1": ("llama", heads(4, 2, 8, intermediate_size=1)),
    "inner size 257": ("llama", heads(4, 2, 8, intermediate_size=257)),
    # Windows.
    "a window of 3": ("mistral", {"sliding_window": 3}),
    "a window of 2": ("mistral", {"sliding_window": 2}),
    "a window of 15": ("mistral", {"sliding_window": 15}),
    "a window of 16": ("mistral", {"sliding_window": 16}),
    "a window of 17, heads of 6": ("mistral", heads(4, 2, 6, sliding_window=17)),
    "windows in some layers": ("ministral", heads(4, 1, 10, sliding_window=5)),
    "windows from the third layer on": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    # Rotations.
    "rope as Llama 3 has it, heads of 12": ("llama", heads(4, 2, 12, **LLAMA3)),
    "rope stretched evenly": ("llama", heads(4, 2, 6, **rope(rope_type="linear", factor=3.0))),
    "rope of YaRN, tied": (
        "llama",
        heads(3, 1, 10, 30, **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), **TIED),
    ),
    "a large theta": ("llama", rope(rope_theta=1e6)),
    "no rotation in some layers": ("smollm3", heads(6, 2, 10, no_rope_layers=[1, 0, 0, 1, 1, 0])),
    # Biases, norms of heads, ties.
    "biases everywhere": ("llama", heads(5, 1, 6, 30, **BIASES)),
    "biases everywhere, tied": ("llama", heads(4, 2, 18, 44, **BIASES, **TIED)),
    "biases of queries, keys and values": ("qwen2", heads(7, 1, 6, 42)),
    "norms of heads": ("qwen3", heads(6, 2, 10, 28)),
    "norms of heads, biases, tied": ("qwen3", heads(3, 3, 22, 66, attention_bias=True, **TIED)),
    "biases of the output": ("seed_oss", heads(4, 2, 14, attention_out_bias=True, mlp_bias=True)),
    "a vocabulary of 97": ("llama", {"vocab_size": 97}),
    "a large eps": ("llama", {"rms_norm_eps": 0.1}),
}


def test_there_are_at_least_38_unusual_models() -> None:
    assert len(MODELS) >= 38


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_generate_and_logits_those_of_the_whole_model(name: str) -> None:
    family, changes = MODELS[name]
    model = tiny_models.whole_model(family, **changes)
    config, tensors = tiny_models.tiny_config(family, **changes), tiny_models.checkpoint_tensors(model)
    group = finished(NativeGroup(config, 0, 6, "float32", 2**22), tensors)
    chain = GroupChain([group])
    prompt = [token % config["vocab_size"] for token in tokens_of(3, 21)]
    chain.reserve("a", "b")
    assert chain.greedy("a", prompt, NEW_TOKENS) == tiny_models.greedy(model, prompt, NEW_TOKENS)
    text = [token % config["vocab_size"] for token in tokens_of(4, 45)]
    in_chunks = by_plan(chain.logits, {"b": text}, {"b": (1, 19, 4, 1, 20)})["b"]
    torch.testing.assert_close(in_chunks, tiny_models.all_logits(model, text), atol=TOLERANCE, rtol=0)
    chain.reserve("c")
    assert torch.equal(by_plan(chain.logits, {"c": text}, {"c": (1,) * 45})["c"], in_chunks)


@pytest.mark.parametrize("kind", ["native", "llama", "transformers"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {"sliding_window": 1}), ("qwen2", {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 2})],
)
def test_a_window_of_one_token_sees_that_token(kind: Kind, family: str, changes: dict[str, Any]) -> None:
    """Compared with the whole model without a cache: the cache of its `generate` wrongly keeps all tokens."""
    model = tiny_models.whole_model(family, **changes)
    config, tensors = tiny_models.tiny_config(family, **changes), raw(tiny_models.checkpoint_tensors(model))
    chain = GroupChain([build_layer_group(kind, config, tensors, 0, 6, "float32", "cpu", 2**22)])
    chain.reserve("a")
    text = tokens_of(4, 45)
    in_chunks = by_plan(chain.logits, {"a": text}, {"a": (1, 19, 4, 1, 20)})["a"]
    torch.testing.assert_close(in_chunks, tiny_models.all_logits(model, text), atol=TOLERANCE, rtol=0)
