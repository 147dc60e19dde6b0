"""`python -m knative plan`: shows the cut of a model, what each stage needs, and what a spec gives it."""

import re
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from functions.gateway.scheduling.batching import SchedulerLimits
from knative.commands.console import show_table, size
from knative.commands.model_choice import best_dtype
from knative.commands.options import FILE, OpenStore, store_options
from knative.spec.cut import cut_evenly, format_cut, parse_cut
from knative.spec.model_shape import ModelShape, published_shape, shape_from_folder, shape_from_gguf
from knative.spec.pipeline_spec import DTYPES, Autoscaling, GatewaySpec, PipelineSpec, PodSpec, StageSpec, quantity
from knative.spec.sizing import (
    Link,
    StagePlan,
    check_memory,
    needed_bytes,
    network_plan,
    plan_mixed,
    plan_stages,
    replicas_for,
)
from knative.spec.spec_file import load_spec
from storage.checkpoints.model_source import open_checkpoint
from storage.models.model_repository import read_manifest

_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command(short_help="Show the cut of a model, and what each stage needs.")
@click.argument("spec_file", metavar="[SPEC]", required=False, type=FILE)
@click.option(
    "--model",
    help="A Hugging Face folder (its config.json is enough), a GGUF file, or a published name.  [default: the spec's]",
)
@click.option("--stages", type=click.IntRange(min=1), default=3, show_default=True, help="Number of groups of layers.")
@click.option("--cut", "cut_text", help="A cut of your own instead, such as 0:10,10:20,20:30.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Default: the one that `run` would choose for a file or folder; bfloat16 for a published name.",
)
@click.option("--wire-dtype", type=click.Choice(["int8"]), help="Send hidden states in 8 bits.  [default: as computed]")
@click.option("--kv-dtype", type=click.Choice(["int8"]), help="Keep keys and values in 8 bits.  [default: as computed]")
@click.option("--conversations", type=click.IntRange(min=1), help="Also show the replicas that this many at once need.")
@click.option("--step-seconds", type=_POSITIVE, help="Also show the cost of a network, for this long a step of all layers.")
@click.option("--delay-seconds", type=click.FloatRange(min=0), default=0.0, help="With --step-seconds: between pods, each way.")
@click.option("--bytes-per-second", type=_POSITIVE, help="With --step-seconds: of a pod's link, each way.")
@store_options
def plan(
    spec_file: Path | None,
    model: str | None,
    stages: int,
    cut_text: str | None,
    dtype: str | None,
    wire_dtype: str | None,
    kv_dtype: str | None,
    conversations: int | None,
    step_seconds: float | None,
    delay_seconds: float,
    bytes_per_second: float | None,
    open_store: OpenStore,
) -> None:
    """Show where a model would be cut and what each stage needs; with SPEC, also what the spec gives it.

    \b
    python -m knative plan --model ./Llama-2-13b-hf --stages 4
    python -m knative plan --model smollm2-135m-instruct --stages 3 --dtype int8
    python -m knative plan --model ./Llama-2-13b-hf --stages 4 --conversations 64
    python -m knative plan --model ./Llama-2-13b-hf --step-seconds 0.04 --delay-seconds 0.005 --bytes-per-second 1.25e8
    python -m knative plan pipeline.yaml --model ./Llama-2-13b-hf
    """
    console = Console()
    micro_batch, kept = SchedulerLimits().micro_batch_sequences, 0
    if spec_file is None:
        if model is None:
            raise click.UsageError("name a model with --model, or a SPEC")
        shape = _shape(model, dtype, open_store)
        cut = parse_cut(cut_text, "--cut") if cut_text else cut_evenly(shape, stages)
        plans, given = plan_stages(shape, cut, wire_dtype, kv_dtype), (StageSpec(),) * len(cut)
        _show_stages(console, shape, plans)
    else:
        spec = load_spec(spec_file)
        model = model or spec.model.name
        shape = _shape(model, spec.model.dtype, open_store)
        text = cut_text or spec.cut
        cut = parse_cut(text, "--cut" if cut_text else "$.cut") if text else cut_evenly(shape, spec.stages or stages)
        shapes = {each: shape if each == shape.dtype else _shape(model, each, open_store) for each in spec.dtypes}
        plans, given = plan_mixed(shapes, spec.dtypes_of(cut), cut, spec.wire_dtype, spec.kv_dtype), spec.stages_of(cut)
        micro_batch = spec.gateway.micro_batch_sequences or micro_batch
        _show_stages(console, shape, plans)
        kept = spec.adapters * spec.adapter_rank
        if spec.objective is not None:
            console.out(f"objective: {_objective_text(spec)}", highlight=False)
        _show_pods(console, plans, given, spec.gateway, kept)
    if conversations is not None:
        _show_replicas(console, plans, given, conversations, micro_batch)
    if step_seconds is not None:
        link = Link(delay_seconds, bytes_per_second)
        _show_network(console, plans, conversations or 1, micro_batch, step_seconds, link)
    if spec_file is not None:
        check_memory(given, [each.weight_bytes for each in plans], [kept * each.adapter_bytes for each in plans])


def _shape(model: str, dtype: str | None, open_store: OpenStore) -> ModelShape:
    """Returns the shape of a model.

    If `dtype` is None, a file or folder has the dtype that `run` would choose, and a published name has bfloat16.
    """
    path = Path(model)
    if path.is_dir():
        if dtype is None and any(path.glob("*.safetensors")):
            dtype = best_dtype(open_checkpoint(path))
        return shape_from_folder(path, dtype or "bfloat16")
    if path.is_file():
        from storage.checkpoints.gguf_checkpoint import open_gguf  # gguf and numpy, which only this format needs

        return shape_from_gguf(path, dtype or best_dtype(open_gguf(path, tokenizer={})))
    if re.search(r"[/\\]", model):
        raise click.UsageError(f"--model: there is no folder or file {model}")
    with open_store() as opened:
        return published_shape(opened, read_manifest(opened, model, dtype or "bfloat16"))


def _show_stages(console: Console, shape: ModelShape, plans: Sequence[StagePlan]) -> None:
    columns = ("stage", "layers", "weights", "compute", "KV per token", "memory per 4k sequence", "hop per token")
    rows = [
        (
            str(plan.index),
            f"{plan.first_layer}:{plan.last_layer}",
            size(plan.weight_bytes),
            f"{plan.compute_share:.0%}",
            size(plan.kv_bytes_per_token),
            size(plan.sequence_bytes),
            size(plan.hop_bytes_per_token) if plan.hop_bytes_per_token else "a token",
        )
        for plan in plans
    ]
    show_table(console, f"{shape.name}, {shape.num_layers} layers, {shape.dtype}", columns, rows)
    total = sum(plan.weight_bytes for plan in plans)
    cut = format_cut(tuple((plan.first_layer, plan.last_layer) for plan in plans))
    console.out(f"cut: {cut}", highlight=False)
    if shape.slow_because is not None:
        console.out(f"on CPUs layers do not run in C, which is slower: {shape.slow_because}", highlight=False)
    console.out(
        f"weights: {size(total)} in all, as {shape.dtype}; a hop carries {plans[0].hop_bytes_per_token} bytes per token",
        highlight=False,
    )


def _show_pods(
    console: Console, plans: Sequence[StagePlan], stages: Sequence[StageSpec], gateway: GatewaySpec, adapter_ranks: int
) -> None:
    """adapter_ranks: of all adapters that a stage keeps, together."""
    columns = ("pods of", "cpu", "memory", "needs", "kv_cache", "tokens", "gpu", "device", "scale", "target", "other")
    rows = []
    for plan, stage in zip(plans, stages, strict=True):
        other = [stage.dtype or "", stage.layer_group if stage.layer_group != "auto" else "", *_placement(stage.pod)]
        rows.append(
            (
                f"stage {plan.index}",
                stage.resources.cpu,
                stage.resources.memory,
                ""
                if stage.resources.gpu
                else size(int(needed_bytes(stage, plan.weight_bytes, adapter_ranks * plan.adapter_bytes))),
                stage.kv_cache,
                "any" if (tokens := plan.kv_tokens(int(quantity(stage.kv_cache)))) is None else str(tokens),
                str(stage.resources.gpu or ""),
                stage.device,
                *_scale(stage.autoscaling),
                " ".join(filter(None, other)),
            )
        )
    own = ("gateway", gateway.resources.cpu, gateway.resources.memory, "", "", "", "", "cpu")
    rows.append((*own, *_scale(gateway.autoscaling), " ".join(_placement(gateway.pod))))
    show_table(console, "what the spec gives", columns, rows)


def _objective_text(spec: PipelineSpec) -> str:
    """The spec's objective, and the settings that it decides unless the spec does."""
    given, scaling = spec.objective, spec.stage.autoscaling
    assert given is not None
    return (
        f"{given.share:g} of answers with the first token in {given.first_token_seconds:g} s and {given.token_seconds:g} s a "
        f"token; so a target of {_scale(scaling)[1]}, a window of {scaling.window_seconds:g} s, a scale-down delay of "
        f"{scaling.scale_down_delay_seconds:g} s, at most {spec.stage.timeout_seconds} s for a pod that leaves, "
        f"container_concurrency {scaling.container_concurrency}, micro-batches of "
        f"{spec.gateway.micro_batch_sequences or SchedulerLimits().micro_batch_sequences}"
    )


def _scale(scaling: Autoscaling) -> tuple[str, str]:
    hpa = scaling.autoscaler_class == "hpa"
    target = scaling.target or (70 if hpa else scaling.default_target)
    return f"{scaling.min_scale}-{scaling.max_scale}", f"{target:g} % CPU" if hpa else f"{target:g}"


def _placement(pod: PodSpec) -> list[str]:
    selected = [f"{name}={value}" for name, value in pod.node_selector.items()]
    return selected + [value for value in (pod.runtime_class, pod.priority_class) if value]


def _show_replicas(
    console: Console, plans: tuple[StagePlan, ...], stages: Sequence[StageSpec], conversations: int, micro_batch: int
) -> None:
    scalings = [stage.autoscaling for stage in stages]
    if any(scaling.autoscaler_class == "hpa" for scaling in scalings):
        console.out("replicas: cannot be derived from conversations for class hpa, which scales on CPU", highlight=False)
        return
    targets, most = [each.target_concurrency for each in scalings], [each.max_scale for each in scalings]
    replicas = replicas_for(plans, conversations, micro_batch, targets, most)
    # A single number if all stages have the same.
    target, scale = ("/".join(f"{each:g}" for each in (of[:1] if len(set(of)) == 1 else of)) for of in (targets, most))
    text = ", ".join(f"stage {plan.index}: {count}" for plan, count in zip(plans, replicas, strict=True))
    console.out(
        f"replicas for {conversations} conversations in micro-batches of at most {micro_batch}, "
        f"{target} in flight for each pod, at most {scale}: {text}",
        highlight=False,
    )


def _show_network(
    console: Console, plans: Sequence[StagePlan], conversations: int, micro_batch: int, step_seconds: float, link: Link
) -> None:
    """Prints throughput over the network, and its share of the throughput without delays of the network.

    It does so for one conversation, and for `conversations` at the same time.
    """
    steps = [step_seconds * plan.compute_share for plan in plans]
    for count in sorted({1, conversations}):
        near, far = (network_plan(plans, steps, count, micro_batch, each) for each in (Link(0.0, None), link))
        share = far.tokens_per_second / near.tokens_per_second
        console.out(
            f"network: {count} at a time, one replica each: {far.tokens_per_second:.1f} tokens/s, {share:.2f} of the speed "
            f"without it; micro-batches in flight {far.micro_batches}, bytes a token between pods {far.bytes_per_token}",
            highlight=False,
        )
