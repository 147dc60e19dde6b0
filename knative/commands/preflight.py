"""`python -m knative preflight`: whether a cluster has what a pipeline needs, and the Secret that no person makes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from knative.commands.render import image_option, read_spec, rendered_objects
from knative.commands.sources.cluster_access import cluster_options, say
from knative.commands.sources.store_access import StoreOptions, store_options

if TYPE_CHECKING:
    from knative.cluster.client import Cluster


@click.command()
@click.argument("spec", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@image_option
@cluster_options
@store_options
def preflight(spec: Path, image: str | None, connect: "Callable[[], Cluster]", store: StoreOptions) -> None:
    """Say all that a cluster lacks for the pipeline that SPEC describes; if nothing, make its token Secret where there is none.

    `deploy` begins with it. By itself it is for manifests that kn, kubectl or GitOps apply.
    """
    objects = rendered_objects(read_spec(spec, image), store)
    from knative.cluster.pipeline_token import ensure_token
    from knative.cluster.preflight import check

    cluster = connect()
    check(cluster, objects, say)
    ensure_token(cluster, objects, say)
    click.echo("nothing is missing")
