"""Cuts are optimal, and a model's sizes are those of its publication."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from knative.spec.cut import cut_evenly
from knative.spec.errors import SpecError, TooManyStages, UnknownShape
from knative.spec.model_shape import ModelShape, published_shape, shape_from_config, shape_from_folder, shape_from_gguf
from knative.spec.sizing import SEQUENCE_TOKENS, plan_stages
from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from tests.storage.checkpoints.test_gguf_families import write_gguf
from tests.storage.models.test_publisher_quantized import MAKERS
from tests.support.functions.block_models import MIXED, block_model
from tests.support.paths import ROOT
from tests.support.storage import tiny_models

LLAMA_2_13B = ROOT / "examples" / "llama-2-13b"
SMOLLM2 = {
    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def heaviest(shape: ModelShape, cut: tuple[tuple[int, int], ...]) -> float:
    """Weight of the heaviest group, computed without cut.py."""
    plans = plan_stages(shape, cut)
    size = sum(plan.weight_bytes for plan in plans)
    work = sum(plan.compute for plan in plans)
    return max(max(plan.weight_bytes / size, plan.compute / work) for plan in plans)


def all_cuts(layers: int, stages: int) -> list[tuple[tuple[int, int], ...]]:
    inner = combinations(range(1, layers), stages - 1)
    return [tuple(pairwise((0, *bounds, layers))) for bounds in inner]


@settings(deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), min_size=1, max_size=8),
    embedding=st.integers(0, 500),
    head=st.tuples(st.integers(0, 500), st.integers(0, 500)),
    data=st.data(),
)
def test_no_other_cut_has_a_lighter_heaviest_group(
    layers: list[tuple[int, int]], embedding: int, head: tuple[int, int], data: st.DataObject
) -> None:
    shape = ModelShape(
        name="drawn",
        dtype="bfloat16",
        hidden_size=8,
        row_size=8,
        layer_bytes=tuple(size for size, _ in layers),
        embedding_bytes=embedding,
        head_bytes=head[0],
        layer_compute=tuple(work for _, work in layers),
        head_compute=head[1],
        kv_values_per_layer=4,
    )
    stages = data.draw(st.integers(1, len(layers)))
    cut = tuple(cut_evenly(shape, stages))
    assert len(cut) == stages
    assert heaviest(shape, cut) == pytest.approx(min(heaviest(shape, other) for other in all_cuts(len(layers), stages)))


def test_llama_2_13b_in_four_stages() -> None:
    shape = shape_from_folder(LLAMA_2_13B, "float16")
    plans = plan_stages(shape, cut_evenly(shape, 4))
    assert [(plan.first_layer, plan.last_layer) for plan in plans] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert sum(plan.weight_bytes for plan in plans) == 2 * 13_015_864_320  # the parameters that Meta's checkpoint has
    assert [plan.kv_bytes_per_token for plan in plans] == [10 * 2 * 40 * 128 * 2] * 4
    assert plans[0].kv_bytes_per_token * SEQUENCE_TOKENS == 800 * 2**20
    assert [plan.hop_bytes_per_token for plan in plans] == [10240, 10240, 10240, 0]
    half = plan_stages(shape_from_folder(LLAMA_2_13B, "bfloat16"), cut_evenly(shape, 4), kv_dtype="int8")
    assert [plan.kv_bytes_per_token for plan in half] == [10 * 2 * 40 * (128 + 4)] * 4
    with pytest.raises(SpecError, match=r"\$.kv_dtype: int8 takes layers in C, which do not run .*: float16 is not"):
        plan_stages(shape, cut_evenly(shape, 4), kv_dtype="int8")
    in_8_bits = plan_stages(shape, cut_evenly(shape, 4), "int8")
    assert [plan.hop_bytes_per_token for plan in in_8_bits] == [5124, 5124, 5124, 0], "a byte per number, and a scale of four"


@pytest.mark.parametrize(
    "cut", [(), ((0, 10), (20, 30)), ((0, 20), (10, 30)), ((5, 30),), ((0, 10), (10, 10), (10, 30)), ((0, 29),), ((0, 31),)]
)
def test_a_plan_has_each_layer_once(cut: tuple[tuple[int, int], ...]) -> None:
    shape = shape_from_config(SMOLLM2, "smollm2", "bfloat16")
    with pytest.raises(ValueError, match="does not have each of smollm2's 30 layers once, in order"):
        plan_stages(shape, cut)


def test_the_head_of_a_small_model_counts_like_eight_layers() -> None:
    shape = shape_from_config(SMOLLM2, "smollm2", "bfloat16")
    cut = cut_evenly(shape, 3)
    assert cut == ((0, 10), (10, 24), (24, 30))
    shares = [plan.compute_share for plan in plan_stages(shape, cut)]
    assert max(shares) < 0.37


def test_quantization_shrinks_only_weights_and_float32_doubles_all_bytes() -> None:
    shapes = {d: shape_from_config(SMOLLM2, "s", d) for d in ("float32", "bfloat16", "int8", "q4")}
    plans = {d: plan_stages(shape, ((0, 15), (15, 30)))[0] for d, shape in shapes.items()}
    assert plans["float32"].hop_bytes_per_token == 4 * 576
    for dtype in ("bfloat16", "int8", "q4"):
        assert plans[dtype].hop_bytes_per_token == 2 * 576
    assert plans["float32"].weight_bytes == pytest.approx(2 * plans["bfloat16"].weight_bytes, rel=1e-3)
    layer = shapes["float32"].layer_bytes[0] / 4
    assert shapes["int8"].layer_bytes[0] == pytest.approx(layer, rel=0.01), "and scales of rows"
    in_q4 = layer * 5 / 8  # four bits, and sixteen of scale and of minimum for 32 weights
    assert shapes["q4"].layer_bytes[0] == pytest.approx(in_q4, rel=0.01)
    in_q8_0 = shapes["float32"].embedding_bytes / 4 * 34 / 32
    assert shapes["int8"].embedding_bytes == shapes["q4"].embedding_bytes == pytest.approx(in_q8_0, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "float32"), ("llama_tied", "int8"), ("gpt2", "bfloat16"), ("qwen2_moe", "q4"), ("gpt_oss", "int8"),
        ("deepseek_v2", "q4"), ("granitemoehybrid", "int8"), ("nemotron_h_latent", "q4"), ("lfm2_moe", "bfloat16"),
    ],
)  # fmt: skip
def test_sizes_from_a_config_are_the_published_ones(name: str, dtype: str, tmp_path: Path) -> None:
    """But for the order of tensors, which changes the lengths of headers."""
    tiny_models.whole_model(name).save_pretrained(tmp_path)
    with EmbeddedStore(tmp_path / "store") as embedded:
        store = ObjectStore(embedded.settings)
        exact = published_shape(store, publish(tmp_path, store, "m", dtype))
    told = shape_from_config(json.loads((tmp_path / "config.json").read_text()), "m", dtype)
    assert told.layer_bytes == pytest.approx(exact.layer_bytes, abs=128)
    assert (told.embedding_bytes, told.head_bytes) == pytest.approx((exact.embedding_bytes, exact.head_bytes), abs=128)
    assert told.layer_compute == exact.layer_compute


def test_all_experts_count_in_bytes_and_the_chosen_ones_in_compute() -> None:
    mixtral = SMOLLM2 | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    shape = shape_from_config(mixtral, "mixtral", "bfloat16")
    dense = shape_from_config(SMOLLM2, "dense", "bfloat16")
    assert shape.layer_bytes[0] > 6 * dense.layer_bytes[0]
    assert shape.layer_compute[0] < 3 * dense.layer_compute[0]


def test_safetensors_headers_give_exact_sizes(tmp_path: Path) -> None:
    config = SMOLLM2 | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.embed_tokens.weight": [100, 4],
        "model.layers.0.mlp.up_proj.weight": [10, 4],
        "model.layers.1.mlp.up_proj.weight": [30, 4],
        "model.layers.2.mlp.up_proj.weight": [50, 4],  # of a layer that predicts further tokens, which is not published
        "model.norm.weight": [4],
    }
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, tmp_path / "model.safetensors")
    shape = shape_from_folder(tmp_path, "bfloat16")
    assert shape.layer_bytes == (80, 240)
    assert (shape.embedding_bytes, shape.head_bytes) == (800, 808)


def test_packed_tensors_of_a_quantized_checkpoint_do_not_count(tmp_path: Path) -> None:
    config = SMOLLM2 | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    save_file({"model.layers.0.mlp.up_proj.qweight": np.zeros((5, 4), np.int32)}, tmp_path / "model.safetensors")
    assert shape_from_folder(tmp_path, "q4") == shape_from_config(config, tmp_path.name, "q4")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_gguf_file_has_the_sizes_of_its_folder(name: str, tmp_path: Path) -> None:
    tiny_models.whole_model(name).save_pretrained(tmp_path / "tiny")
    path = write_gguf(tmp_path / "tiny.gguf", name)
    assert shape_from_gguf(path, "bfloat16") == shape_from_folder(tmp_path / "tiny", "bfloat16")


def test_a_gguf_file_that_is_published_as_it_is_has_the_published_sizes(tmp_path: Path) -> None:
    path = block_model(tmp_path / "tiny.gguf", "llama", MIXED)
    with EmbeddedStore(tmp_path / "store") as embedded:
        store = ObjectStore(embedded.settings)
        exact, told = published_shape(store, publish(path, store, "m", "kept")), shape_from_gguf(path, "kept")
    assert told.layer_bytes == pytest.approx(exact.layer_bytes, rel=0.02)
    assert told.embedding_bytes == pytest.approx(exact.embedding_bytes, rel=0.05)
    assert told.head_bytes == pytest.approx(exact.head_bytes, rel=0.05)


def test_a_quantized_folder_that_is_published_as_it_is_has_the_published_sizes(tmp_path: Path) -> None:
    folder = MAKERS["fp8 by matrix"](tmp_path)
    with EmbeddedStore(tmp_path / "store") as embedded:
        objects = publish(folder, ObjectStore(embedded.settings), "m", "kept").objects
    told = shape_from_folder(folder, "kept").layer_bytes
    # Without headers, which are long beside such small matrices.
    tensors = objects["layer-00005"].bytes - min(span.start for span in objects["layer-00005"].tensors.values())
    assert told[5] == pytest.approx(tensors, rel=0.03)
    assert told[5] < 0.85 * shape_from_folder(folder, "bfloat16").layer_bytes[5]


def test_more_stages_than_layers() -> None:
    with pytest.raises(TooManyStages, match="31 stages requested, but s has 30 layers; ask for at most 30 stages"):
        cut_evenly(shape_from_config(SMOLLM2, "s", "int8"), 31)


def test_a_missing_key_of_a_config_is_named() -> None:
    with pytest.raises(UnknownShape, match=r"odd: config.json has no positive integer num_hidden_layers or n_layer"):
        shape_from_config({"hidden_size": 8}, "odd", "bfloat16")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownShape, match=r"config\.json: cannot be read as JSON"):
        shape_from_folder(tmp_path, "bfloat16")
