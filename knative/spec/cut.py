"""Where to cut a model: N groups of consecutive layers, none heavier than it must be.

A group's weight is the larger of its share of all bytes (what it loads and holds) and its share of all compute (what it
does for a token). Embedding and head belong to the first and last group, and are heavy in small models. The cut is exact:
no other cut has a lighter heaviest group, and among those that tie the most even one is taken.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from eventing.wire.events import Cut
from functions.gateway.scheduling.capacity import micro_batches_wanted
from knative.spec.model_shape import ModelShape

SEQUENCE_TOKENS: Final = 4096
"""The sequence that `plan` sizes the KV cache for."""

_TOLERANCE: Final = 1e-12


class TooManyStages(ValueError):
    """More stages than layers: some would have nothing to do."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one stage will need."""

    index: int
    first_layer: int
    last_layer: int
    weight_bytes: int
    compute: int
    """Multiply-adds per token."""
    compute_share: float
    kv_bytes_per_token: int
    hop_bytes_per_token: int
    """Hidden states that leave the stage; 0 behind the last one, which sends a token."""

    @property
    def kv_bytes_per_sequence(self) -> int:
        """For 4,096 tokens."""
        return self.kv_bytes_per_token * SEQUENCE_TOKENS


def cut_evenly(shape: ModelShape, stages: int) -> Cut:
    """Layer groups [first, last). Raises TooManyStages, or ValueError for fewer than one."""
    layers = shape.num_layers
    if stages < 1:
        raise ValueError(f"{stages} stages wanted; a pipeline has at least one")
    if stages > layers:
        raise TooManyStages(f"{stages} stages wanted, but {shape.name} has {layers} layers; ask for at most {layers} stages")
    weight = _group_weight(shape)
    heaviest = _partition(layers, stages, weight, max)[0]

    def evenness(first: int, last: int) -> float:
        group = weight(first, last)
        return group * group if group <= heaviest + _TOLERANCE else math.inf

    bounds = _partition(layers, stages, evenness, lambda a, b: a + b)[1]
    return tuple(pairwise(bounds))


def plan_stages(shape: ModelShape, cut: Cut) -> tuple[StagePlan, ...]:
    """Raises ValueError where the cut does not cover exactly the model's layers."""
    if not cut or cut[-1][1] != shape.num_layers:
        raise ValueError(f"the cut ends at layer {cut[-1][1] if cut else 0}, but {shape.name} has {shape.num_layers} layers")
    total = sum(shape.layer_compute) + shape.head_compute
    return tuple(_stage_plan(shape, index, group, total) for index, group in enumerate(cut))


def replicas_for(
    plans: tuple[StagePlan, ...], conversations: int, micro_batch: int, target: float, max_scale: int
) -> list[int]:
    """Pods that N conversations ask of each stage, once the autoscaler has settled.

    A micro-batch is at one stage at a time. Once every stage has the pods it needs, a stage holds the share of the
    micro-batches that it has of a round's compute, and the autoscaler wants one pod for each `target` of them.
    """
    micro_batches = micro_batches_wanted(conversations, len(plans), micro_batch, allowed=conversations)
    return [min(max_scale, max(1, math.ceil(micro_batches * plan.compute_share / target))) for plan in plans]


def _stage_plan(shape: ModelShape, index: int, group: tuple[int, int], total_compute: int) -> StagePlan:
    first, last = group
    is_last = last == shape.num_layers
    compute = sum(shape.layer_compute[first:last]) + (shape.head_compute if is_last else 0)
    weight_bytes = sum(shape.layer_bytes[first:last])
    weight_bytes += shape.embedding_bytes if first == 0 else 0
    weight_bytes += shape.head_bytes if is_last else 0
    return StagePlan(
        index=index,
        first_layer=first,
        last_layer=last,
        weight_bytes=weight_bytes,
        compute=compute,
        compute_share=compute / total_compute,
        kv_bytes_per_token=(last - first) * shape.kv_values_per_layer * shape.value_bytes,
        hop_bytes_per_token=0 if is_last else shape.hidden_size * shape.value_bytes,
    )


def _group_weight(shape: ModelShape) -> Callable[[int, int], float]:
    size = list(accumulate(shape.layer_bytes, initial=0))
    work = list(accumulate(shape.layer_compute, initial=0))
    total_size = size[-1] + shape.embedding_bytes + shape.head_bytes
    total_work = work[-1] + shape.head_compute

    def weight(first: int, last: int) -> float:
        is_last = last == shape.num_layers
        group_size = size[last] - size[first]
        group_size += shape.embedding_bytes if first == 0 else 0
        group_size += shape.head_bytes if is_last else 0
        group_work = work[last] - work[first] + (shape.head_compute if is_last else 0)
        return max(group_size / total_size, group_work / total_work)

    return weight


def _partition(
    layers: int, stages: int, weight: Callable[[int, int], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The cheapest way to split `layers` into `stages`, by dynamic programming: its cost, and the bounds 0 … layers."""
    best: list[tuple[float, tuple[int, ...]]] = [
        (weight(0, last), (0, last)) if last else (math.inf, ()) for last in range(layers + 1)
    ]
    for stage in range(2, stages + 1):
        best = [_cheapest(best, last, stage, weight, join) for last in range(layers + 1)]
    return best[layers]


def _cheapest(
    best: list[tuple[float, tuple[int, ...]]],
    last: int,
    stage: int,
    weight: Callable[[int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    if last < stage:
        return math.inf, ()
    return min((join(best[first][0], weight(first, last)), (*best[first][1], last)) for first in range(stage - 1, last))
