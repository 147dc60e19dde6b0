"""`python -m knative rollback`: back to what was deployed before."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from knative.commands.sources.cluster_access import cluster_options, force_option, pipeline_options, say, timeout_option

if TYPE_CHECKING:
    from knative.cluster.client import Cluster


@click.command()
@pipeline_options
@click.option(
    "--to",
    "number",
    type=click.IntRange(min=1),
    help="Number of the version; by default what last served, or what served before that.",
)
@timeout_option
@force_option
@cluster_options
def rollback(
    name: str,
    number: int | None,
    namespace: str | None,
    timeout: float,
    force_conflicts: bool,
    connect: "Callable[[], Cluster]",
) -> None:
    """Deploy again what PIPELINE (its name, or the file of its spec) was before, and print the gateway's URL.

    After a deploy that failed that is what serves still, and what the failure left is taken away; after one that did not, what
    served before. The cluster itself remembers ten versions. Going back is a deploy like any other: old stages beside the new
    ones, then the gateway moves.
    """
    from knative.cluster.deployer import Deployer

    cluster = connect()
    deployer = Deployer(cluster, namespace or cluster.default_namespace, say, timeout)
    click.echo(deployer.rollback(name, number, force=force_conflicts))
