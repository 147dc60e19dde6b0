"""Publishing a GGUF file as it is: every matrix keeps its blocks, embedding and head included; tied ones are stored once."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from storage.checkpoints import checkpoint as checkpoints
from storage.checkpoints.model_source import open_checkpoint
from storage.errors import CheckpointInvalid
from storage.models.blocks import FORMATS, floats_of, packing_of, unpack
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore
from tests.storage.checkpoints.test_gguf_families import write_gguf
from tests.storage.models.test_publisher_q4 import array, floats, stored
from tests.support.functions.block_models import MIXED, SIZES, block_model
from tests.support.storage import tiny_models
from tests.support.storage.random_blocks import IN_FILES
from tests.support.storage.storage import default_model_gguf


@pytest.mark.sampled
@pytest.mark.parametrize("name", [*IN_FILES, MIXED])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_published_gguf_has_the_weights_of_the_file(
    family: str, name: str, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of a few groups of rows, so that rows which rotation parts lie in several."""
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 48 * 256 * 4)
    assert_lossless(block_model(tmp_path / "tiny.gguf", family, name), store)


def test_experts_keep_their_blocks(store: ObjectStore, tmp_path: Path) -> None:
    assert_lossless(block_model(tmp_path / "tiny.gguf", "qwen3_moe", MIXED), store)


@pytest.mark.wide
def test_the_default_model_is_published_as_it_is(store: ObjectStore) -> None:
    assert_lossless(default_model_gguf(), store)


def assert_lossless(path: Path, store: ObjectStore) -> None:
    """Every tensor has the numbers that gguf itself makes of the file, and few bytes more than there."""
    manifest, checkpoint = publish(path, store, "tiny", "kept"), open_checkpoint(path)
    tensors = stored(store, manifest)
    for name, source in checkpoint.tensors.items():
        if len(source.shape) == 2 and not name.endswith("mlp.gate.weight"):  # a router's
            packing = packing_of(tensors[f"{name}_format"].data)
            assert (packing.format, packing.shape) == (source.stored_as, source.shape)
            form = FORMATS[packing.format]
            found = floats_of(form, unpack(form, array(tensors[name]), source.shape[0]))
        else:
            found = array(tensors[name])
        assert np.array_equal(found, floats(checkpoint, name)), name
    assert {name.removesuffix("_format") for name in tensors} == checkpoint.tensors.keys()
    published = sum(each.bytes for each in manifest.objects.values())
    # Headers of objects are small beside tensors of models that are not tiny.
    headers = sum(min(span.start for span in each.tensors.values()) for each in manifest.objects.values())
    assert published - headers <= 1.1 * path.stat().st_size


def test_formats_that_no_kernel_reads_become_bfloat16(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", kind_of=lambda name: Kind.TQ2_0 if "down" in name else Kind.Q8_0, **SIZES)
    tensors, checkpoint = stored(store, publish(path, store, "widened", "kept")), open_checkpoint(path)
    name = "model.layers.1.mlp.down_proj.weight"
    assert tensors[name].dtype == "BF16"
    wide = (np.frombuffer(tensors[name].data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(256, 512)
    assert np.allclose(wide, floats(checkpoint, name), rtol=2**-8)
    assert "6 of 44 matrices are in TQ2_0, which become bfloat16" in caplog.text


def test_a_checkpoint_without_blocks_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    tiny_models.whole_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointInvalid, match="has no quantized matrix"):
        publish(tmp_path, store, "floats", "kept")
