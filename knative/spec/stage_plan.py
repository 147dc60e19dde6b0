"""What each stage of a cut will need: memory, its share of the compute, and the pods that conversations will ask for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from eventing.wire.events import Cut, row_bytes
from functions.gateway.scheduling.capacity import micro_batches_wanted
from knative.spec.model_shape import ModelShape

SEQUENCE_TOKENS: Final = 4096
"""The sequence that `plan` sizes the KV cache for."""


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


def plan_stages(shape: ModelShape, cut: Cut, wire_dtype: str | None = None) -> tuple[StagePlan, ...]:
    """wire_dtype: int8 where hidden states travel in 8 bits.

    Raises ValueError where the cut does not cover exactly the model's layers.
    """
    if not cut or cut[-1][1] != shape.num_layers:
        raise ValueError(f"the cut ends at layer {cut[-1][1] if cut else 0}, but {shape.name} has {shape.num_layers} layers")
    total = sum(shape.layer_compute) + shape.head_compute
    hidden = shape.hidden_size
    hop_bytes = row_bytes("I8", hidden) if wire_dtype == "int8" else hidden * shape.value_bytes
    return tuple(_stage_plan(shape, index, group, total, hop_bytes) for index, group in enumerate(cut))


def plan_mixed(
    shapes: Mapping[str, ModelShape], dtypes: Sequence[str], cut: Cut, wire_dtype: str | None = None
) -> tuple[StagePlan, ...]:
    """The same of stages that compute in dtypes of their own; shapes: of the model by its dtype. Raises ValueError."""
    return tuple(plan_stages(shapes[dtype], cut, wire_dtype)[index] for index, dtype in enumerate(dtypes))


def replicas_for(
    plans: tuple[StagePlan, ...], conversations: int, micro_batch: int, targets: Sequence[float], max_scales: Sequence[int]
) -> list[int]:
    """Pods that N conversations ask of each stage, once the autoscaler has settled.

    A micro-batch is at one stage at a time. Once every stage has the pods it needs, a stage holds the share of the
    micro-batches that it has of a round's compute, and the autoscaler wants one pod for each `target` of them. targets
    and max_scales are per stage.
    """
    micro_batches = micro_batches_wanted(conversations, len(plans), micro_batch, allowed=conversations)
    wanted = [micro_batches * plan.compute_share / target for plan, target in zip(plans, targets, strict=True)]
    return [min(most, max(1, math.ceil(pods))) for pods, most in zip(wanted, max_scales, strict=True)]


def _stage_plan(shape: ModelShape, index: int, group: tuple[int, int], total_compute: int, hop_bytes: int) -> StagePlan:
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
        hop_bytes_per_token=0 if is_last else hop_bytes,
    )
