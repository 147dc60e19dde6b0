"""`python -m knative rotate-token`: another token between gateway and stages."""

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
def rotate_token(
    name: str, namespace: str | None, timeout: float, force_conflicts: bool, connect: "Callable[[], Cluster]"
) -> None:
    """Give PIPELINE (its name, or the file of its spec) another token between gateway and stages, and print the gateway's URL.

    Three times new pods, the old ones beside them: stages take both tokens, gateways send the new one, the old one is good for
    nothing. No answer is lost. Interrupted, it is called again and goes on.
    """
    from knative.cluster.deployer import Deployer

    cluster = connect()
    deployer = Deployer(cluster, namespace or cluster.default_namespace, say, timeout)
    click.echo(deployer.rotate_token(name, force=force_conflicts))
