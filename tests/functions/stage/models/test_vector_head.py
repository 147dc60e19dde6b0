"""Embedders in C: attention in both directions in every dtype, with the same bits in any company."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from eventing.wire.events import Pooling
from functions.stage.models.build import build_layer_group
from functions.stage.models.layer_group import Segment
from functions.stage.models.native.group import NativeGroup
from functions.stage.models.vector_head import VectorHead
from storage.models.model_repository import read_file
from storage.store.object_reader import ObjectReader
from tests.support.storage.embedders import published_embedder, save_gemma_embedder
from tests.support.storage.storage import load_layers

TEXTS = [[1, *(7 * number % 250 + 5 for number in range(length))] for length in (90, 1, 33, 17, 64)]


def vectors(group: NativeGroup, head: VectorHead, texts: list[list[int]], threads: int) -> list[bytes]:
    """All texts in one pass."""
    group.use_threads(threads)
    segments = [Segment(group.kv.reserve(len(text)), 0, len(text)) for text in texts]
    hidden = group.forward(np.array([token for text in texts for token in text], np.int64), segments)
    found, begin = [], 0
    for segment in segments:
        found.append(head(hidden[begin : begin + segment.length], group.hidden_dtype, Pooling.MEAN).tobytes())
        begin += segment.length
        group.kv.release(segment.handle)
    return found


@pytest.mark.parametrize(("dtype", "alike"), [("float32", 1 - 1e-9), ("bfloat16", 0.999), ("int8", 0.998), ("q4", 0.9)])
def test_vectors_of_every_dtype(tmp_path: Path, dtype: str, alike: float) -> None:
    with published_embedder(tmp_path, save_gemma_embedder, dtype) as embedder:
        manifest = embedder.published.manifest
        assert manifest.embedder is not None
        assert (manifest.embedder.pooling, manifest.embedder.bidirectional, manifest.embedder.size) == ("mean", True, 24)
        reader = ObjectReader(embedder.published.store)
        config = msgspec.json.decode(read_file(reader, manifest, "config.json"))
        tensors = load_layers(reader, manifest, 0, manifest.num_layers)
        reader.close()
        head = VectorHead(config)
        head.place(tensors)
        head.finish()
        group = build_layer_group("native", config, tensors, 0, manifest.num_layers, dtype, "cpu", 2**22)
        assert isinstance(group, NativeGroup)
        together = vectors(group, head, TEXTS, 2)
        assert together == [vectors(group, head, [text], 1)[0] for text in TEXTS]
        for text, found in zip(TEXTS, together, strict=True):
            vector = torch.frombuffer(bytearray(found), dtype=torch.float32)
            assert torch.cosine_similarity(vector.double(), embedder.vector(text, "mean").double(), 0) > alike
