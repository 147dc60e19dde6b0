"""`python -m knative plan`: where a model would be cut, and what each stage will need."""

import re
from pathlib import Path

import click
from rich.console import Console

from eventing.wire.events import Cut
from functions.gateway.scheduling.limits import Limits
from knative.commands.sources.store_access import StoreOptions, open_store, store_options
from knative.commands.terminal.console import show_table, size
from knative.spec.cut import cut_evenly, format_cut, parse_cut
from knative.spec.model_shape import ModelShape, published_shape, shape_from_folder
from knative.spec.pipeline_spec import DTYPES, Autoscaling
from knative.spec.stage_plan import StagePlan, plan_stages, replicas_for
from storage.models.model_repository import read_manifest


@click.command()
@click.option("--model", required=True, help="A Hugging Face folder (its config.json is enough), or a published name.")
@click.option("--stages", type=click.IntRange(min=1), default=3, show_default=True, help="How many groups of layers.")
@click.option("--cut", "cut_text", help="Your own cut instead, such as 0:10,10:20,20:30.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@click.option("--conversations", type=click.IntRange(min=1), help="Also: replicas that so many at once will ask for.")
@store_options
def plan(model: str, stages: int, cut_text: str | None, dtype: str, conversations: int | None, store: StoreOptions) -> None:
    """Show where a model would be cut, and what each stage will need.

    \b
    python -m knative plan --model ./Llama-2-13b-hf --stages 4
    python -m knative plan --model smollm2-135m-instruct --stages 3 --dtype int8
    python -m knative plan --model ./Llama-2-13b-hf --stages 4 --conversations 64
    """
    shape = _shape(model, dtype, store)
    cut = parse_cut(cut_text, "--cut") if cut_text else cut_evenly(shape, stages)
    plans = plan_stages(shape, cut)
    console = Console()
    _show(console, shape, cut, plans)
    if conversations is not None:
        _show_replicas(console, plans, conversations)


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


def _show_replicas(console: Console, plans: tuple[StagePlan, ...], conversations: int) -> None:
    scaling = Autoscaling()
    per_pod = (scaling.target or 2) * scaling.target_utilization_percentage / 100
    micro_batch = Limits().micro_batch_sequences
    replicas = replicas_for(plans, conversations, micro_batch, per_pod, scaling.max_scale)
    text = ", ".join(f"stage {plan.index}: {count}" for plan, count in zip(plans, replicas, strict=True))
    console.out(
        f"replicas for {conversations} conversations in micro-batches of at most {micro_batch}, "
        f"{per_pod:g} in flight for each pod, at most {scaling.max_scale}: {text}",
        highlight=False,
    )
