"""A model on a kind of device, and the ways to serve it as specs, for emulated and for simulated runs."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from bench.evaluation.outcome import MOST_FIRST_TOKEN_SECONDS, MOST_TOKEN_SECONDS
from bench.evaluation.profile import Device, Profile, kv_tokens_beside, read_device, roofline
from bench.pipeline import ALWAYS_ONE, local_spec
from eventing.wire.events import Cut
from functions.configuration.pass_times import PassTimes
from knative.local.platform import ROOT
from knative.spec.cut import cut_evenly, format_cut
from knative.spec.model_shape import ModelShape, shape_from_config
from knative.spec.pipeline_spec import PipelineSpec
from knative.spec.sizing import StagePlan, plan_stages

WAYS: Final = ("one static copy", "replicas, KPA", "static pipeline", "pipeline, HPA", "pipeline, KPA", "pipeline, objective")
COPY, REPLICAS, STATIC, HPA, KPA, OBJECTIVE = WAYS
_LITTLE_KV: Final = 500  # tokens of a row
_HOP_SECONDS: Final = 0.002
_QUEUE_LIMIT: Final = 1024  # of the gateway: the arrivals of two seconds at a hundred times the trace
_LEAST_CHUNK_TOKENS: Final = 256
_MERGED_TOKENS: Final = 512  # in one pass: functions/stage/engine/event_queue.py
_SHORT_SECONDS: Final = 1e-9  # instead of none
_OTHER_BYTES: Final = 2**30
_HERE: Final = Path(__file__).parent


class OverBudget(ValueError):
    """There are fewer devices than stages. Give more devices, or cut into fewer stages."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model, one kind of device, and a budget of them."""

    model: str
    config: dict[str, object]  # the model's config.json
    device_name: str
    stages: int  # of the ways that cut
    devices: int
    micro_batch_sequences: int = 16
    weights_bytes_per_second: float = 3.125e9  # into a pod that starts: 25 Gbit/s
    dtype: str = "bfloat16"
    measured: Profile | None = None  # instead of a profile from the device's published figures
    memory_bytes: float | None = None  # of a device; None: as published
    slowness: float = 1.0  # factor of the objective's seconds, for devices whose passes take so many times as long

    def __post_init__(self) -> None:
        """Raises OverBudget."""
        if self.devices < self.stages:
            raise OverBudget(f"{self.devices} devices for {self.stages} stages: each stage needs one; add devices or cut less")

    @cached_property
    def device(self) -> Device:
        return read_device(self.device_name)

    @cached_property
    def shape(self) -> ModelShape:
        return shape_from_config(self.config, self.model, self.dtype)

    @cached_property
    def profile(self) -> Profile:
        return self.measured or roofline(self.shape, self.device, self.device_name)

    @property
    def context_tokens(self) -> int:
        return int(str(self.config["max_position_embeddings"]))

    def cut(self, way: str) -> Cut:
        return self._even_cut if way not in (COPY, REPLICAS) else ((0, self.shape.num_layers),)

    @cached_property
    def _even_cut(self) -> Cut:
        """Cached: for many stages the planner takes longer than a simulation."""
        return cut_evenly(self.shape, self.stages)

    def plans(self, way: str) -> tuple[StagePlan, ...]:
        return plan_stages(self.shape, self.cut(way))

    def pass_times(self, way: str) -> list[PassTimes]:
        return [self.profile.of_stage(first, last, self.shape.num_layers) for first, last in self.cut(way)]

    def chunk_tokens(self, way: str) -> int:
        """Tokens of a prompt's chunk: twice as many as arithmetic computes while a pass reads its weights.

        Not fewer than the gateway's default, and with a decode step no more than a pass merges.
        """
        balanced = min(times.stream_seconds / max(times.token_seconds, _SHORT_SECONDS) for times in self.pass_times(way))
        return round(max(_LEAST_CHUNK_TOKENS, min(_MERGED_TOKENS - self.micro_batch_sequences, 2 * balanced)))

    def kv_tokens(self, way: str) -> int:
        """Tokens that a pod of every stage can hold. Raises DoesNotFit."""
        return min(
            kv_tokens_beside(
                plan.weight_bytes,
                plan.kv_bytes_per_token,
                self.memory_bytes or self.device.memory_bytes,
                self.context_tokens,
                f"{way}, stage {plan.index} of {self.model} on {self.device_name}",
            )
            for plan in self.plans(way)
        )

    def replicas(self, way: str) -> int:
        """Upper bound for each stage."""
        return 1 if way == COPY else self.devices // len(self.cut(way))

    def spec(self, way: str) -> PipelineSpec:
        """Raises DoesNotFit."""
        kv_bytes = self.kv_tokens(way) * max(plan.kv_bytes_per_token for plan in self.plans(way))
        most = self.replicas(way)
        autoscaling: dict[str, object] = {"min_scale": most, "max_scale": most}
        if way in (REPLICAS, KPA, OBJECTIVE):
            autoscaling = {"max_scale": most}
        elif way == HPA:
            autoscaling = {"class": "hpa", "min_scale": 1, "max_scale": most}
        return local_spec(
            "evaluation",
            objective=self._objective(way) if way == OBJECTIVE else None,
            model={"name": self.model, "dtype": self.dtype},
            cut=format_cut(self.cut(way)),
            stage={
                "resources": {"cpu": "1", "memory": f"{math.ceil((kv_bytes + _OTHER_BYTES) / 2**20)}Mi"},
                "kv_cache": str(kv_bytes),
                "layer_group": "sleep",
                "sleep_pass_times": self.pass_times(way),
                "sleep_bytes_per_second": int(self.weights_bytes_per_second),
                "autoscaling": autoscaling,
            },
            gateway={
                "micro_batch_sequences": self.micro_batch_sequences,
                "chunk_tokens": self.chunk_tokens(way),
                "draft_tokens": 0,
                "prefix_sharing": "pipeline",
                "queue_limit": _QUEUE_LIMIT,
                "access_log": "off",
                "autoscaling": ALWAYS_ONE,
            },
        )

    def _objective(self, way: str) -> dict[str, object]:
        """The objective, with passes as they are measured under little load: few tokens of KV, and a hop."""
        passes = {
            rows: max(times.forward_seconds(rows, rows * _LITTLE_KV, rows * _LITTLE_KV) for times in self.pass_times(way))
            for rows in (1, self.micro_batch_sequences)
        }
        return {
            "first_token_seconds": self.slowness * MOST_FIRST_TOKEN_SECONDS,
            "token_seconds": self.slowness * MOST_TOKEN_SECONDS,
            "pass_seconds": {rows: round(seconds + _HOP_SECONDS, 4) for rows, seconds in passes.items()},
        }

    def network_bytes_per_token(self, way: str) -> int:
        """Hidden states from stage to gateway and on to the next stage, for each token of prompt and answer."""
        return sum(2 * plan.hop_bytes_per_token for plan in self.plans(way))


# Published shapes.
MODELS: Final = {
    "llama-2-13b": ROOT / "examples" / "llama-2-13b" / "config.json",
    "llama-2-70b": _HERE / "models" / "llama-2-70b.json",
    "smollm2-135m-instruct": _HERE / "models" / "smollm2-135m-instruct.json",
}
SMOLLM2_PROFILE: Final = _HERE / "profiles" / "smollm2-bfloat16.yaml"
