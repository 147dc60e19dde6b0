"""`python -m knative push`: publishes a checkpoint into the store."""

import re
from pathlib import Path

import click
from rich.console import Console

from knative.console import publish_progress, size
from knative.pipeline_spec import DTYPES
from knative.store_access import StoreOptions, open_store, store_options
from storage.publisher import publish


@click.command()
@click.argument("source")
@click.option("--name", help="What it is called in the store. Default: the source's own name.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@store_options
def push(source: str, name: str | None, dtype: str, store: StoreOptions) -> None:
    """Publish SOURCE (a Hugging Face folder, a GGUF file, or a hub id) into the store, an object for each layer.

    An interrupted push goes on where it stopped; nothing is visible before all of it is there.

    \b
    python -m knative push ./Llama-2-13b-hf --name llama-2-13b --dtype bfloat16
    python -m knative push HuggingFaceTB/SmolLM2-1.7B-Instruct --dtype int8
    """
    console = Console()
    name = name or published_name(source)
    with open_store(store) as opened, publish_progress(console, f"publishing {name} as {dtype}") as progress:
        manifest = publish(source, opened, name, dtype, progress=progress)
    total = sum(stored.bytes for stored in manifest.objects.values())
    console.out(f"{name} as {dtype}: {manifest.num_layers} layers, {size(total)}", highlight=False)
    console.out(f"digest: {manifest.digest}", highlight=False)


def published_name(source: str) -> str:
    """Of a folder, file or hub id: its last part, with what a name may not have replaced."""
    path = Path(source)
    last = path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._") or "model"
