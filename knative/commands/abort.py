"""`python -m knative abort`: the canary goes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from knative.commands.sources.cluster_access import cluster_options, force_option, pipeline_options, say, timeout_option

if TYPE_CHECKING:
    from knative.cluster.client import Cluster


@click.command()
@pipeline_options
@timeout_option
@force_option
@cluster_options
def abort(name: str, namespace: str | None, timeout: float, force_conflicts: bool, connect: "Callable[[], Cluster]") -> None:
    """Take the canary of PIPELINE (its name, or the file of its spec) away, and print the gateway's URL.

    It gets no more requests at once; answers that it has begun are finished, then its stages go.
    """
    from knative.cluster.deployer import Deployer

    cluster = connect()
    deployer = Deployer(cluster, namespace or cluster.default_namespace, say, timeout)
    click.echo(deployer.abort(name, force=force_conflicts))
