"""`push` publishes a checkpoint into the store; `requirements` names the packages that a model needs (the Makefile asks)."""

import re
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import click
from rich.console import Console

from knative.commands.console import publish_progress, show_quantized, show_table, size
from knative.commands.model_choice import DEFAULT_MODEL, best_dtype, is_kept, packaged_model, published_name, torch_needed
from knative.commands.options import FILE, OpenStore, store_options, tokenizer_option
from knative.spec.fleet_spec import is_fleet, load_fleet
from knative.spec.pipeline_spec import DTYPES, ModelSpec
from knative.spec.spec_file import load_spec
from storage.checkpoints.model_source import locate, open_checkpoint
from storage.errors import CheckpointInvalid, LibraryMissing, ModelNotPublished
from storage.models.model_repository import read_manifest
from storage.models.publisher import PublicationPlan, plan_publication, publish, rehearse

_UPLOAD_BYTES_PER_SECOND = 100 * 2**20


@click.command(short_help="Publish a model into the store.")
@click.argument("source", required=False)
@click.option("--name", help="Name in the store. Default: the source's own name.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: kept for a quantized SOURCE that runs in C, else bfloat16.")
@click.option(
    "--spec",
    type=FILE,
    help="Take name and dtype from this PipelineSpec, or those of all members of a Fleet. Without SOURCE nothing is done for "
    "models that are already published.",
)
@click.option("--afresh", is_flag=True, help="Write every object again, also those that the store has: repairs damage.")
@click.option("--text-only", is_flag=True, help="Of a model that also sees or hears, only the language model.")
@click.option("--dry-run", is_flag=True, help="Only print what would be published; needs no store.")
@tokenizer_option
@store_options
def push(
    source: str | None,
    name: str | None,
    dtype: str | None,
    spec: Path | None,
    afresh: bool,
    text_only: bool,
    dry_run: bool,
    tokenizer: Path | None,
    open_store: OpenStore,
) -> None:
    """Publish SOURCE (a Hugging Face folder, a GGUF file, or a hub id) into the store, one object per layer.

    Without SOURCE it is the packaged default model. An interrupted push resumes; the model becomes visible
    when it is complete.

    \b
    python -m knative push ./Llama-2-13b-hf --name llama-2-13b --dtype bfloat16
    python -m knative push HuggingFaceTB/SmolLM2-1.7B-Instruct --dtype int8
    python -m knative push --spec pipeline.yaml ./Llama-2-13b-hf
    python -m knative push --spec fleet.yaml --name llama-2-13b ./Llama-2-13b-hf
    """
    from functions.stage.models.build import check_cut  # numpy, which --help needs not

    console = Console()
    with ExitStack() as stack:
        opened = None if dry_run else stack.enter_context(open_store())
        if source and not (dtype or spec):
            dtype = "kept" if is_kept(open_checkpoint(locate(source), tokenizer, text_only)) else None
        for model in _models(source, name, dtype, spec):
            if opened is None:
                found = locate(source or _default_source(model))
                planned = plan_publication(
                    found, model.dtype, tokenizer=tokenizer, text_only=text_only, note_losses=True, check_cut=check_cut
                )
                _show_plan(console, model, planned)
                continue
            manifest = None
            if spec is not None and source is None and not afresh:
                with suppress(ModelNotPublished):
                    manifest = read_manifest(opened, model.name, model.dtype)
            if manifest is None:
                path = locate(source or _default_source(model))
                if text_only:
                    left_out = open_checkpoint(path, text_only=True).left_out
                    console.out(f"left out: {'; '.join(left_out)}", highlight=False)
                with publish_progress(console, f"publishing {model.name} as {model.dtype}") as progress:
                    manifest = publish(
                        path,
                        opened,
                        model.name,
                        model.dtype,
                        progress=progress,
                        on_quantized=show_quantized(console, model.dtype),
                        afresh=afresh,
                        tokenizer=tokenizer,
                        text_only=text_only,
                        check_cut=check_cut,
                    )
            total = sum(stored.bytes for stored in manifest.objects.values())
            console.out(f"{model.name} as {model.dtype}: {manifest.num_layers} layers, {size(total)}", highlight=False)
            console.out(f"digest: {manifest.digest}", highlight=False)


def _models(source: str | None, name: str | None, dtype: str | None, spec: Path | None) -> list[ModelSpec]:
    """The models to publish: one, or with a spec one for each dtype that it needs.

    The name comes from the options, else the spec, else the source; `dtype` overrides the spec. With a fleet they are the
    models of all members, or the one of this name.
    """
    if spec is None:
        default = published_name(source) if source else DEFAULT_MODEL
        return [ModelSpec(name=name or default, dtype=dtype or ModelSpec(name=default).dtype)]
    if is_fleet(spec):
        members = load_fleet(spec)[1]
        pipelines = [each for each in members if name in (None, each.model.name)]
        if not pipelines or (source and name is None):
            names = ", ".join(each.model.name for each in members)
            raise click.UsageError(f"--name must be a model of the fleet; its members have {names}")
    else:
        pipelines = [load_spec(spec)]
    return [
        ModelSpec(name=name or each.model.name, dtype=kind)
        for each in pipelines
        for kind in ([dtype] if dtype else each.dtypes)
    ]


def _show_plan(console: Console, model: ModelSpec, plan: PublicationPlan) -> None:
    """Prints what a push would publish. Converts some rows, to see what is lost and how long all would take."""
    seconds, memory_bytes = rehearse(plan)
    files, error = plan.checkpoint.files, plan.error
    layers = [each for each in plan.objects if each.name.startswith("layer-")]
    total = sum(each.bytes for each in plan.objects)
    template = "with" if "chat_template.jinja" in files else "without"
    lost = (
        []
        if error is None or not error.largest
        else [f"rounding, in the first rows at most {error.largest:.2g} of weights up to {error.largest_weight:.2g}"]
    )
    if plan.model.ignored_layers:
        lost.append(f"{plan.model.ignored_layers} layers that predict further tokens")
    lost += plan.checkpoint.left_out
    lines = (
        f"{model.name} as {model.dtype}: {plan.model.model_type}, {plan.model.num_layers} layers, {size(total)}",
        f"tokenizer: {size(len(files.get('tokenizer.json', b'')))}, {template} a chat template",
        f"files: {', '.join(sorted(files))}",
        f"lost: {'; '.join(lost) or 'nothing'}",
        f"reading and converting: about {seconds:.0f} s, with at most {size(memory_bytes)} of memory; "
        f"the upload: {total / _UPLOAD_BYTES_PER_SECOND:.0f} s at {size(_UPLOAD_BYTES_PER_SECOND)}/s",
    )
    for line in lines:
        console.out(line, highlight=False)
    objects = [(each.name, str(len(each.named_spans)), size(each.bytes)) for each in plan.objects]
    if len({each.bytes for each in layers}) == 1:
        objects = [objects[0], (f"each of {len(layers)} layers", *objects[1][1:]), objects[-1]]
    show_table(console, "objects", ("object", "tensors", "bytes"), objects)
    show_table(console, "tensors", ("tensor", "count", "in the source", "published", "bytes"), _tensor_rows(plan))


def _tensor_rows(plan: PublicationPlan) -> list[tuple[str, ...]]:
    """For tensors that differ only in the numbers of layer and expert: name, count, formats and bytes, scales included."""
    from storage.models.blocks import packing_of  # numpy, which most commands do not need
    from storage.models.expert_tensors import split_experts  # numpy

    sources = split_experts(plan.model.model_type, plan.checkpoint.tensors)
    counts, published_bytes = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for each in plan.objects:
        key = ("", "", "")
        for name, span in each.named_spans.items():
            if source := sources.get(name):
                stored_as, written = source.stored_as or source.dtype, each.tensors[name].dtype
                if packing := each.tensors.get(f"{name}_format"):
                    written = packing_of(memoryview(b"".join(packing.blocks()))).format
                elif written == "U8":
                    written = "q4"
                key = re.sub(r"\.\d+(?=\.)", ".N", name), stored_as, written
                counts[key] += 1
            published_bytes[key] += span.end - span.start  # scales follow their matrix
    return [(key[0], str(count), *key[1:], size(published_bytes[key])) for key, count in counts.items()]


def _default_source(model: ModelSpec) -> str:
    if model.name != DEFAULT_MODEL:
        raise ModelNotPublished(
            f"{model.name} is not published as {model.dtype}; name its SOURCE: a folder, a GGUF file or a hub id"
        )
    return packaged_model()


@click.command(short_help="Print the packages that a model needs.")
@click.option("--model", help="A folder, GGUF file or hub id, which is fetched. Default: the packaged model.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: the one that `run` would choose.")
def requirements(model: str | None, dtype: str | None) -> None:
    """Print the name of the file with the packages that a model needs in addition to requirements-lean.txt, if any.

    The reason goes to standard error.

    \b
    python -m knative requirements --model ./my-model --dtype bfloat16
    """
    try:
        path = locate(packaged_model() if model in (None, DEFAULT_MODEL) else model)
    except CheckpointInvalid:
        return  # the name of a published model, or an unknown one, which `run` will report
    try:
        checkpoint = open_checkpoint(path)
        reason = torch_needed(checkpoint.config, dtype or best_dtype(checkpoint))
    except LibraryMissing as error:
        reason = str(error)
    if reason is not None:
        click.echo(f"{model or DEFAULT_MODEL} needs torch: {reason}", err=True)
        click.echo("requirements-torch.txt")
