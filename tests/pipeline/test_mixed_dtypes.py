"""Stages that compute in dtypes of their own: one pipeline, its answers those of the same layers chained in this process."""

from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from eventing.wire.events import fingerprint_of
from storage.models.model_repository import ModelManifest
from storage.models.publisher import publish
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from tests.support.functions.functions import FunctionProcess, gateway_environment, stage_environment
from tests.support.functions.stage_pipeline import engines, generate, published_group
from tests.support.functions.streams import tokens_of
from tests.support.storage.published import CUT, Published, published_model, until_end

PROMPT: Final = "The capital of France is"
NEW_TOKENS: Final = 12
DTYPES: Final = ("bfloat16", "int8", "q4")


def chained(published: Published, manifests: list[ModelManifest]) -> list[int]:
    """By layer groups of this process, each out of its own publication."""
    reader = ObjectReader(published.store)
    groups = [published_group(reader, manifest, *layers) for manifest, layers in zip(manifests, CUT, strict=True)]
    reader.close()
    with engines(groups) as stages:
        prompt = published.tokenizer.encode(PROMPT).ids
        return until_end(generate(stages, "id", prompt, NEW_TOKENS))


def test_each_stage_reads_and_computes_in_its_own_dtype(tmp_path: Path) -> None:
    with published_model(tmp_path, "bfloat16") as published, ExitStack() as stack:
        store = ObjectStore(published.store)
        manifests = [publish(tmp_path / "checkpoint", store, "tiny", dtype) for dtype in DTYPES]
        weights = [(manifest.dtype, manifest.digest) for manifest in manifests]
        told = {
            "LAMINA_PIPELINE": fingerprint_of(weights, CUT),
            "LAMINA_WEIGHTS": ",".join(f"{dtype}={digest}" for dtype, digest in weights),
        }
        stages = [
            stack.enter_context(FunctionProcess(stage_environment(published, group, **told, LAMINA_DTYPE=dtype)))
            for group, dtype in enumerate(DTYPES)
        ]
        urls = [stage.wait_ready().url for stage in stages]
        gateway = stack.enter_context(FunctionProcess(gateway_environment(published, urls, **told)))
        assert tokens_of(gateway.wait_ready().url, PROMPT, NEW_TOKENS) == chained(published, manifests)


def test_a_stage_refuses_weights_that_are_not_its_own(tmp_path: Path) -> None:
    with published_model(tmp_path, "bfloat16") as published:
        other = publish(tmp_path / "checkpoint", ObjectStore(published.store), "tiny", "int8")
        weights = [("bfloat16", published.manifest.digest), ("int8", "0" * 64), ("int8", other.digest)]
        told = {
            "LAMINA_PIPELINE": fingerprint_of(weights, CUT),
            "LAMINA_WEIGHTS": ",".join(f"{dtype}={digest}" for dtype, digest in weights),
            "LAMINA_DTYPE": "int8",
        }
        with FunctionProcess(stage_environment(published, 1, **told)) as stage:
            assert stage.wait_end() == 1
        assert f"has the digest {other.digest}, and LAMINA_WEIGHTS wants {'0' * 64} in int8 for layers 2 to 3" in stage.log


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_as_many_weights_as_groups(tmp_path: Path, groups: int) -> None:
    with published_model(tmp_path, "bfloat16") as published:
        told = {"LAMINA_WEIGHTS": ",".join(["bfloat16=" + published.manifest.digest] * groups)}
        with FunctionProcess(stage_environment(published, 1, **told)) as stage:
            assert stage.wait_end() == 1
        assert f"LAMINA_WEIGHTS names {groups} groups and LAMINA_CUT has 3" in stage.log
