"""Publishing in four bits: those of a GGUF file are stored unchanged, others are rounded by least squares or refused."""

import json
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from storage.checkpoints import checkpoint as checkpoints
from storage.checkpoints.checkpoint import Checkpoint
from storage.checkpoints.model_source import open_checkpoint
from storage.errors import ArchitectureUnsupported, CheckpointInvalid
from storage.loading.weight_loader import RawTensor
from storage.models.blocks import FORMATS, floats_of, unpack
from storage.models.checks import is_layer_matrix
from storage.models.model_repository import ModelManifest
from storage.models.publisher import publish
from storage.models.q4 import dequantize
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from tests.storage.checkpoints.test_gguf_families import write_gguf
from tests.support.storage import tiny_models
from tests.support.storage.storage import default_model_gguf, load_layers

Array = np.ndarray[Any, Any]
NUMPY: Final = {"F32": np.float32, "U8": np.uint8}
OUTER: Final = ("model.embed_tokens.weight", "lm_head.weight")


def stored(store: ObjectStore, manifest: ModelManifest) -> dict[str, RawTensor]:
    with ObjectReader(store.settings) as reader:
        return load_layers(reader, manifest, 0, manifest.num_layers)


def array(raw: RawTensor) -> Array:
    return np.frombuffer(raw.data, NUMPY[raw.dtype]).reshape(raw.shape)


def floats(checkpoint: Checkpoint, name: str) -> Array:
    source = checkpoint.tensors[name]
    return np.concatenate([np.frombuffer(block, np.float32) for block in source.blocks()]).reshape(source.shape)


def assert_lossless(tensors: dict[str, RawTensor], checkpoint: Checkpoint) -> None:
    """Every number is the one that gguf itself makes of the file, to the bit; and everything has its dtype."""
    for name, source in checkpoint.tensors.items():
        weights = floats(checkpoint, name)
        if is_layer_matrix(name, source.shape):
            assert np.array_equal(dequantize(array(tensors[name]), *source.shape), weights), name
        elif name in OUTER:
            form = FORMATS[str(source.stored_as)]
            assert np.array_equal(floats_of(form, unpack(form, array(tensors[name]), len(weights))), weights), name
        else:
            assert np.array_equal(array(tensors[name]), weights), name
    assert {name.removesuffix("_format") for name in tensors} == checkpoint.tensors.keys()


@pytest.mark.wide
def test_the_default_model_is_stored_without_loss(store: ObjectStore) -> None:
    manifest = publish(default_model_gguf(), store, "default", "q4")
    assert_lossless(stored(store, manifest), open_checkpoint(default_model_gguf()))
    layer = manifest.objects["layer-00000"]
    matrices = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536
    assert layer.bytes == pytest.approx(matrices * 5 / 8 + 2 * 576 * 4, rel=0.01)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_gguf_in_four_bits_is_stored_without_loss(
    family: str, kind: Kind, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of one group of rows, so that rows which rotation parts lie in several."""
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 16 * 32 * 4)
    path = write_gguf(tmp_path / "tiny.gguf", family, kind_of=lambda name: kind)
    manifest = publish(path, store, f"{family}-{kind.name.lower()}", "q4")
    assert_lossless(stored(store, manifest), open_checkpoint(path))


def mixed(name: str) -> Kind:
    return Kind.Q8_0 if "down_proj" in name or "embed" in name else Kind.Q4_1


def test_matrices_of_other_types_are_quantized_anew(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "mixed.gguf", "llama", kind_of=mixed)
    tensors, checkpoint = stored(store, publish(path, store, "mixed", "q4")), open_checkpoint(path)
    kept, anew = "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"
    assert np.array_equal(dequantize(array(tensors[kept]), 64, 32), floats(checkpoint, kept))
    weights = floats(checkpoint, anew)
    error = dequantize(array(tensors[anew]), 32, 64) - weights
    assert 0 < np.abs(error).max() < (weights.max() - weights.min()) / 15
    assert "6 of 42 matrices are not in four bits (Q4_0 or Q4_1)" in caplog.text


def test_least_squares_round_floats_better_than_minimum_and_maximum(store: ObjectStore, tmp_path: Path) -> None:
    """GGUF's own Q4_1 lets the smallest and the largest weight of a block be 0 and 15."""
    model = tiny_models.whole_model("llama_tied")
    model.save_pretrained(tmp_path)
    tensors = stored(store, publish(tmp_path, store, "floats", "q4"))
    ours = theirs = 0.0
    for name, tensor in tiny_models.checkpoint_tensors(model).items():
        if is_layer_matrix(name, tuple(tensor.shape)):
            weights = tensor.numpy()
            by_ends = gguf.quants.dequantize(gguf.quants.quantize(weights, Kind.Q4_1), Kind.Q4_1)
            ours += float(np.square(dequantize(array(tensors[name]), *weights.shape) - weights).sum())
            theirs += float(np.square(by_ends - weights).sum())
    assert ours < 0.9 * theirs
    form, embedding = FORMATS["Q8_0"], model.get_input_embeddings().weight.detach().numpy()
    stored_embedding = floats_of(form, unpack(form, array(tensors["model.embed_tokens.weight"]), len(embedding)))
    by_gguf = gguf.quants.dequantize(gguf.quants.quantize(embedding, Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_allclose(stored_embedding, by_gguf, atol=np.abs(embedding).max() / 200)
    assert not [name for name in tensors if "lm_head" in name]


@pytest.mark.parametrize("family", ["gptj", "bloom", "falcon"])
def test_q4_is_refused_where_no_stage_would_run_it(family: str, store: ObjectStore, tmp_path: Path) -> None:
    tiny_models.whole_model(family).save_pretrained(tmp_path)
    with pytest.raises(ArchitectureUnsupported, match=f"no stage would run it in q4: .*'{family}'"):
        publish(tmp_path, store, f"{family}-q4", "q4")
    assert list(store.list(f"models/{family}-q4/")) == []


@pytest.mark.parametrize(("head_dim", "words"), [(7, "head_dim 7"), (1026, "heads of at most 1024 numbers, this model's 1026")])
def test_q4_is_refused_for_heads_that_c_does_not_take(head_dim: int, words: str, store: ObjectStore, tmp_path: Path) -> None:
    tiny_models.whole_model("llama", head_dim=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": head_dim}))
    with pytest.raises(ArchitectureUnsupported, match=f"no stage would run it in q4: .*{words}.*; publish it as bfloat16"):
        publish(tmp_path, store, "heads", "q4")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_numbers_that_four_bits_cannot_hold_are_refused(bad: float, store: ObjectStore, tmp_path: Path) -> None:
    model = tiny_models.whole_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight")[40, 3] = bad
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointInvalid, match=r"2.mlp.up_proj.weight' has values that are infinite or no numbers, or beyond"):
        publish(tmp_path, store, "bad", "q4")
