"""`python -m knative promote`: the canary gets all requests."""

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
def promote(name: str, namespace: str | None, timeout: float, force_conflicts: bool, connect: "Callable[[], Cluster]") -> None:
    """Give all requests of PIPELINE (its name, or the file of its spec) to its canary, and print the gateway's URL.

    What served before goes when its last answer ended, as after any deploy; Eventing, monitoring and network move along.
    """
    from knative.cluster.deployer import Deployer

    cluster = connect()
    deployer = Deployer(cluster, namespace or cluster.default_namespace, say, timeout)
    click.echo(deployer.promote(name, force=force_conflicts))
