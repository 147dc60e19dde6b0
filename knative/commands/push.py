"""`python -m knative push`: publishes a checkpoint into the store."""

from pathlib import Path

import click
from rich.console import Console

from knative.commands.sources.store_access import StoreOptions, open_store, store_options
from knative.commands.terminal.console import publish_progress, size
from knative.spec.model_sources import DEFAULT_MODEL, packaged_model, published_name
from knative.spec.pipeline_spec import DTYPES, ModelSpec
from knative.spec.spec_file import load_spec
from storage.errors import ModelNotPublished
from storage.models.model_repository import ModelManifest, Reader, read_manifest
from storage.models.publisher import publish


@click.command()
@click.argument("source", required=False)
@click.option("--name", help="What it is called in the store. Default: the source's own name.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: bfloat16.")
@click.option(
    "--spec",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Name and dtype from this PipelineSpec. Without SOURCE nothing is done where that model is published already.",
)
@click.option("--afresh", is_flag=True, help="Write every object again, also those that the store seems to have: mends damage.")
@store_options
def push(source: str | None, name: str | None, dtype: str | None, spec: Path | None, afresh: bool, store: StoreOptions) -> None:
    """Publish SOURCE (a Hugging Face folder, a GGUF file, or a hub id) into the store, an object for each layer.

    Without SOURCE it is the packaged default model. An interrupted push goes on where it stopped; nothing is visible before all
    of it is there.

    \b
    python -m knative push ./Llama-2-13b-hf --name llama-2-13b --dtype bfloat16
    python -m knative push HuggingFaceTB/SmolLM2-1.7B-Instruct --dtype int8
    python -m knative push --spec pipeline.yaml ./Llama-2-13b-hf
    """
    console = Console()
    for model in _models(source, name, dtype, spec):
        with open_store(store) as opened:
            manifest = _published(opened, model) if spec is not None and source is None and not afresh else None
            if manifest is None:
                path = source or _default_source(model)
                with publish_progress(console, f"publishing {model.name} as {model.dtype}") as progress:
                    manifest = publish(path, opened, model.name, model.dtype, progress=progress, afresh=afresh)
        total = sum(stored.bytes for stored in manifest.objects.values())
        console.out(f"{model.name} as {model.dtype}: {manifest.num_layers} layers, {size(total)}", highlight=False)
        console.out(f"digest: {manifest.digest}", highlight=False)


def _models(source: str | None, name: str | None, dtype: str | None, spec: Path | None) -> list[ModelSpec]:
    """One, or where a spec's stages compute in dtypes of their own, the model in each of them."""
    model = _model(source, name, dtype, spec)
    if spec is None or dtype is not None:
        return [model]
    return [ModelSpec(name=model.name, dtype=each) for each in load_spec(spec).dtypes]


def _model(source: str | None, name: str | None, dtype: str | None, spec: Path | None) -> ModelSpec:
    """What it shall be called: as the options say, then the spec, then the source."""
    wanted = load_spec(spec).model if spec is not None else ModelSpec(name=published_name(source) if source else DEFAULT_MODEL)
    return ModelSpec(name=name or wanted.name, dtype=dtype or wanted.dtype)


def _published(reader: Reader, model: ModelSpec) -> ModelManifest | None:
    try:
        return read_manifest(reader, model.name, model.dtype)
    except ModelNotPublished:
        return None


def _default_source(model: ModelSpec) -> str:
    if model.name != DEFAULT_MODEL:
        raise ModelNotPublished(
            f"{model.name} is not published as {model.dtype}; name its SOURCE: a folder, a GGUF file or a hub id"
        )
    return packaged_model()
