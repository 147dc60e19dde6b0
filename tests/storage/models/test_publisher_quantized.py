"""Quantized checkpoints are published as the weights that transformers makes of them, and run as it runs them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from functions.stage.models.packed_tensors import join_experts
from knative.__main__ import main
from knative.commands.model_choice import best_dtype
from storage.checkpoints import checkpoint as checkpoints
from storage.checkpoints.model_source import open_checkpoint
from storage.models.blocks import FORMATS, floats_of, packing_of, unpack
from storage.models.publisher import QuantizedSource, publish
from storage.models.q4 import dequantize
from storage.store.object_store import ObjectStore
from tests.functions.stage.models.test_fuzzed_configs import logits_of_stages, published_groups
from tests.storage.models.test_publisher_q4 import array, stored
from tests.support.storage import tiny_models
from tests.support.storage.torch_tensors import as_torch

Tensors = dict[str, torch.Tensor]
TOKENS = [5, 9, 33, 7, 100, 3, 8, 1, 20, 50, 60, 4, 17]


def save(folder: Path, family: str, tensors: Tensors, settings: object) -> Path:
    config = tiny_models.tiny_config(family) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def projections(family: str) -> tuple[Tensors, Tensors]:
    """The tensors of a tiny model: the matrices that a method quantizes, and all others."""
    tensors = tiny_models.checkpoint_tensors(tiny_models.whole_model(family))
    matrices = {name: each for name, each in tensors.items() if name.endswith("_proj.weight")}
    return matrices, {name: each for name, each in tensors.items() if name not in matrices}


def in_float8(folder: Path, family: str, tile: list[int] | None) -> Path:
    """float8 by the rule of transformers' FP8 quantizer: a scale for each tile, or for the matrix."""
    matrices, tensors = projections(family)
    for name, matrix in matrices.items():
        height, width = tile or matrix.shape
        tiles = matrix.view(len(matrix) // height, height, -1, width)
        scales = tiles.abs().amax((1, 3)) / 448
        tensors[name] = (tiles / scales[:, None, :, None]).view(matrix.shape).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale_inv")] = scales if tile else scales.view(())
    return save(folder, family, tensors, {"quant_method": "fp8", "weight_block_size": tile, "activation_scheme": "dynamic"})


def in_mxfp8(folder: Path) -> Path:
    """float8 with a power of two for each 32 inputs, stored as its exponent plus 127."""
    matrices, tensors = projections("llama")
    for name, matrix in matrices.items():
        groups = matrix.view(len(matrix), -1, 32)
        exponents = (groups.abs().amax(-1) / 448).log2().ceil()
        tensors[name] = (groups / exponents.exp2()[..., None]).view(matrix.shape).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale_inv")] = (exponents + 127).to(torch.uint8)
    return save(folder, "llama", tensors, {"quant_method": "mxfp8", "weight_block_size": [1, 32]})


def in_mxfp4(folder: Path) -> Path:
    """The experts of gpt-oss as random bytes, with scales from 2^-8 to 2^-2."""
    tensors = tiny_models.checkpoint_tensors(tiny_models.whole_model("gpt_oss"))
    dice = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = (experts, outputs, inputs // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8, generator=dice)
        tensors[f"{name}_scales"] = torch.randint(119, 126, blocks[:3], dtype=torch.uint8, generator=dice)
    return save(folder, "gpt_oss", tensors, {"quant_method": "mxfp4"})


MAKERS: dict[str, Callable[[Path], Path]] = {
    "fp8 by tiles": lambda folder: in_float8(folder, "qwen3", [16, 16]),
    "fp8 by matrix": lambda folder: in_float8(folder, "llama", None),
    "fp8 with experts": lambda folder: in_float8(folder, "qwen3_moe", [16, 16]),
    "mxfp4": in_mxfp4,
    "mxfp8": in_mxfp8,
}


def by_transformers(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("maker", MAKERS)
def test_published_weights_are_those_that_transformers_dequantizes(
    maker: str, dtype: str, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 5 * 32 * 4)  # rows that share a scale lie in several blocks
    (quantized := tmp_path / "quantized").mkdir()
    expected = by_transformers(MAKERS[maker](quantized), getattr(torch, dtype)).state_dict()
    manifest = publish(quantized, store, maker.replace(" ", "-"), dtype)
    tensors = dict(stored(store, manifest))
    join_experts(manifest.model_type, tensors)
    (plain := tmp_path / "plain").mkdir()
    (plain / "config.json").write_bytes(open_checkpoint(quantized).files["config.json"])
    save_file(as_torch(tensors), plain / "model.safetensors", {"format": "pt"})
    ours = by_transformers(plain, getattr(torch, dtype)).state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("maker", MAKERS)
def test_stages_give_the_logits_of_transformers(maker: str, tmp_path: Path) -> None:
    whole = by_transformers(MAKERS[maker](tmp_path), torch.float32)
    logits = logits_of_stages(published_groups(tmp_path, (0, 2, 4, 6)), TOKENS, 5)
    torch.testing.assert_close(torch.from_numpy(logits), tiny_models.all_logits(whole, TOKENS), atol=1e-4, rtol=1e-4)


def in_gptq(folder: Path) -> tuple[Path, Tensors]:
    """Symmetric four bits in groups of 32 inputs, packed as AutoGPTQ does (qlinear_cuda_old.py:123); and the weights of it."""
    matrices, tensors = projections("qwen2")
    weights: Tensors = {}
    for name, matrix in matrices.items():
        groups = matrix.view(len(matrix), -1, 32)
        scales = (groups.abs().amax(-1) / 7).half()
        quants = (groups / scales.float()[..., None]).round().clamp(-8, 7)
        weights[name] = (quants * scales.float()[..., None]).view(matrix.shape)
        prefix, inputs = name.removesuffix(".weight"), matrix.shape[1]
        codes = (quants + 8).view(matrix.shape).T.numpy().astype(np.uint32).reshape(inputs // 8, 8, -1)
        words = (codes << (4 * np.arange(8, dtype=np.uint32))[:, None]).sum(1, dtype=np.uint32).view(np.int32)
        tensors[f"{prefix}.qweight"] = torch.from_numpy(words).contiguous()
        tensors[f"{prefix}.qzeros"] = torch.full((inputs // 32, len(matrix) // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{prefix}.scales"] = scales.T.contiguous()
        tensors[f"{prefix}.g_idx"] = torch.arange(inputs, dtype=torch.int32) // 32
    return save(folder, "qwen2", tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}), weights


def test_four_bits_of_gptq_are_published_in_q4_without_loss(store: ObjectStore, tmp_path: Path) -> None:
    folder, weights = in_gptq(tmp_path)
    seen: list[QuantizedSource] = []
    tensors = stored(store, publish(folder, store, "gptq", "q4", on_quantized=seen.append))
    for name, expected in weights.items():
        assert np.array_equal(dequantize(array(tensors[name]), *expected.shape), expected.numpy()), name
    model = tiny_models.whole_model("qwen2")
    model.load_state_dict(weights, strict=False)
    logits = logits_of_stages(published_groups(folder, (0, 3, 6)), TOKENS, 5)
    torch.testing.assert_close(torch.from_numpy(logits), tiny_models.all_logits(model, TOKENS), atol=1e-4, rtol=1e-4)
    # Only embedding and head are rounded, to 8 bits.
    assert 0 < seen[0].largest_error < 0.002 * seen[0].largest_weight


def test_experts_of_gpt_oss_keep_their_blocks(store: ObjectStore, tmp_path: Path) -> None:
    folder = in_mxfp4(tmp_path)
    kept = stored(store, publish(folder, store, "blocks", "kept"))
    floats = stored(store, publish(folder, store, "floats", "float32"))
    matrices = [name.removesuffix("_format") for name in kept if ".experts." in name and name.endswith(".weight_format")]
    assert len(matrices) == 3 * 6 * open_checkpoint(folder).config["num_local_experts"]
    for name in matrices:
        packing = packing_of(kept[f"{name}_format"].data)
        form = FORMATS[packing.format]
        assert (form.name, packing.shape) == ("MXFP4", floats[name].shape)
        assert np.array_equal(floats_of(form, unpack(form, array(kept[name]), packing.shape[0])), array(floats[name])), name
    assert best_dtype(open_checkpoint(folder)) == "kept"
    planned = CliRunner().invoke(main, ["push", str(folder), "--dry-run"]).output
    assert re.search(r"mlp\.experts\.N\.gate_proj\.weight +\d+ +MXFP4 +MXFP4 ", planned)


def test_push_says_what_is_lost(tmp_path: Path) -> None:
    (folder := tmp_path / "gptq").mkdir()
    in_gptq(folder)

    def pushed(*options: str) -> str:
        return CliRunner().invoke(main, ["push", str(folder), "--state", str(tmp_path / "state"), *options]).output

    assert re.search(r"quantized with gptq in \d+\.\d KiB; as float32 nothing is lost\n", pushed("--dtype", "float32"))
    assert re.search(r"quantized with gptq in \d+\.\d KiB; as kept nothing is lost\n", pushed()), "the default"
    planned = pushed("--dry-run")
    assert "lost: nothing\n" in planned
    assert re.search(r"layers\.N\.mlp\.up_proj\.weight +6 +INT4_32 +INT4_32 ", planned)
    words = r"quantized with gptq in \S+ KiB; as bfloat16 the largest rounding error is (\S+), of weights up to (\S+)\n"
    found = re.search(words, pushed("--dtype", "bfloat16"))
    assert found
    error, weight = map(float, found.groups())
    assert weight / 2**11 < error <= weight / 2**8
