"""`python -m knative delete`: takes a pipeline off a cluster."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from knative.commands.sources.cluster_access import cluster_options, pipeline_options, say, timeout_option

if TYPE_CHECKING:
    from knative.cluster.client import Cluster


@click.command()
@pipeline_options
@timeout_option
@cluster_options
def delete(name: str, namespace: str | None, timeout: float, connect: "Callable[[], Cluster]") -> None:
    """Delete PIPELINE (its name, or the file of its spec) with everything that was made for it.

    The published model stays in the store, and a token Secret that another pipeline uses, too, where it is.
    """
    from knative.cluster.deployer import Deployer

    cluster = connect()
    where = namespace or cluster.default_namespace
    count = Deployer(cluster, where, say, timeout).delete(name)
    click.echo(f"{count} objects deleted" if count else f"nothing of {name} is in namespace {where}")
