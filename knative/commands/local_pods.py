"""Pods of the pipeline that runs on this machine: their metrics, how they start, and how long each phase of a start took."""

import asyncio
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.client import HTTPException
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from rich.console import Console

from knative.commands.console import show_table, size
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.model_shape import ModelShape
from knative.spec.sizing import plan_stages

_TIMEOUT_SECONDS: Final = 2
_POLL_SECONDS: Final = 0.1
_HOPELESS_RESTARTS: Final = 2  # a function that ended twice before it was ever ready will end again


class PodsFailed(Exception):
    """A pod cannot start. The message has its last output and the path of its log."""


def read_metrics(pod: Mapping[str, Any]) -> defaultdict[str, float] | None:
    """Metrics of a pod: name → value, summed over labels. None if the pod does not answer: its load is unknown, and not zero.

    pod: an entry of the platform's status. Metrics have a port of their own, so that reading them does not keep a pod alive.
    """
    found = _read_samples(pod)
    if found is None:
        return None
    samples: defaultdict[str, float] = defaultdict(float)
    for each in found:
        samples[each.name] += each.value
    return samples


def _read_samples(pod: Mapping[str, Any]) -> list[Sample] | None:
    if pod["metrics_port"] is None:
        return None
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{pod['metrics_port']}/metrics", timeout=_TIMEOUT_SECONDS) as reply:
            families = text_string_to_metric_families(reply.read().decode())
            return [sample for family in families for sample in family.samples]
    except (OSError, HTTPException, ValueError):
        return None


def samples_by_model(pods: Iterable[Mapping[str, Any]]) -> defaultdict[str, defaultdict[str, float]] | None:
    """Metrics of the pods of a fleet's gateway: name → model → value. None if a ready pod does not answer.

    Each pod counts the requests that it has, so these are summed; of what all pods see (`lamina_fleet_…`) it is the largest.
    """
    samples: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for pod in pods:
        found = _read_samples(pod)
        if found is None and pod["phase"] == "ready":
            return None
        for each in found or ():
            if each.labels.keys() == {"model"}:
                known, model = samples[each.name], each.labels["model"]
                is_shared = each.name.startswith("lamina_fleet_")
                known[model] = max(known[model], each.value) if is_shared else known[model] + each.value
    return samples


def tokens_per_second(
    revision: Mapping[str, Any], now: float, seen: dict[str, tuple[float, float]]
) -> tuple[float | None, int | None]:
    """Tokens per second of the revision's pods, and number of sequences that wait in its gateway's queue.

    now: the time in seconds. seen: pod → its number of tokens and the time of reading; it is updated, so that the next call can
    compute a rate. The rate is None if no pod was seen before. Both are None if a ready pod does not answer, as Knative's
    autoscaler then takes the load for unknown (knative/serving, pkg/autoscaler/metrics/stats_scraper.go).
    """
    rates, waiting, complete = [], 0, True
    for pod in revision["pods"]:
        samples = read_metrics(pod)
        if samples is None:
            complete = complete and pod["phase"] != "ready"
            continue
        tokens = samples["lamina_stage_tokens_total"] + samples["lamina_gateway_tokens_total"]
        waiting += int(samples["lamina_gateway_waiting_sequences"])
        before = seen.get(pod["name"])
        if before is not None and now > before[1]:
            rates.append(max(0.0, tokens - before[0]) / (now - before[1]))
        seen[pod["name"]] = (tokens, now)
    return (sum(rates) if rates and complete else None), (waiting if complete else None)


def objective_line(pods: Iterable[Mapping[str, Any]]) -> str | None:
    """Whether the answers of a gateway's pods, since these started, keep the objective; None: there is none."""
    total: defaultdict[str, float] = defaultdict(float)
    share, silent = 0.0, []
    for pod in pods:
        samples = read_metrics(pod)
        if samples is None:
            silent += [pod["name"]] if pod["phase"] == "ready" else []
            continue
        share = max(share, samples["lamina_gateway_objective_share"])
        for name in ("lamina_gateway_judged_answers_total", "lamina_gateway_answers_within_objective_total"):
            total[name] += samples[name]
    judged, within = total["lamina_gateway_judged_answers_total"], total["lamina_gateway_answers_within_objective_total"]
    if not share:
        return None
    unread = f"; {', '.join(silent)} did not answer" if silent else ""
    if not judged:
        return f"objective: no answer yet; {share:.4g} of them shall be within{unread}"
    verdict = "kept" if within >= share * judged else "missed"
    return f"objective: {within / judged:.4g} of {judged:.0f} answers within, {share:.4g} wanted: {verdict}{unread}"


async def watch_starts(status: Callable[[], Mapping[str, Any]], tell: Callable[[str], None]) -> None:
    """Reports to `tell` how pods start, until it is cancelled. Raises PodsFailed when a pod cannot start.

    status: returns the platform's status.
    """
    seen: dict[str, str] = {}
    while True:
        for service, revision, pod in _pods(status()):
            if revision["failure"]:
                raise PodsFailed(f"{service}: {revision['failure']}; log: {pod['log']}")
            if pod["restarts"] >= _HOPELESS_RESTARTS and not pod["readiness"]:
                raise PodsFailed(f"{service} cannot start: {pod['trouble']}; log: {pod['log']}")
            if pod["phase"] != seen.get(pod["name"], "") and pod["phase"] in ("starting", "ready", "back-off"):
                tell(f"{service}: {pod['phase']}" + (f" ({pod['trouble']})" if pod["phase"] == "back-off" else ""))
            seen[pod["name"]] = pod["phase"]
        await asyncio.sleep(_POLL_SECONDS)


async def show_stages(console: Console, pipeline: ResolvedPipeline, shape: ModelShape, status: Mapping[str, Any]) -> None:
    """Prints a table of the stages: layers, weights, seconds of each phase of the start, tokens per second of compute.

    status: the platform's.
    """
    ready = {service: pod for service, _, pod in reversed([*_pods(status)]) if pod["phase"] == "ready"}
    pods = [ready.get(name) for name in pipeline.stage_names]
    rates = await asyncio.gather(*(asyncio.to_thread(_compute_rate, pod) for pod in pods))
    rows = []
    for plan, pod, rate in zip(plan_stages(shape, pipeline.cut), pods, rates, strict=True):
        readiness = pod["readiness"] if pod else None
        phases = readiness.get("start_up", {}) if isinstance(readiness, dict) else {}
        process, imports, place, warm_up = (phases.get(name) for name in ("process", "import", "place", "warm_up"))
        rows.append(
            (
                str(plan.index),
                f"{plan.first_layer}:{plan.last_layer}",
                size(plan.weight_bytes),
                _seconds(None, process),
                _seconds(process, imports),
                _seconds(imports, place),
                _seconds(place, warm_up),
                _seconds(None, warm_up),
                "-" if rate is None else f"{rate:.0f}",
            )
        )
    columns = ("stage", "layers", "weights", "process", "import", "weights in", "first step", "ready after", "tokens/s")
    show_table(console, f"{shape.name} as {shape.dtype}, pipeline {pipeline.fingerprint}", columns, rows)


def _seconds(begin: float | None, end: float | None) -> str:
    """Duration of a phase of a pod's start, as text; `-` if it has not ended.

    end: when it ended; begin: when the phase before ended, in the same seconds. A phase that ended before `begin` took 0 s.
    """
    return "-" if end is None else f"{max(0.0, end - (begin or 0.0)):.2f} s"


def _compute_rate(pod: Mapping[str, Any] | None) -> float | None:
    """Tokens per second of compute, from the stage's own metrics; None if it has not computed yet, or does not answer."""
    if pod is None or (samples := read_metrics(pod)) is None:
        return None
    seconds = samples["lamina_stage_compute_seconds_sum"]
    return samples["lamina_stage_tokens_total"] / seconds if seconds else None


def _pods(status: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yields name of the Service, revision and pod for each pod in the platform's status."""
    for service in status["services"]:
        for revision in service["revisions"]:
            for pod in revision["pods"]:
                yield service["name"], revision, pod
