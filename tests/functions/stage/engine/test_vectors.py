"""Texts that attend both ways are whole in a pass, however many come at once; what else an embedder is asked is refused."""

from pathlib import Path

import msgspec
import pytest

from eventing.wire.events import Pooling, Row, Status, Want
from functions.stage.models.build import build_layer_group
from functions.stage.models.vector_head import VectorHead
from storage.models.model_repository import read_file
from storage.store.object_reader import ObjectReader
from tests.support.functions.stage_pipeline import batch, engines, through
from tests.support.storage.embedders import published_embedder, save_gemma_embedder
from tests.support.storage.storage import load_layers

TOKENS = 100


@pytest.mark.slow
def test_an_embedder_computes_whole_texts(tmp_path: Path) -> None:
    with published_embedder(tmp_path, save_gemma_embedder) as embedder:
        manifest = embedder.published.manifest
        reader = ObjectReader(embedder.published.store)
        config = msgspec.json.decode(read_file(reader, manifest, "config.json"))
        tensors = load_layers(reader, manifest, 0, manifest.num_layers)
        reader.close()
    head = VectorHead(config)
    head.place(tensors)
    group = build_layer_group("native", config, tensors, 0, manifest.num_layers, "float32", "cpu", 2**24)
    texts = [[(number * 13 + place * 7) % 250 + 5 for place in range(TOKENS)] for number in range(24)]
    wanted = {"want": Want.VECTOR, "pooling": Pooling.MEAN, "reserve_tokens": TOKENS}
    with engines([group], vector_head=head) as stages:
        rows = [Row(f"together-{number}", 0, 0, TOKENS, **wanted) for number in range(len(texts))]
        together = through(stages, batch(rows, [token for text in texts for token in text])).rows
        for number, text in enumerate(texts):
            (alone,) = through(stages, batch([Row(f"alone-{number}", 0, 0, TOKENS, **wanted)], text)).rows
            assert alone.status is together[number].status is Status.OK
            assert alone.result == together[number].result
        for refused in (
            Row("parts", 0, 0, 50, Want.NONE, following=50, reserve_tokens=TOKENS),
            Row("token", 0, 0, 50, Want.TOKEN, reserve_tokens=TOKENS),
            Row("unpooled", 0, 0, 50, Want.VECTOR, reserve_tokens=TOKENS),
        ):
            (row,) = through(stages, batch([refused], texts[0][:50])).rows
            assert row.status is Status.INVALID, refused
