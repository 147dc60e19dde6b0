"""`python -m knative list`: the pipelines of a cluster."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click
from rich.console import Console

from knative.commands.sources.cluster_access import cluster_options, say
from knative.commands.terminal.console import show_table

if TYPE_CHECKING:
    from knative.cluster.client import Cluster


@click.command("list")
@click.option("--namespace", "-n", help="Only of this one. Default: all; the context's own where you may not see more.")
@cluster_options
def list_(namespace: str | None, connect: "Callable[[], Cluster]") -> None:
    """List all pipelines of a cluster: whether they are ready, how many pods they have, where they answer."""
    cluster = connect()
    from knative.cluster.inventory import COLUMNS, pipelines

    rows = pipelines(cluster, namespace, say)
    if not rows:
        say(f"no pipeline is in {namespace or 'any namespace'} of {cluster.description}")
        return
    show_table(Console(), "", COLUMNS, rows)
