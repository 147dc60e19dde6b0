"""A pipeline of layer groups, or of engines, in this process: what the stage tests drive."""

import functools
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import torch

from eventing.wire.control import ReserveRow
from eventing.wire.events import Batch, Row, Sampling, Status, Want
from functions.stage.engine.engine import Engine
from functions.stage.models.build import Kind, build_layer_group
from functions.stage.models.layer_group import LayerGroup, Segment
from storage.loading.weight_loader import RawTensor, iterate_layers
from storage.models.model_repository import ModelManifest, read_file
from storage.store.object_reader import ObjectReader
from tests.support.functions.borders import raw
from tests.support.storage import tiny_models

CUT = ((0, 2), (2, 3), (3, 6))


@functools.cache
def whole_model(name: str) -> Any:
    return tiny_models.whole_model(name)


@functools.cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a tiny model as they are published: with a matrix for each expert."""
    model = whole_model(name)
    return tiny_models.as_published(model.config.model_type, tiny_models.checkpoint_tensors(model))


def stage_tensors(name: str, first: int, last: int) -> dict[str, RawTensor]:
    """The tensors that a stage reads from the store."""
    return raw(tiny_models.stage_tensors(tensors(name), first, last))


def build_groups(
    name: str,
    cut: Sequence[tuple[int, int]] = CUT,
    kind: Kind = "transformers",
    dtype: str = "float32",
    kv_budget_bytes: int = 2**20,
) -> list[LayerGroup]:
    config = tiny_models.tiny_config(name)
    return [
        build_layer_group(kind, config, stage_tensors(name, first, last), first, last, dtype, "cpu", kv_budget_bytes)
        for first, last in cut
    ]


def published_group(reader: ObjectReader, manifest: ModelManifest, first: int, last: int) -> LayerGroup:
    """Layers [first, last) in C, out of their publication."""
    config = msgspec.json.decode(read_file(reader, manifest, "config.json"))
    tensors = {
        name: tensor for loaded in iterate_layers(reader, manifest, first, last) for name, tensor in loaded.tensors.items()
    }
    return build_layer_group("native", config, tensors, first, last, manifest.dtype, "cpu", 2**20)


class GroupPipeline:
    """One sequence through bare layer groups, under the position rule."""

    def __init__(self, groups: Sequence[LayerGroup], reserve_tokens: int = 64) -> None:
        self.groups = groups
        self.handles = [group.kv.reserve(reserve_tokens) for group in groups]

    def logits(self, token_ids: Sequence[int], position: int) -> torch.Tensor:
        """float32 [len(token_ids), vocab]"""
        states = ids = np.array(token_ids, np.int64)
        for group, handle in zip(self.groups, self.handles, strict=True):
            group.kv.truncate(handle, position)
            assert group.kv.length(handle) == position
            states = group.forward(states, [Segment(handle, position, len(token_ids), token_ids=ids)])
        return torch.from_numpy(self.groups[-1].logits(states))


@contextmanager
def engines(groups: Sequence[LayerGroup], **settings: Any) -> Iterator[list[Engine]]:
    """Started engines over the groups, stopped at the end."""
    defaults: dict[str, Any] = {"num_stages": len(groups), "max_merge": 8, "idle_sequence_seconds": 600.0}
    started = [Engine(group, **(defaults | settings)) for group in groups]
    for engine in started:
        engine.start()
    try:
        yield started
    finally:
        for engine in started:
            engine.stop(drain=False)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.001)


def reserved(engine: Engine, rows: Sequence[ReserveRow], *, source: str = "gateway") -> list[Status]:
    """The status of each row's reservation."""
    return [row.status for row in engine.reserve(rows, source=source)]


def batch(rows: Sequence[Row], token_ids: Sequence[int]) -> Batch:
    """A batch into the first stage."""
    return Batch(tuple(rows), memoryview(array("i", token_ids)))


def drawn(answer: Row) -> tuple[int, ...]:
    """The tokens of a row that was answered with some."""
    assert answer.status is Status.OK, answer
    assert answer.result is not None
    assert answer.result.tokens is not None
    return answer.result.tokens


def through(stages: Sequence[Engine], into: Batch, source: str = "gateway") -> Batch:
    """The last stage's reply; stops early if no row is ok."""
    for engine in stages:
        into = engine.handle(into, source=source)
        if all(row.status is not Status.OK for row in into.rows):
            break
    return into


def generate(
    stages: Sequence[Engine],
    id_: str,
    prompt: Sequence[int],
    new_tokens: int,
    *,
    attempt: int = 0,
    chunk: int = 256,
    held: int = 0,
    sampling: Sampling | None = None,
    source: str = "gateway",
) -> list[int]:
    """Generates as the gateway would. The sequence stays. held: tokens of the prompt that the stages hold already."""
    token_ids = list(prompt)
    position = held
    while len(token_ids) < len(prompt) + new_tokens:
        new = token_ids[position : position + chunk]
        is_end = position + len(new) == len(token_ids)
        reserve = len(prompt) + new_tokens if position == 0 else None
        want = Want.TOKEN if is_end else Want.NONE
        row = Row(id_, attempt, position, len(new), want, sampling if is_end else None, reserve)
        (answer,) = through(stages, batch([row], new), source).rows
        assert answer.status is Status.OK, answer
        position += len(new)
        if answer.result is not None and answer.result.tokens is not None:
            token_ids.extend(answer.result.tokens)
    return token_ids[len(prompt) :]
