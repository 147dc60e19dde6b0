"""The table that `run` ends its answer with: what each stage is, and what its start cost."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console

from knative.commands.terminal.console import show_table, size
from knative.commands.terminal.pod_metrics import read_metrics
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.model_shape import ModelShape
from knative.spec.sizing import StagePlan, plan_stages

_COLUMNS: Final = ("stage", "layers", "weights", "process", "import", "weights in", "first step", "ready after", "tokens/s")


async def show_stages(console: Console, pipeline: ResolvedPipeline, shape: ModelShape, status: Mapping[str, Any]) -> None:
    """status: as the platform tells it, with the pods of `pipeline`."""
    plans = plan_stages(shape, pipeline.cut)
    pods = [_first_pod(status, name) for name in pipeline.stage_names]
    rates = await asyncio.gather(*(asyncio.to_thread(_tokens_per_second, pod) for pod in pods))
    rows = [_row(plan, pod, rate) for plan, pod, rate in zip(plans, pods, rates, strict=True)]
    show_table(console, f"{shape.name} as {shape.dtype}, pipeline {pipeline.fingerprint}", _COLUMNS, rows)


def _row(plan: StagePlan, pod: Mapping[str, Any] | None, rate: float | None) -> tuple[str, ...]:
    phases = _phases(pod)
    ends = {name: phases.get(name) for name in ("process", "import", "place", "warm_up")}
    return (
        str(plan.index),
        f"{plan.first_layer}:{plan.last_layer}",
        size(plan.weight_bytes),
        _seconds(None, ends["process"]),
        _seconds(ends["process"], ends["import"]),
        _seconds(ends["import"], ends["place"]),
        _seconds(ends["place"], ends["warm_up"]),
        _seconds(None, ends["warm_up"]),
        "-" if rate is None else f"{rate:.0f}",
    )


def _first_pod(status: Mapping[str, Any], service: str) -> Mapping[str, Any] | None:
    pods = [
        pod
        for each in status["services"]
        if each["name"] == service
        for revision in each["revisions"]
        for pod in revision["pods"]
    ]
    return next((pod for pod in pods if pod["phase"] == "ready"), None)


def _phases(pod: Mapping[str, Any] | None) -> Mapping[str, float]:
    readiness = pod["readiness"] if pod else None
    phases: Mapping[str, float] = readiness.get("start_up", {}) if isinstance(readiness, dict) else {}
    return phases


def _seconds(begin: float | None, end: float | None) -> str:
    """What overlaps with an earlier phase has cost nothing of its own."""
    return "-" if end is None else f"{max(0.0, end - (begin or 0.0)):.2f} s"


def _tokens_per_second(pod: Mapping[str, Any] | None) -> float | None:
    """Tokens through the layers while they computed, from the stage's own metrics."""
    samples = {} if pod is None else read_metrics(pod)
    seconds = samples.get("lamina_stage_compute_seconds_sum", 0.0)
    return samples.get("lamina_stage_tokens_total", 0.0) / seconds if seconds else None
