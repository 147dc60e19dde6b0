"""`python -m knative plan`: where a model would be cut, and what each stage will need."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from eventing.wire.events import Cut
from functions.gateway.scheduling.batching import SchedulerLimits
from knative.commands.sources.store_access import StoreOptions, open_store, store_options
from knative.commands.terminal.console import show_table, size
from knative.commands.terminal.pod_table import show_pods
from knative.spec.cut import cut_evenly, format_cut, parse_cut
from knative.spec.model_shape import ModelShape, published_shape, shape_from_folder
from knative.spec.pipeline_spec import DTYPES, PipelineSpec, StageSpec
from knative.spec.sizing import Link, StagePlan, check_memory, network_plan, plan_mixed, plan_stages, replicas_for
from knative.spec.spec_file import load_spec
from storage.models.model_repository import read_manifest

_POSITIVE: Final = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("spec_file", metavar="[SPEC]", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", help="A Hugging Face folder (its config.json is enough), or a published name.  [default: the spec's]")
@click.option("--stages", type=click.IntRange(min=1), default=3, show_default=True, help="How many groups of layers.")
@click.option("--cut", "cut_text", help="Your own cut instead, such as 0:10,10:20,20:30.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@click.option("--wire-dtype", type=click.Choice(["int8"]), help="Hidden states in 8 bits.  [default: as they are computed]")
@click.option("--conversations", type=click.IntRange(min=1), help="Also: replicas that so many at once will ask for.")
@click.option(
    "--step-seconds", type=click.FloatRange(min=0, min_open=True), help="Also what a network costs: of a step of all layers."
)
@click.option("--delay-seconds", type=click.FloatRange(min=0), default=0.0, help="With it: between pods, each way.")
@click.option("--bytes-per-second", type=_POSITIVE, help="With it: of a pod's link, each way.")
@store_options
def plan(
    spec_file: Path | None,
    model: str | None,
    stages: int,
    cut_text: str | None,
    dtype: str,
    wire_dtype: str | None,
    conversations: int | None,
    step_seconds: float | None,
    delay_seconds: float,
    bytes_per_second: float | None,
    store: StoreOptions,
) -> None:
    """Show where a model would be cut, and what each stage will need; with SPEC, what each is given.

    \b
    python -m knative plan --model ./Llama-2-13b-hf --stages 4
    python -m knative plan --model smollm2-135m-instruct --stages 3 --dtype int8
    python -m knative plan --model ./Llama-2-13b-hf --stages 4 --conversations 64
    python -m knative plan --model ./Llama-2-13b-hf --step-seconds 0.04 --delay-seconds 0.005 --bytes-per-second 1.25e8
    python -m knative plan pipeline.yaml --model ./Llama-2-13b-hf
    """
    spec = None if spec_file is None else load_spec(spec_file)
    if model is None and spec is None:
        raise click.UsageError("--model or SPEC says of which model")
    shape = _shape(model or spec.model.name, dtype if spec is None else spec.model.dtype, store)  # type: ignore[union-attr]
    cut = _cut(shape, stages, cut_text, spec)
    plans = plan_stages(shape, cut, wire_dtype) if spec is None else _mixed(spec, model or spec.model.name, shape, cut, store)
    given = (StageSpec(),) * len(cut) if spec is None else spec.stages_of(cut)
    console = Console()
    _show(console, shape, cut, plans)
    if spec is not None:
        show_pods(console, plans, given, spec.gateway)
    if conversations is not None:
        _show_replicas(console, plans, given, spec, conversations)
    if step_seconds is not None:
        _show_network(console, plans, spec, conversations, step_seconds, Link(delay_seconds, bytes_per_second))
    if spec is not None:
        check_memory(given, [each.weight_bytes for each in plans])


def _cut(shape: ModelShape, stages: int, cut_text: str | None, spec: PipelineSpec | None) -> Cut:
    text = cut_text or (spec and spec.cut)
    if text:
        return parse_cut(text, "--cut" if cut_text else "$.cut")
    return cut_evenly(shape, stages if spec is None else spec.stages or stages)


def _mixed(spec: PipelineSpec, model: str, shape: ModelShape, cut: Cut, store: StoreOptions) -> tuple[StagePlan, ...]:
    """Of a spec whose stages may compute in dtypes of their own."""
    shapes = {dtype: _shape(model, dtype, store) for dtype in spec.dtypes if dtype != shape.dtype}
    return plan_mixed({**shapes, shape.dtype: shape}, spec.dtypes_of(cut), cut, spec.wire_dtype)


def _shape(model: str, dtype: str, store: StoreOptions) -> ModelShape:
    if Path(model).is_dir():
        return shape_from_folder(Path(model), dtype)
    if re.search(r"[/\\]", model):
        raise click.UsageError(f"--model: there is no folder {model}")
    with open_store(store) as opened:
        return published_shape(opened, read_manifest(opened, model, dtype))


def _show(console: Console, shape: ModelShape, cut: Cut, plans: tuple[StagePlan, ...]) -> None:
    columns = ("stage", "layers", "weights", "compute", "KV per token", "KV per 4k sequence", "hop per token")
    rows = [
        (
            str(plan.index),
            f"{plan.first_layer}:{plan.last_layer}",
            size(plan.weight_bytes),
            f"{plan.compute_share:.0%}",
            size(plan.kv_bytes_per_token),
            size(plan.kv_bytes_per_sequence),
            size(plan.hop_bytes_per_token) if plan.hop_bytes_per_token else "a token",
        )
        for plan in plans
    ]
    show_table(console, f"{shape.name}, {shape.num_layers} layers, {shape.dtype}", columns, rows)
    total = sum(plan.weight_bytes for plan in plans)
    console.out(f"cut: {format_cut(cut)}", highlight=False)
    if shape.slow_because is not None:
        console.out(f"on CPUs layers do not run in C, which is slower: {shape.slow_because}", highlight=False)
    console.out(f"weights: {size(total)} in all; a hop carries {plans[0].hop_bytes_per_token} bytes per token", highlight=False)


def _show_replicas(
    console: Console, plans: tuple[StagePlan, ...], stages: Sequence[StageSpec], spec: PipelineSpec | None, conversations: int
) -> None:
    scalings = [stage.autoscaling for stage in stages]
    if any(scaling.autoscaler_class == "hpa" for scaling in scalings):
        console.out("replicas: by CPU where the class is hpa, which conversations do not tell", highlight=False)
        return
    per_pod = [each.target_concurrency for each in scalings]
    most = [each.max_scale for each in scalings]
    micro_batch = (spec and spec.gateway.micro_batch_sequences) or SchedulerLimits().micro_batch_sequences
    replicas = replicas_for(plans, conversations, micro_batch, per_pod, most)
    text = ", ".join(f"stage {plan.index}: {count}" for plan, count in zip(plans, replicas, strict=True))
    console.out(
        f"replicas for {conversations} conversations in micro-batches of at most {micro_batch}, "
        f"{_alike(per_pod)} in flight for each pod, at most {_alike(most)}: {text}",
        highlight=False,
    )


def _show_network(
    console: Console,
    plans: tuple[StagePlan, ...],
    spec: PipelineSpec | None,
    conversations: int | None,
    step_seconds: float,
    link: Link,
) -> None:
    """Of one conversation and, where so many are named, of these: without the network and with it."""
    steps = [step_seconds * plan.compute_share for plan in plans]
    micro_batch = (spec and spec.gateway.micro_batch_sequences) or SchedulerLimits().micro_batch_sequences
    for count in sorted({1, conversations or 1}):
        near, far = (network_plan(plans, steps, count, micro_batch, each) for each in (Link(0.0, None), link))
        share = far.tokens_per_second / near.tokens_per_second
        console.out(
            f"network: {count} at a time, one replica each: {far.tokens_per_second:.1f} tokens/s, {share:.2f} of what there is "
            f"without it; micro-batches in flight {far.micro_batches}, bytes a token between pods {far.bytes_per_token}",
            highlight=False,
        )


def _alike(numbers: Sequence[float]) -> str:
    """One number, where all are the same."""
    return "/".join(f"{each:g}" for each in (numbers[:1] if len(set(numbers)) == 1 else numbers))
