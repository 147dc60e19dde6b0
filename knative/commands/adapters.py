"""`push-adapter` publishes an adapter (LoRA) of a published model; `adapters` lists, shares and deletes them."""

from pathlib import Path

import click
from rich.console import Console

from knative.commands.console import show_table, size
from knative.commands.options import FOLDER, OpenStore, store_options
from storage.models.adapter_publisher import adapted_models, delete_adapter, publish_adapter, set_share
from storage.models.adapters import list_adapters, read_name

_share_range = click.IntRange(0, 100)


@click.command(short_help="Publish an adapter (LoRA) of a published model.")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--model", required=True, help="Name of the model that it adapts.")
@click.option("--name", help="Name of the adapter. Default: the folder's.")
@click.option(
    "--share",
    type=_share_range,
    default=100,
    show_default=True,
    help="Percent of its requests; the version before gets the rest.",
)
@store_options
def push_adapter(folder: Path, model: str, name: str | None, share: int, open_store: OpenStore) -> None:
    """Publish DIR, which has adapter_config.json and adapter_model.safetensors as PEFT saves them.

    Clients choose it with the model name MODEL:NAME. Pushed again with other contents, it gets another version; answers that
    run keep theirs. With --share 10 the new version is a canary. The pipeline must keep adapters (`adapters` in its spec).

    \b
    python -m knative push-adapter ./my-lora --model llama-2-13b --name support
    python -m knative push-adapter ./my-lora-2 --model llama-2-13b --name support --share 10
    python -m knative adapters --share llama-2-13b:support@1f3c=100
    """
    name = name or folder.resolve().name
    try:
        with open_store() as store:
            version = publish_adapter(store, model, name, folder, share=share)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    Console().out(f"{model}:{name}: rank {version.rank}, {size(version.bytes)}, version {version.version}", highlight=False)


@click.command(short_help="List adapters, share requests among their versions, or delete them.")
@click.option(
    "--share", metavar="MODEL:NAME@VERSION=PERCENT", help="Percent of the name's requests for a version: 100 rolls back to it."
)
@click.option("--delete", metavar="MODEL:NAME", help="Delete a name, with the versions that no other name has.")
@store_options
def adapters(share: str | None, delete: str | None, open_store: OpenStore) -> None:
    """List the adapters in the store with their versions, or change one. Running gateways follow within five seconds.

    VERSION may be the beginning of its digits. Of the other versions, the one with the largest share gets the rest.

    \b
    python -m knative adapters
    python -m knative adapters --share llama-2-13b:support@1f3c=100
    python -m knative adapters --delete llama-2-13b:support
    """
    if share is not None and delete is not None:
        raise click.UsageError("--share and --delete cannot be combined")
    try:
        with open_store() as store:
            if share is not None:
                set_share(store, *_shared(share))
            elif delete is not None:
                model, _, name = delete.partition(":")
                delete_adapter(store, model, name)
            rows = [
                (f"{model}:{name}", each.version, f"{each.share} %", str(each.rank), size(each.bytes))
                for model in adapted_models(store)
                for name in list_adapters(store, model)
                for each in read_name(store, model, name).versions
            ]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    show_table(Console(), f"{len({row[0] for row in rows})} adapters", ("adapter", "version", "share", "rank", "bytes"), rows)


def _shared(option: str) -> tuple[str, str, str, int]:
    """Model, name, version and percent of `--share`. Raises click.BadParameter."""
    adapter, _, rest = option.partition("@")
    model, _, name = adapter.partition(":")
    version, _, percent = rest.partition("=")
    if not (model and name and version and percent.isdecimal() and int(percent) <= 100):
        raise click.BadParameter(f"{option!r} is not MODEL:NAME@VERSION=PERCENT, PERCENT 0 to 100", param_hint="--share")
    return model, name, version, int(percent)
