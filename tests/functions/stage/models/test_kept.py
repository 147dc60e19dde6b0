"""Quantized checkpoints of Hugging Face in dtype `kept`: layers in C against float32 layers of the same weights.

`test_publisher_quantized` compares these weights with those that transformers dequantizes, and their tokens with its own.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench.stage.perplexity import converted
from functions.stage.models.layer_group import LayerGroup
from storage.checkpoints.checkpoint import Checkpoint
from storage.checkpoints.model_source import open_checkpoint
from storage.models.blocks import packing_of
from tests.functions.stage.models.test_blocks import PLAN, TEXTS, groups
from tests.support.functions.borders import raw
from tests.support.functions.group_chain import logits_by_plan
from tests.support.functions.native_models import error
from tests.support.storage import tiny_models
from tests.support.storage.adapters import adapted, stored_tensors

Tensors = dict[str, torch.Tensor]
SIZES: Final[dict[str, Any]] = {
    "hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 1,
}  # fmt: skip


def in_float8(matrix: torch.Tensor) -> tuple[Tensors, dict[str, Any]]:
    """Tiles of 128 x 128 (transformers, integrations/finegrained_fp8.py); the last rows of keys and values fill half of one."""
    rows = -len(matrix) % 128
    tiles = torch.nn.functional.pad(matrix, (0, 0, 0, rows)).view(-1, 128, matrix.shape[1] // 128, 128)
    scales = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scales[:, None, :, None]).view(-1, matrix.shape[1])[: len(matrix)]
    parts = {"weight": codes.to(torch.float8_e4m3fn), "weight_scale_inv": scales}
    return parts, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def in_gptq(matrix: torch.Tensor, group: int, order: torch.Tensor) -> tuple[Tensors, dict[str, Any]]:
    """Four bits with zero points, in groups of inputs that are neighbours in `order` (AutoGPTQ, qlinear_cuda_old.py:123)."""
    inputs = matrix.shape[1]
    group_of = torch.empty(inputs, dtype=torch.int32)
    group_of[order] = (torch.arange(inputs) // group).int()
    ends = [(columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)) for each in range(inputs // group)
            for columns in [matrix[:, group_of == each]]]  # fmt: skip
    scales = torch.stack([(high - low) / 15 for low, high in ends]).half()
    zeros = torch.stack([-low for low, _ in ends]).div(scales.float()).round().clamp(1, 15)
    codes = (matrix.T / scales.float()[group_of] + zeros[group_of]).round().clamp(0, 15)

    def words(numbers: torch.Tensor) -> torch.Tensor:
        """Of [8 n, m], each eight in 32 bits."""
        eights = numbers.numpy().astype(np.uint32).reshape(-1, 8, numbers.shape[1])
        return torch.from_numpy(
            (eights << (4 * np.arange(8, dtype=np.uint32))[:, None]).sum(1, dtype=np.uint32).view(np.int32)
        ).contiguous()

    qzeros = words((zeros - 1).T).T.contiguous()
    parts = {"qweight": words(codes), "qzeros": qzeros, "scales": scales.contiguous(), "g_idx": group_of}
    return parts, {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": True}


def shuffled(inputs: int, seed: Any) -> torch.Tensor:
    """seed: a number, or a matrix."""
    return torch.randperm(inputs, generator=torch.Generator().manual_seed(int(1e6 * torch.as_tensor(seed).abs().sum())))


METHODS: Final[dict[str, tuple[Any, str]]] = {
    "float8": (in_float8, "E4M3_128"),
    "four bits": (lambda matrix: in_gptq(matrix, 128, torch.arange(matrix.shape[1])), "INT4_128"),
    "four bits by activation order": (lambda matrix: in_gptq(matrix, 64, shuffled(matrix.shape[1], 0)), "INT4_64"),
    "four bits by an order for each matrix": (lambda matrix: in_gptq(matrix, 32, shuffled(matrix.shape[1], matrix)), "INT4_32"),
}


@cache
def checkpoint(folder: Path, method: str) -> Checkpoint:
    tensors = tiny_models.checkpoint_tensors(tiny_models.whole_model("llama", **SIZES))
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts, settings = METHODS[method][0](tensors.pop(name))
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    config = tiny_models.tiny_config("llama", **SIZES) | {"quantization_config": settings}
    (path := folder / method).mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


def stages(folder: Path, method: str, kind: str, dtype: Any) -> list[LayerGroup]:
    model = checkpoint(folder, method)
    return groups(kind, dict(model.config), converted(model.tensors, dtype), dtype)


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_near_those_of_the_weights_in_float32(method: str, folder: Path) -> None:
    """By the same bound as for GGUF's blocks (`test_blocks`)."""
    name = "model.layers.3.mlp.down_proj.weight"
    tensors = converted({name: checkpoint(folder, method).tensors[name]}, "kept")
    assert packing_of(tensors[f"{name}_format"].data).format == METHODS[method][1]
    exact = logits_by_plan(stages(folder, method, "llama", "float32"), TEXTS, PLAN)
    in_bfloat16 = logits_by_plan(stages(folder, method, "llama", "kept"), TEXTS, PLAN)
    found = logits_by_plan(stages(folder, method, "native", "kept"), TEXTS, PLAN)
    assert error(found, exact) < 3 * error(in_bfloat16, exact) < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_adapters_add_to_kept_blocks_as_to_their_numbers(method: str, folder: Path) -> None:
    """Also if the columns of a matrix are stored in another order, which the adapter's inputs do not have."""
    tensors = stored_tensors(adapted(tiny_models.whole_model("llama", **SIZES), 1, r=8, lora_alpha=1))

    def logits(kind: str, dtype: Any) -> torch.Tensor:
        own = stages(folder, method, kind, dtype)
        for group in own:
            share = tiny_models.stage_tensors(tensors, group.first_layer, group.last_layer)
            group.place_adapter(1, group.prepare_adapter(raw(share)))
        return logits_by_plan(own, TEXTS, PLAN, {"a": 1, "c": 1})

    exact, found = logits("llama", "float32"), logits("native", "kept")
    assert error(found, exact) < 3 * error(logits("llama", "kept"), exact) < 0.3
    assert error(logits_by_plan(stages(folder, method, "native", "kept"), TEXTS, PLAN), exact) > 0.3, "the adapter matters"


@pytest.mark.parametrize("method", METHODS)
def test_a_sequences_bits_do_not_depend_on_chunks_company_or_threads(method: str, folder: Path) -> None:
    own = stages(folder, method, "native", "kept")
    together = logits_by_plan(own, TEXTS, PLAN)
    for group in own:
        group.use_threads(3)
    in_steps = [logits_by_plan(own, {id: text}, {id: (1,) * len(text)}) for id, text in TEXTS.items()]
    assert torch.equal(together, torch.cat(in_steps))
