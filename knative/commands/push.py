"""`push` publishes a checkpoint into the store; `requirements` names the packages that a model needs (the Makefile asks)."""

from collections import Counter
from contextlib import suppress
from pathlib import Path

import click
from rich.console import Console

from knative.commands.console import publish_progress, show_quantized, size
from knative.commands.model_choice import DEFAULT_MODEL, best_dtype, packaged_model, published_name, torch_needed
from knative.commands.options import OpenStore, store_options, tokenizer_option
from knative.spec.pipeline_spec import DTYPES, ModelSpec
from knative.spec.spec_file import load_spec
from storage.checkpoints.model_source import locate, open_checkpoint
from storage.errors import CheckpointInvalid, LibraryMissing, ModelNotPublished
from storage.models.model_repository import read_manifest
from storage.models.publisher import PublicationPlan, plan_publication, publish


@click.command(short_help="Publish a model into the store.")
@click.argument("source", required=False)
@click.option("--name", help="Name in the store. Default: the source's own name.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: bfloat16.")
@click.option(
    "--spec",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take name and dtype from this PipelineSpec. Without SOURCE nothing is done if that model is already published.",
)
@click.option("--afresh", is_flag=True, help="Write every object again, also those that the store has: repairs damage.")
@click.option("--dry-run", is_flag=True, help="Only print what would be published; needs no store.")
@tokenizer_option
@store_options
def push(
    source: str | None,
    name: str | None,
    dtype: str | None,
    spec: Path | None,
    afresh: bool,
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
    """
    console = Console()
    for model in _models(source, name, dtype, spec):
        if dry_run:
            found = locate(source or _default_source(model))
            _show_plan(console, model, plan_publication(found, model.dtype, tokenizer=tokenizer))
            continue
        with open_store() as opened:
            manifest = None
            if spec is not None and source is None and not afresh:
                with suppress(ModelNotPublished):
                    manifest = read_manifest(opened, model.name, model.dtype)
            if manifest is None:
                path = source or _default_source(model)
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
                    )
        total = sum(stored.bytes for stored in manifest.objects.values())
        console.out(f"{model.name} as {model.dtype}: {manifest.num_layers} layers, {size(total)}", highlight=False)
        console.out(f"digest: {manifest.digest}", highlight=False)


def _models(source: str | None, name: str | None, dtype: str | None, spec: Path | None) -> list[ModelSpec]:
    """The models to publish: one, or with a spec one for each dtype that it needs.

    The name comes from the options, else the spec, else the source; `dtype` overrides the spec.
    """
    if spec is None:
        default = published_name(source) if source else DEFAULT_MODEL
        return [ModelSpec(name=name or default, dtype=dtype or ModelSpec(name=default).dtype)]
    loaded = load_spec(spec)
    return [ModelSpec(name=name or loaded.model.name, dtype=each) for each in ([dtype] if dtype else loaded.dtypes)]


def _show_plan(console: Console, model: ModelSpec, plan: PublicationPlan) -> None:
    layers = sorted({each.bytes for each in plan.objects if each.name not in ("embedding", "head")})
    sizes = {each.name: size(each.bytes) for each in plan.objects}
    formats = Counter(tensor.stored_as or tensor.dtype for tensor in plan.checkpoint.tensors.values())
    files = plan.checkpoint.files
    template = "with" if "chat_template.jinja" in files else "without"
    per_layer = " to ".join(map(size, sorted({layers[0], layers[-1]})))
    lines = (
        f"{model.name} as {model.dtype}: {plan.model.model_type}, {plan.model.num_layers} layers, "
        f"{size(sum(each.bytes for each in plan.objects))}",
        f"embedding: {sizes['embedding']}; head: {sizes['head']}; a layer: {per_layer}",
        f"tensors of the source: {', '.join(f'{count} {name}' for name, count in formats.most_common())}",
        f"tokenizer: {size(len(files.get('tokenizer.json', b'')))}, {template} a chat template",
        f"files: {', '.join(sorted(files))}",
    )
    for line in lines:
        console.out(line, highlight=False)


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
