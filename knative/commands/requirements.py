"""`python -m knative requirements`: which list of packages a model takes beside the lean one. The Makefile asks."""

import click

from knative.commands.sources.model_fit import best_dtype, torch_needed
from knative.spec.model_sources import DEFAULT_MODEL, packaged_model
from knative.spec.pipeline_spec import DTYPES
from storage.checkpoints.model_source import locate, open_checkpoint
from storage.errors import CheckpointInvalid, LibraryMissing

_TORCH: str = "requirements-torch.txt"


@click.command()
@click.option("--model", help="A folder, GGUF file or hub id, which is fetched. Default: the packaged one.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: the one that `run` would take.")
def requirements(model: str | None, dtype: str | None) -> None:
    """Print the list of packages that a model takes beside requirements-lean.txt, and on standard error why; else nothing.

    \b
    python -m knative requirements --model ./my-model --dtype bfloat16
    """
    reason = _reason(model, dtype)
    if reason is not None:
        click.echo(f"{model or DEFAULT_MODEL} takes torch: {reason}", err=True)
        click.echo(_TORCH)


def _reason(model: str | None, dtype: str | None) -> str | None:
    try:
        path = locate(packaged_model() if model in (None, DEFAULT_MODEL) else model)
    except CheckpointInvalid:
        return None  # a published name, or nothing: `run` says so
    try:
        checkpoint = open_checkpoint(path)
    except LibraryMissing as error:
        return str(error)
    return torch_needed(checkpoint.config, dtype or best_dtype(checkpoint))
