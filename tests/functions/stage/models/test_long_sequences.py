"""Sequences longer than windows and than a piece of attention: the whole model's logits, the same bits, in less memory."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from functions.stage.models.build import Kind, build_layer_group
from functions.stage.models.kv_bytes import checked, copied_kv, put_kv, stamp
from functions.stage.models.kv_cache import GOING_BACK, KVBlocks
from functions.stage.models.layer_group import LayerGroup, Segment
from functions.stage.models.native.group import NativeGroup
from functions.stage.models.native.kv_pool import LayerKV, NativeKVPool
from functions.stage.models.transformers import cache_layers
from functions.stage.models.transformers.cache import TransformersKVCache
from functions.stage.models.transformers.cache_layers import LayerMemory
from functions.stage.native.records import Dtype
from tests.support.functions.borders import raw
from tests.support.functions.group_chain import GroupChain, tokens_of
from tests.support.functions.stage_pipeline import GroupPipeline
from tests.support.storage import tiny_models

CONTEXT: Final[dict[str, Any]] = {"max_position_embeddings": 8192}
CUT: Final = ((0, 3), (3, 6))
LENGTH: Final = 900  # a ring of the tiny models has 320 tokens, transformers' layers keep 264
WINDOWED: Final[Sequence[tuple[Kind, str]]] = [
    ("native", "ministral"), ("native", "mistral_sliding"), ("native", "qwen2_sliding"), ("transformers", "gemma2"),
    ("transformers", "gemma3_text"), ("transformers", "gpt_oss"), ("transformers", "mistral_sliding"),
]  # fmt: skip


@cache
def whole_model(name: str) -> PreTrainedModel:
    return tiny_models.whole_model(name, **CONTEXT)


def groups(kind: Kind, name: str, cut: Sequence[tuple[int, int]] = CUT) -> list[LayerGroup]:
    config = tiny_models.tiny_config(name, **CONTEXT)
    tensors = tiny_models.checkpoint_tensors(whole_model(name))
    parts = [(first, last, raw(tiny_models.stage_tensors(tensors, first, last))) for first, last in cut]
    return [build_layer_group(kind, config, part, first, last, "float32", "cpu", 2**24) for first, last, part in parts]


def by_chunks(pipeline: GroupPipeline, text: Sequence[int], first: int, sizes: Sequence[int]) -> torch.Tensor:
    parts = []
    for size in sizes:
        parts.append(pipeline.logits(text[first : first + size], first))
        first += size
    assert first == len(text)
    return torch.cat(parts)


@pytest.mark.parametrize(("kind", "name"), WINDOWED)
def test_with_windows_a_long_text_has_the_whole_models_logits_and_can_go_back(kind: Kind, name: str) -> None:
    text = tokens_of(3, LENGTH)
    expected = tiny_models.all_logits(whole_model(name), text)
    pipeline = GroupPipeline(groups(kind, name), LENGTH)
    near = {"atol": 2e-4, "rtol": 0.0}
    torch.testing.assert_close(by_chunks(pipeline, text, 0, [600, *[1] * 30, 7, 13, 250]), expected, **near)
    for first in (LENGTH - 60, LENGTH - 120):
        again = by_chunks(pipeline, text, first, [LENGTH - first])
        torch.testing.assert_close(again, expected[first:], **near)
    for group, handle in zip(pipeline.groups, pipeline.handles, strict=True):
        group.kv.truncate(handle, LENGTH // 2)
        assert group.kv.length(handle) == (LENGTH // 2 if "full" in kinds_of_layers(group) else 0)
        group.kv.truncate(handle, 0)
    torch.testing.assert_close(by_chunks(pipeline, text, 0, [1, LENGTH - 1]), expected, **near)


def kinds_of_layers(group: LayerGroup) -> str:
    """`full` if none of its layers has a window."""
    need = group.kv.need  # type: ignore[attr-defined]
    return "windowed" if need.windowed_units else "full"


@pytest.mark.sampled
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [16, 300, 5, 579]])
@pytest.mark.parametrize("threads", [1, 3])
def test_with_windows_chunks_and_threads_change_no_bit(chunks: list[int], threads: int) -> None:
    text = tokens_of(4, LENGTH)
    (group,) = groups("native", "ministral", ((0, 6),))
    expected = by_chunks(GroupPipeline([group], LENGTH), text, 0, [500, 400])
    group.use_threads(threads)
    assert torch.equal(by_chunks(GroupPipeline([group], LENGTH), text, 0, chunks), expected)


LONG: Final = 5000  # three pieces of attention


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2_sliding"])
def test_beyond_a_piece_of_attention_no_bit_depends_on_chunks_company_and_threads(name: str, dtype: str) -> None:
    changes: dict[str, Any] = {} if name == "llama" else {"sliding_window": 2500}
    config = tiny_models.tiny_config(name, **CONTEXT, **changes)
    model = tiny_models.whole_model(name, **CONTEXT, **changes)
    tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tiny_models.checkpoint_tensors(model).items()}
    group = build_layer_group("native", config, raw(tensors), 0, 6, dtype, "cpu", 2**26)
    text, others = tokens_of(5, LONG), {"b": tokens_of(6, 4600), "c": tokens_of(7, 30)}
    chain = GroupChain([group])
    chain.reserve("a", "b", "c", tokens=LONG)
    whole = chain.logits({"a": (0, text)})["a"]
    if dtype == "float32":
        torch.testing.assert_close(whole, tiny_models.all_logits(model, text), atol=2e-4, rtol=0)
    chain.states({id: (0, tokens[:-1]) for id, tokens in others.items()})
    for threads in (1, 2, 5):
        group.use_threads(threads)
        for rows in (1, 3, 14, 40):
            company = {id: (len(tokens) - 1, tokens[-1:]) for id, tokens in others.items()} if rows != 3 else {}
            first = LONG - rows
            found = chain.logits({**company, "a": (first, text[first:])})["a"]
            assert torch.equal(found, whole[first:]), (threads, rows)


@pytest.mark.parametrize(("window", "pattern", "most"), [(1024, 6, 0.3), (512, 6, 0.25), (1024, 2, 0.6)])
def test_windows_save_memory(window: int, pattern: int, most: float) -> None:
    """Five of six layers have a window as in gemma3, or every other one as in gemma2."""
    windows = [None if layer % pattern == pattern - 1 else window for layer in range(12)]
    tokens, heads, size = 8192, 2, 16
    every = 12 * tokens * 2 * heads * size * 4
    pool = NativeKVPool([LayerKV(window, heads, size) for window in windows], Dtype.F32, every)
    handle = pool.reserve(tokens)
    assert (pool.tables[handle] >= 0).sum() == pool.units(handle)
    pages = pool.tables[handle]
    pool.arena[pages[pages >= 0]] = 1
    assert 0 < pool.resident_bytes <= most * every
    token = torch.zeros(1, heads, 1, size)
    cache = TransformersKVCache(every, [LayerMemory(has_kv=True, window=window, kv=(token, token)) for window in windows])
    layers = cache.cache(cache.reserve(tokens)).layers
    for layer in layers:
        layer.update(torch.zeros(1, heads, 1, size), torch.zeros(1, heads, 1, size))
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert taken <= most * every
    assert cache.need.of(tokens) == taken
    for kv in (pool, cache):
        assert kv.free_tokens > (1 - most) * tokens


@pytest.mark.parametrize(
    ("kind", "name", "going_back"),
    [("native", "ministral", GOING_BACK), ("transformers", "gemma2", cache_layers.GOING_BACK)],
    ids=["native", "transformers"],
)
def test_a_long_sequence_with_windows_is_handed_over_and_goes_on_with_the_same_bits(
    kind: Kind, name: str, going_back: int
) -> None:
    (group,) = groups(kind, name, ((0, 6),))
    kv, text = group.kv, tokens_of(8, LENGTH + 20)
    assert isinstance(kv, KVBlocks)
    source, target, short = (kv.reserve(len(text)) for _ in range(3))
    group.forward(np.array(text[:LENGTH]), [Segment(source, 0, LENGTH)])
    parts = []
    for first in range(0, LENGTH, 160):
        parts.append(copied_kv(kv, source, first, min(first + 160, LENGTH)))
        stamp(parts[-1])
    assert len(parts[0]) / 160 < len(parts[-1]) / (LENGTH % 160) * 0.6, "layers with windows have dropped its tokens"
    for number, part in enumerate(parts, 1):
        assert put_kv(kv, target, checked(kv.layout, part)) == min(number * 160, LENGTH)
        if number < len(parts):
            put_kv(kv, short, checked(kv.layout, part))
            assert kv.length(target) == 0 or kv.holds(source, kv.length(target))
    assert (kv.length(target), kv.length(short)) == (LENGTH, 5 * 160)
    assert not kv.holds(target, LENGTH - going_back - 1)
    for first in (LENGTH, LENGTH - 5, LENGTH - going_back // 2):
        rows = np.array(text[first : first + 20])
        outputs = []
        for handle in (source, target):
            kv.truncate(handle, first)
            outputs.append(group.forward(rows, [Segment(handle, first, len(rows))]))
        assert np.array_equal(*outputs)
    kv.truncate(short, 0)
    assert put_kv(kv, short, checked(kv.layout, parts[0])) == 160
    assert kv.length(short) == 0, "without the later parts it holds nothing"


def test_a_failed_pass_of_transformers_drops_what_windows_no_longer_hold() -> None:
    (group,) = groups("transformers", "gemma3_text", ((0, 6),))
    assert not isinstance(group, NativeGroup)
    text = tokens_of(9, LENGTH)
    handle = group.kv.reserve(LENGTH)
    group.forward(np.array(text[:400]), [Segment(handle, 0, 400)])
    layer = group._slice.base.layers[4]  # type: ignore[attr-defined]

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    forward, layer.forward = layer.forward, fails
    with pytest.raises(RuntimeError, match="no memory"):
        group.forward(np.array(text[400:]), [Segment(handle, 400, LENGTH - 400)])
    group.kv.truncate(handle, 400)
    assert group.kv.length(handle) == 0
    layer.forward = forward
    expected = tiny_models.all_logits(whole_model("gemma3_text"), text)
    states = group.forward(np.array(text), [Segment(handle, 0, LENGTH)])
    torch.testing.assert_close(torch.from_numpy(group.logits(states)), expected, atol=2e-4, rtol=0)
