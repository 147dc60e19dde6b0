"""Sizing: memory, compute and pods that each stage of a cut needs, and what the network between pods costs.

Memory of a stage is explained in docs/scaling.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from eventing.wire.events import Cut, row_bytes
from functions.gateway.scheduling.batching import micro_batches_allowed, micro_batches_wanted
from functions.stage.models.checkpoints import STATES_PER_SEQUENCE, checkpoints_in
from knative.spec.cut import format_cut
from knative.spec.errors import SpecError
from knative.spec.model_shape import ModelShape
from knative.spec.pipeline_spec import StageSpec, quantity

SEQUENCE_TOKENS: Final = 4096  # length of the sequence that `plan` sizes the KV cache for
WEIGHTS_FACTOR: Final = 1.2  # layers are converted for the processor one by one, and the one in progress is held twice
OTHER_BYTES: Final = 2**30  # Python, torch if it is used, one forward pass


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The layers of one stage, and the memory, compute and network traffic that they need."""

    index: int
    first_layer: int
    last_layer: int
    weight_bytes: int
    compute: int  # multiply-adds per token
    compute_share: float
    kv_bytes_per_token: int
    hop_bytes_per_token: int  # hidden states that leave the stage; 0 for the last one, which sends a token
    state_bytes: int = 0  # of the recurrent states of a sequence
    adapter_bytes: int = 0  # of an adapter of rank 1

    @property
    def sequence_bytes(self) -> int:
        """Bytes of KV and recurrent states that a sequence of SEQUENCE_TOKENS tokens takes in this stage."""
        return SEQUENCE_TOKENS * self.kv_bytes_per_token + STATES_PER_SEQUENCE * self.state_bytes

    def kv_tokens(self, kv_cache_bytes: int) -> int | None:
        """Length of the longest sequence whose memory fits into `kv_cache`, or None for any length if the layers keep no KV.

        With recurrent layers, part of `kv_cache` is for checkpoints.
        """
        if not self.kv_bytes_per_token:
            return None
        states = checkpoints_in(kv_cache_bytes, self.state_bytes) + STATES_PER_SEQUENCE
        return max(0, kv_cache_bytes - states * self.state_bytes) // self.kv_bytes_per_token


def plan_stages(
    shape: ModelShape, cut: Cut, wire_dtype: str | None = None, kv_dtype: str | None = None
) -> tuple[StagePlan, ...]:
    """What each stage of the cut needs.

    wire_dtype: `int8` if hidden states travel in 8 bits; None: in the dtype of the computation. kv_dtype: the same for keys and
    values. Raises ValueError if the groups of the cut are not all layers of the model, each once and in order, and SpecError if
    stages cannot keep its keys and values in 8 bits.
    """
    if [layer for group in cut for layer in range(*group)] != list(range(shape.num_layers)) or any(a >= b for a, b in cut):
        raise ValueError(
            f"the cut {format_cut(cut)} does not have each of {shape.name}'s {shape.num_layers} layers once, in order"
        )
    total_compute = sum(shape.layer_compute) + shape.head_compute
    hop_bytes = row_bytes("I8", shape.row_size) if wire_dtype == "int8" else shape.row_size * shape.value_bytes
    plans = []
    for first, _ in cut:
        if first in shape.joined:
            raise SpecError(f"$.cut: no stage of {shape.name} can begin with layer {first}: {shape.joined[first]}")
    for index, (first, last) in enumerate(cut):
        weight_bytes = sum(shape.layer_bytes[first:last]) + shape.outer_bytes(first, last)
        is_last = last == shape.num_layers
        compute = sum(shape.layer_compute[first:last]) + (shape.head_compute if is_last else 0)
        plans.append(
            StagePlan(
                index=index,
                first_layer=first,
                last_layer=last,
                weight_bytes=weight_bytes,
                compute=compute,
                compute_share=compute / total_compute,
                kv_bytes_per_token=shape.kv_bytes(first, last, kv_dtype),
                hop_bytes_per_token=0 if is_last else hop_bytes,
                adapter_bytes=(last - first) * shape.adapter_values * shape.value_bytes,
                state_bytes=sum(layer.state_bytes(shape.value_bytes) for layer in shape.layer_sizes[first:last]),
            )
        )
    return tuple(plans)


def plan_mixed(
    shapes: Mapping[str, ModelShape],
    dtypes: Sequence[str],
    cut: Cut,
    wire_dtype: str | None = None,
    kv_dtype: str | None = None,
) -> tuple[StagePlan, ...]:
    """Like `plan_stages`, for stages that compute in different dtypes. shapes: by dtype. dtypes: one for each stage."""
    return tuple(plan_stages(shapes[dtype], cut, wire_dtype, kv_dtype)[index] for index, dtype in enumerate(dtypes))


def replicas_for(
    plans: tuple[StagePlan, ...], conversations: int, micro_batch: int, targets: Sequence[float], max_scales: Sequence[int]
) -> list[int]:
    """How many pods each stage has under this number of conversations, once the autoscaler has settled.

    micro_batch: most sequences in one. targets: for each stage, requests in flight for which the autoscaler wants one pod.
    max_scales: most pods of each stage. A micro-batch is at one stage at a time. Once every stage has the pods it needs, a
    stage's share of the micro-batches equals its share of the compute.
    """
    micro_batches = micro_batches_wanted(conversations, len(plans), micro_batch, allowed=conversations)
    wanted = [micro_batches * plan.compute_share / target for plan, target in zip(plans, targets, strict=True)]
    return [min(most, max(1, math.ceil(pods))) for pods, most in zip(wanted, max_scales, strict=True)]


def needed_bytes(stage: StageSpec, weight_bytes: int | None, adapter_bytes: int = 0) -> float:
    """Memory in bytes that a pod of the stage needs. If `weight_bytes` is None, weights are not counted.

    Experts beyond a weights budget do not count: they are in the page cache, which the kernel frees when memory is short.
    adapter_bytes: of all adapters that the stage keeps.
    """
    loaded: float = 0 if stage.layer_group == "sleep" else weight_bytes or 0
    if stage.weights_budget is not None:
        loaded = min(loaded, quantity(stage.weights_budget))
    return loaded * WEIGHTS_FACTOR + adapter_bytes + quantity(stage.kv_cache) + OTHER_BYTES


def check_memory(
    stages: Sequence[StageSpec], weight_bytes: Sequence[int | None], adapter_bytes: Sequence[int] | None = None
) -> None:
    """Raises SpecError for the first stage whose memory in the spec is less than it needs; the message shows the sum.

    weight_bytes: of each stage, None if unknown. adapter_bytes: as for `needed_bytes`; None: there are no adapters. Stages with
    a GPU are not checked: their weights and KV are in GPU memory, whose size a spec does not say.
    """
    for index, (stage, weights) in enumerate(zip(stages, weight_bytes, strict=True)):
        adapters = 0 if adapter_bytes is None else adapter_bytes[index]
        given, needed = quantity(stage.resources.memory), needed_bytes(stage, weights, adapters)
        if given < needed and not stage.resources.gpu:
            kept = f"adapters {_mib(adapters)}, " if adapters else ""
            known = "weights (size unknown here)" if weights is None else f"weights {_mib(weights)} × {WEIGHTS_FACTOR:g}"
            raise SpecError(
                f"$.stage.resources.memory: stage {index} has {stage.resources.memory} and needs {_mib(needed)}: {known}, "
                f"{kept}kv_cache {stage.kv_cache} and {_mib(OTHER_BYTES)} for the rest; raise it, lower kv_cache, "
                "or use more stages"
            )


def _mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


@dataclass(frozen=True, slots=True)
class Link:
    """The network between the gateway's pod and a stage's pod; both values hold for each direction."""

    delay_seconds: float
    bytes_per_second: float | None  # None: unlimited


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """Estimated throughput of decoding over a network. For prompts only bytes_per_token applies."""

    micro_batches: int  # in flight
    round_seconds: float
    tokens_per_second: float
    bytes_per_token: int  # hidden states on all links, per token of a prompt or an answer


def network_plan(
    plans: Sequence[StagePlan], step_seconds: Sequence[float], sequences: int, micro_batch: int, link: Link
) -> NetworkPlan:
    """Estimates throughput with one replica of each stage, with the formulas that the gateway uses.

    step_seconds: for each stage, duration of the forward pass of one micro-batch, whatever its size. sequences: how many decode
    at the same time. micro_batch: most sequences in one.

    The gateway sends each stage the hidden states of the stage before, and receives its own. A round takes as long as all
    forward passes and links, or as long as the slowest stage needs for all micro-batches.
    """

    def service_seconds(rows: float) -> list[float]:
        sent = [0, *(plan.hop_bytes_per_token for plan in plans[:-1])]
        carried = [(one + plan.hop_bytes_per_token) * rows for one, plan in zip(sent, plans, strict=True)]
        return [
            step + 2 * link.delay_seconds + (size / link.bytes_per_second if link.bytes_per_second else 0.0)
            for step, size in zip(step_seconds, carried, strict=True)
        ]

    allowed = micro_batches_allowed([1] * len(plans), service_seconds(1))
    count = micro_batches_wanted(sequences, len(plans), micro_batch, allowed)
    seconds = max(sum(service_seconds(sequences / count)), count * max(step_seconds))
    bytes_per_token = sum(2 * plan.hop_bytes_per_token for plan in plans)
    return NetworkPlan(count, seconds, sequences / seconds, bytes_per_token)
