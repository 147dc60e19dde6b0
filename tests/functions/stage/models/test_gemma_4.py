"""Layers with heads of their own sizes, some of which read the keys and values of others, and get inputs from token ids."""

from functools import cache
from typing import Any, Final

import numpy as np
import pytest
import torch

from functions.stage.models.kv_bytes import checked, copied_kv, put_kv, stamp
from functions.stage.models.layer_group import MissingTensors, Segment
from functions.stage.models.native.group import NativeGroup
from functions.stage.models.native.kv_pool import LayerKV, NativeKVPool
from functions.stage.native.records import Dtype
from knative.spec.cut import cut_evenly, parse_cut
from knative.spec.errors import SpecError, TooManyStages
from knative.spec.model_shape import shape_from_config
from knative.spec.sizing import plan_stages
from tests.support.functions.borders import raw
from tests.support.functions.stage_pipeline import GroupPipeline
from tests.support.storage import tiny_models

SHARED: Final = {"num_kv_shared_layers": 3}  # layers 3 to 5 read the keys and values of layers 2 and 1
NAMES: Final = ("gemma4_text", "gemma3n_text")
TEXT: Final = [(37 * token + 11) % tiny_models.VOCAB_SIZE for token in range(60)]


@cache
def tensors(name: str) -> Any:
    return tiny_models.checkpoint_tensors(whole(name))


@cache
def whole(name: str) -> Any:
    return tiny_models.whole_model(name, **SHARED)


def group(first: int, last: int, dtype: str = "float32", name: str = "gemma4_text") -> NativeGroup:
    made = NativeGroup(tiny_models.tiny_config(name, **SHARED), first, last, dtype, 2**22)
    made.place(raw(dict(tensors(name))))
    made.finish()
    return made


@pytest.mark.parametrize("cut", [((0, 6),), ((0, 1), (1, 6))])
@pytest.mark.parametrize("name", NAMES)
def test_layers_that_read_others_keys_and_values_give_the_whole_models_logits(
    name: str, cut: tuple[tuple[int, int], ...]
) -> None:
    pipeline = GroupPipeline([group(*bounds, name=name) for bounds in cut])
    logits = [pipeline.logits(TEXT[first : first + 7], first) for first in range(0, len(TEXT), 7)]
    torch.testing.assert_close(torch.cat(logits), tiny_models.all_logits(whole(name), TEXT), atol=1e-4, rtol=0)


def test_layers_that_share_are_in_one_stage() -> None:
    for first, last in ((2, 6), (0, 3)):
        with pytest.raises(ValueError, match=r"no stage can end before layer .: layer . attends to"):
            NativeGroup(tiny_models.tiny_config("gemma4_text", **SHARED), first, last, "float32", 2**22)
    shape = shape_from_config(tiny_models.tiny_config("gemma4_text", **SHARED), "gemma", "float32")
    assert cut_evenly(shape, 2) == ((0, 1), (1, 6))
    with pytest.raises(TooManyStages, match="layer 4 attends to the keys and values of layer 1; ask for at most 2 stages"):
        cut_evenly(shape, 3)
    with pytest.raises(SpecError, match="can begin with layer 3: layer 3 attends to the keys and values of layer 2"):
        plan_stages(shape, parse_cut("0:3,3:6"))
    # Keys and values of 2 heads in float32: of 16 numbers, and of 24, which take 32.
    assert [plan.kv_bytes_per_token for plan in plan_stages(shape, ((0, 1), (1, 6)))] == [2 * 2 * 16 * 4, 2 * 2 * (32 + 16) * 4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_of_layers_with_different_heads_continue_elsewhere(dtype: str) -> None:
    """As bytes, and as a copy within the arena."""
    one = group(1, 6, dtype)
    hidden = np.random.default_rng(0).standard_normal((60, 32)).astype(np.float32)
    states = hidden if dtype == "float32" else (hidden.view(np.uint32) >> 16).astype(np.uint16)
    ids = np.array(TEXT, np.int64)
    handles = [one.kv.reserve(60) for _ in range(3)]
    one.forward(states[:40], [Segment(handles[0], 0, 40, token_ids=ids[:40])])
    data = copied_kv(one.kv, handles[0], 0, 40)
    stamp(data)
    assert put_kv(one.kv, handles[1], checked(one.kv.layout, data)) == 40
    one.kv.copy(handles[0], handles[2], 40)
    found = [one.forward(states[40:], [Segment(handle, 40, 20, token_ids=ids[40:])]) for handle in handles]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_pages_are_as_large_as_the_smallest_layer_needs() -> None:
    pool = NativeKVPool([LayerKV(8, 16, 256), LayerKV(None, 4, 512), LayerKV(None, 1, 512)], Dtype.BF16, 2**24)
    assert pool.arena.shape[1] == 64 * 2 * 512 * 2
    assert pool.places == [(0, 8), (8, 4), (12, 1)]
    assert pool.layout.token_bytes == 2 * 2 * (16 * 256 + 4 * 512 + 512)


def test_a_plan_counts_all_numbers_that_pass_between_stages() -> None:
    for name, rows in (("gemma3n_text", 3), ("zamba", 2), ("llama", 1)):
        shape = shape_from_config(tiny_models.tiny_config(name), name, "float32")
        assert [plan.hop_bytes_per_token for plan in plan_stages(shape, ((0, 3), (3, 6)))] == [rows * 32 * 4, 0]


def test_a_matrix_of_streams_that_is_missing_is_named() -> None:
    made = NativeGroup(tiny_models.tiny_config("gemma3n_text", **SHARED), 0, 6, "float32", 2**22)
    made.place(raw({name: tensor for name, tensor in tensors("gemma3n_text").items() if "unembed_projections.1" not in name}))
    with pytest.raises(MissingTensors, match=r"not placed: model\.altup_unembed_projections\.1\.weight"):
        made.finish()
