"""Stages with dtypes of their own, and hidden states in 8 bits.

Answers are those of the same layers chained in this process, with each row rounded between them as on the wire, one at a time
and many at once.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from eventing.wire.events import fingerprint_of
from functions.stage.models.floats import Array, HiddenDtype, narrowed, widened
from functions.stage.models.layer_group import LayerGroup, Segment
from storage.models.model_repository import Dtype, ModelManifest
from storage.models.publisher import publish
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from tests.support.functions.functions import FunctionProcess, running, running_gateway, running_stages, stage_environment
from tests.support.functions.stage_pipeline import engines, generate, published_group
from tests.support.functions.streams import tokens_of
from tests.support.storage.published import CUT, Published, published_model, until_end

PROMPTS: Final = ("The capital of France is", "12345", "x" * 40, "a river", "no", "winter", "the the", "north")
NEW_TOKENS: Final = 24


def told(published: Published) -> dict[str, str]:
    fingerprint = fingerprint_of([(published.manifest.dtype, published.manifest.digest)], CUT, "int8")
    return {"LAMINA_WIRE_DTYPE": "int8", "LAMINA_PIPELINE": fingerprint}


def through_8_bits(hidden: Array, dtype: HiddenDtype) -> Array:
    """As docs/reference.md says it, one row after the other."""
    given_back = []
    for row in widened(hidden, dtype):
        scale = np.float32(max(abs(row))) / np.float32(127)
        given_back.append([np.float32(round(float(number / scale))) * scale for number in row])
    return narrowed(np.array(given_back, np.float32), dtype)


class Chained:
    """The layer groups in this process."""

    def __init__(self, published: Published) -> None:
        reader = ObjectReader(published.store)
        self.groups: list[LayerGroup] = [published_group(reader, published.manifest, *layers) for layers in CUT]
        reader.close()

    def generate(self, prompt: list[int], cuts_in_8_bits: bool) -> list[int]:
        token_ids, new, position = list(prompt), list(prompt), 0
        handles = [group.kv.reserve(len(prompt) + NEW_TOKENS) for group in self.groups]
        while len(token_ids) < len(prompt) + NEW_TOKENS:
            hidden: Array = np.array(new, np.int64)
            for group, handle in zip(self.groups, handles, strict=True):
                if group is not self.groups[0] and cuts_in_8_bits:
                    hidden = through_8_bits(hidden, group.hidden_dtype)
                hidden = group.forward(hidden, [Segment(handle, position, len(new))])
            position = len(token_ids)
            new = [int(self.groups[-1].logits(hidden[-1:]).argmax())]
            token_ids += new
        for group, handle in zip(self.groups, handles, strict=True):
            group.kv.release(handle)
        return until_end(token_ids[len(prompt) :])


@pytest.fixture(scope="module", params=[pytest.param("bfloat16", marks=pytest.mark.wide), "int8"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    dtype: Dtype = request.param
    with published_model(tmp_path_factory.mktemp("models"), dtype) as made:
        yield made


def test_answers_are_those_of_layers_between_which_each_row_is_rounded(published: Published) -> None:
    chained = Chained(published)
    prompts = [published.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    expected = [chained.generate(prompt, cuts_in_8_bits=True) for prompt in prompts]
    exact = [chained.generate(prompt, cuts_in_8_bits=False) for prompt in prompts]
    assert expected != exact, "eight bits make no difference, so that nothing is told by this"
    more = told(published)
    with running_stages(published, **more) as stages, running_gateway(published, stages, **more) as gateway:
        assert [tokens_of(gateway.url, prompt, NEW_TOKENS) for prompt in PROMPTS[:2]] == expected[:2]
        with ThreadPoolExecutor(len(PROMPTS)) as clients:
            assert list(clients.map(lambda prompt: tokens_of(gateway.url, prompt, NEW_TOKENS), PROMPTS)) == expected


def test_a_stage_that_was_told_of_8_bits_is_of_another_pipeline(published: Published) -> None:
    with FunctionProcess(stage_environment(published, 1, LAMINA_WIRE_DTYPE="int8")) as stage:
        assert stage.wait_end() == 1
    assert f"is pipeline {told(published)['LAMINA_PIPELINE']}, and LAMINA_PIPELINE says" in stage.log


DTYPES: Final[tuple[Dtype, ...]] = ("bfloat16", "int8", "q4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Iterator[Published]:
    with published_model(folder, "bfloat16") as model:
        yield model


@pytest.fixture(scope="module")
def manifests(folder: Path, mixed: Published) -> list[ModelManifest]:
    """Of the same checkpoint in each of DTYPES."""
    return [publish(folder / "checkpoint", ObjectStore(mixed.store), "tiny", dtype) for dtype in DTYPES]


def named(weights: list[tuple[Dtype, str]]) -> str:
    return ",".join(f"{dtype}={digest}" for dtype, digest in weights)


def chained(mixed: Published, manifests: list[ModelManifest]) -> list[int]:
    """By layer groups of this process, each out of its own publication."""
    reader = ObjectReader(mixed.store)
    groups = [published_group(reader, manifest, *layers) for manifest, layers in zip(manifests, CUT, strict=True)]
    reader.close()
    with engines(groups) as stages:
        prompt = mixed.tokenizer.encode(PROMPTS[0]).ids
        return until_end(generate(stages, "id", prompt, NEW_TOKENS))


def test_each_stage_reads_and_computes_in_its_own_dtype(mixed: Published, manifests: list[ModelManifest]) -> None:
    weights = [(manifest.dtype, manifest.digest) for manifest in manifests]
    told = {"LAMINA_PIPELINE": fingerprint_of(weights, CUT), "LAMINA_WEIGHTS": named(weights)}
    environments = [stage_environment(mixed, group, **told, LAMINA_DTYPE=dtype) for group, dtype in enumerate(DTYPES)]
    with running(environments) as stages, running_gateway(mixed, stages, **told) as gateway:
        assert tokens_of(gateway.url, PROMPTS[0], NEW_TOKENS) == chained(mixed, manifests)


def test_a_stage_refuses_weights_that_are_not_its_own(mixed: Published, manifests: list[ModelManifest]) -> None:
    first, other, _ = (manifest.digest for manifest in manifests)
    weights: list[tuple[Dtype, str]] = [("bfloat16", first), ("int8", "0" * 64), ("int8", other)]
    told = {"LAMINA_PIPELINE": fingerprint_of(weights, CUT), "LAMINA_WEIGHTS": named(weights), "LAMINA_DTYPE": "int8"}
    with FunctionProcess(stage_environment(mixed, 1, **told)) as stage:
        assert stage.wait_end() == 1
    assert f"has the digest {other}, and LAMINA_WEIGHTS wants {'0' * 64} in int8 for layers 2 to 3" in stage.log


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_as_many_weights_as_groups(mixed: Published, groups: int) -> None:
    weights = named([("bfloat16", mixed.manifest.digest)] * groups)
    with FunctionProcess(stage_environment(mixed, 1, LAMINA_WEIGHTS=weights)) as stage:
        assert stage.wait_end() == 1
    assert f"LAMINA_WEIGHTS names {groups} groups and LAMINA_CUT has 3" in stage.log
