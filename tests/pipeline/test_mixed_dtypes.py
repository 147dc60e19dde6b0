"""Stages that compute in dtypes of their own: one pipeline, its answers those of the same layers chained in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from eventing.wire.events import fingerprint_of
from storage.models.model_repository import Dtype, ModelManifest
from storage.models.publisher import publish
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from tests.support.functions.functions import FunctionProcess, gateway_environment, running, stage_environment
from tests.support.functions.stage_pipeline import engines, generate, published_group
from tests.support.functions.streams import tokens_of
from tests.support.storage.published import CUT, Published, published_model, until_end

PROMPT: Final = "The capital of France is"
NEW_TOKENS: Final = 12
DTYPES: Final[tuple[Dtype, ...]] = ("bfloat16", "int8", "q4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def published(folder: Path) -> Iterator[Published]:
    with published_model(folder, "bfloat16") as model:
        yield model


@pytest.fixture(scope="module")
def manifests(folder: Path, published: Published) -> list[ModelManifest]:
    """Of the same checkpoint in each of DTYPES."""
    return [publish(folder / "checkpoint", ObjectStore(published.store), "tiny", dtype) for dtype in DTYPES]


def named(weights: list[tuple[Dtype, str]]) -> str:
    return ",".join(f"{dtype}={digest}" for dtype, digest in weights)


def chained(published: Published, manifests: list[ModelManifest]) -> list[int]:
    """By layer groups of this process, each out of its own publication."""
    reader = ObjectReader(published.store)
    groups = [published_group(reader, manifest, *layers) for manifest, layers in zip(manifests, CUT, strict=True)]
    reader.close()
    with engines(groups) as stages:
        prompt = published.tokenizer.encode(PROMPT).ids
        return until_end(generate(stages, "id", prompt, NEW_TOKENS))


def test_each_stage_reads_and_computes_in_its_own_dtype(published: Published, manifests: list[ModelManifest]) -> None:
    weights = [(manifest.dtype, manifest.digest) for manifest in manifests]
    told = {"LAMINA_PIPELINE": fingerprint_of(weights, CUT), "LAMINA_WEIGHTS": named(weights)}
    environments = [stage_environment(published, group, **told, LAMINA_DTYPE=dtype) for group, dtype in enumerate(DTYPES)]
    with (
        running(environments) as stages,
        running([gateway_environment(published, [stage.url for stage in stages], **told)]) as (gateway,),
    ):
        assert tokens_of(gateway.url, PROMPT, NEW_TOKENS) == chained(published, manifests)


def test_a_stage_refuses_weights_that_are_not_its_own(published: Published, manifests: list[ModelManifest]) -> None:
    first, other, _ = (manifest.digest for manifest in manifests)
    weights: list[tuple[Dtype, str]] = [("bfloat16", first), ("int8", "0" * 64), ("int8", other)]
    told = {"LAMINA_PIPELINE": fingerprint_of(weights, CUT), "LAMINA_WEIGHTS": named(weights), "LAMINA_DTYPE": "int8"}
    with FunctionProcess(stage_environment(published, 1, **told)) as stage:
        assert stage.wait_end() == 1
    assert f"has the digest {other}, and LAMINA_WEIGHTS wants {'0' * 64} in int8 for layers 2 to 3" in stage.log


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_as_many_weights_as_groups(published: Published, groups: int) -> None:
    weights = named([("bfloat16", published.manifest.digest)] * groups)
    with FunctionProcess(stage_environment(published, 1, LAMINA_WEIGHTS=weights)) as stage:
        assert stage.wait_end() == 1
    assert f"LAMINA_WEIGHTS names {groups} groups and LAMINA_CUT has 3" in stage.log
