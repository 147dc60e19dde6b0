"""Which cluster a command works on: options that several commands share."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from knative.commands.sources.pipeline_name import named_pipeline

if TYPE_CHECKING:
    from knative.cluster.client import Cluster


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the command gets them as one argument `connect`, to be called once it needs the cluster."""

    @click.option("--kubeconfig", envvar="KUBECONFIG", show_envvar=True, help="File with clusters and credentials.")
    @click.option("--context", help="Context of the kubeconfig; its current one by default.")
    @functools.wraps(command)
    def with_cluster(*args: Any, kubeconfig: str | None, context: str | None, **kwargs: Any) -> Any:
        return command(*args, connect=lambda: _connect(kubeconfig, context), **kwargs)

    return with_cluster


def pipeline_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the argument PIPELINE and --namespace; the command gets `name` and `namespace`, None for the context's own."""

    @click.argument("pipeline")
    @click.option("--namespace", "-n", help="Of the pipeline. Default: the spec's, or the context's own.")
    @functools.wraps(command)
    def with_pipeline(*args: Any, pipeline: str, namespace: str | None, **kwargs: Any) -> Any:
        name, where = named_pipeline(pipeline, namespace)
        return command(*args, name=name, namespace=where, **kwargs)

    return with_pipeline


force_option = click.option("--force-conflicts", is_flag=True, help="Take over fields that someone else changed.")
timeout_option = click.option(
    "--timeout", type=click.FloatRange(min=1), default=900, show_default=True, help="Seconds to wait for each step."
)


def say(line: str) -> None:
    """Progress goes to standard error: standard output has the result alone."""
    click.echo(line, err=True)


def _connect(kubeconfig: str | None, context: str | None) -> "Cluster":
    from knative.cluster.client import Cluster  # the kubernetes client takes a third of a second to import

    return Cluster.connect(kubeconfig, context)
