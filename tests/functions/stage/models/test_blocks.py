"""Models in GGUF's block formats: by layers in C, by torch's operators and by transformers, against float32 layers."""

from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from bench.stage.perplexity import converted
from functions.stage.models.build import build_layer_group
from functions.stage.models.layer_group import LayerGroup
from functions.stage.models.packed_tensors import WrongShape
from storage.checkpoints.model_source import open_checkpoint
from storage.loading.weight_loader import RawTensor
from tests.support.functions.block_models import MIXED, block_model
from tests.support.functions.group_chain import logits_by_plan, tokens_of
from tests.support.functions.native_models import error
from tests.support.storage import tiny_models
from tests.support.storage.random_blocks import IN_FILES

TEXTS: Final = {"a": tokens_of(1, 30), "b": tokens_of(2, 21), "c": tokens_of(3, 6)}
PLAN: Final = {"a": (1, 20, 9), "b": (3, 1, 17), "c": (0, 1, 5)}
CUT: Final = ((0, 2), (2, 3), (3, 6))
BUDGET: Final = 2**22


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@cache
def model(folder: Path, family: str, name: str) -> tuple[dict[str, Any], dict[str, RawTensor], dict[str, RawTensor]]:
    """Config, tensors in blocks, and the same as float32."""
    path = folder / f"{family}-{name}.gguf"
    checkpoint = open_checkpoint(block_model(path, family, name))
    return dict(checkpoint.config), converted(checkpoint.tensors, "kept"), converted(checkpoint.tensors, "float32")


def groups(kind: Any, config: dict[str, Any], tensors: dict[str, RawTensor], dtype: str) -> list[LayerGroup]:
    cut = CUT if dtype == "kept" else ((0, tiny_models.NUM_LAYERS),)
    return [
        build_layer_group(kind, config, tiny_models.stage_tensors(tensors, first, last), first, last, dtype, "cpu", BUDGET)
        for first, last in cut
    ]


@pytest.mark.sampled
@pytest.mark.parametrize("name", [*IN_FILES, MIXED])
@pytest.mark.parametrize("family", ["llama_tied", "qwen2"])
def test_logits_are_near_those_of_the_file_in_float32(family: str, name: str, folder: Path) -> None:
    """Rounding a product's activations to 8 bits in blocks of 32 changes normal numbers by 0.5 %. Layers in bfloat16 round
    activations, weights and each result by 0.15 %, which adds up to 0.3 % for a product: half as much, in the same model."""
    config, blocks, floats = model(folder, family, name)
    exact = logits_by_plan(groups("llama", config, floats, "float32"), TEXTS, PLAN)
    in_bfloat16 = logits_by_plan(groups("llama", config, blocks, "kept"), TEXTS, PLAN)
    found = logits_by_plan(groups("native", config, blocks, "kept"), TEXTS, PLAN)
    assert error(found, exact) < 3 * error(in_bfloat16, exact) < 0.3


def test_experts_in_blocks_give_logits_near_those_of_the_file_in_float32(folder: Path) -> None:
    config, blocks, floats = model(folder, "qwen3_moe", MIXED)
    exact = logits_by_plan(groups("transformers", config, floats, "float32"), TEXTS, PLAN)
    in_bfloat16 = logits_by_plan(groups("transformers", config, blocks, "kept"), TEXTS, PLAN)
    own = groups("native", config, blocks, "kept")
    found = logits_by_plan(own, TEXTS, PLAN)
    assert error(found, exact) < 3 * error(in_bfloat16, exact) < 0.3
    in_steps = [logits_by_plan(own, {id: text}, {id: (1,) * len(text)}) for id, text in TEXTS.items()]
    assert torch.equal(found, torch.cat(in_steps))


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", MIXED])
def test_a_sequences_bits_do_not_depend_on_chunks_company_or_threads(name: str, folder: Path) -> None:
    config, blocks, _ = model(folder, "qwen2", name)
    own = groups("native", config, blocks, "kept")
    together = logits_by_plan(own, TEXTS, PLAN)
    for group in own:
        group.use_threads(3)
    in_steps = [logits_by_plan(own, {id: text}, {id: (1,) * len(text)}) for id, text in TEXTS.items()]
    assert torch.equal(together, torch.cat(in_steps))


@pytest.mark.parametrize("kind", ["llama", "transformers"])
@pytest.mark.parametrize("name", ["Q5_0", MIXED])
def test_layers_that_are_not_in_c_run_blocks_as_bfloat16(kind: Any, name: str, folder: Path) -> None:
    config, blocks, floats = model(folder, "llama", name)
    exact = logits_by_plan(groups("llama", config, floats, "float32"), TEXTS, PLAN)
    assert error(logits_by_plan(groups(kind, config, blocks, "kept"), TEXTS, PLAN), exact) < 0.1


@pytest.mark.parametrize(
    ("suffix", "data", "words"),
    [
        ("_format", b'{"format":"Q9_X","shape":[256,256]}', "unknown block format 'Q9_X'"),
        ("_format", b'{"format":"Q4_K","shape":[256,512]}', "which is no Q4_K of"),
        ("_format", b'{"format":"Q4_K","shape":[256,100]}', "which is no Q4_K of"),
        ("_format", b"no JSON", "malformed"),
    ],
)
def test_blocks_that_contradict_their_description_are_refused(suffix: str, data: bytes, words: str, folder: Path) -> None:
    config, blocks, _ = model(folder, "llama", "Q4_K")
    name = "model.layers.0.self_attn.q_proj.weight" + suffix
    wrong = {**blocks, name: RawTensor("U8", (len(data),), memoryview(bytearray(data)))}
    with pytest.raises(WrongShape, match=words):
        build_layer_group("native", config, wrong, 0, 6, "kept", "cpu", BUDGET)
