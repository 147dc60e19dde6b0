"""`python -m knative deploy`: a pipeline onto a cluster, or what that would change."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from knative.commands.render import image_option, read_spec, rendered_objects
from knative.commands.sources.cluster_access import cluster_options, force_option, say, timeout_option
from knative.commands.sources.manifest_files import ManifestError
from knative.commands.sources.rendered_folder import read_rendered
from knative.commands.sources.store_access import StoreOptions, store_options
from knative.spec.kubernetes_object import KubernetesObject

if TYPE_CHECKING:
    from knative.cluster.client import Cluster


@click.command()
@click.argument("spec", metavar="SPEC|FOLDER", type=click.Path(exists=True, path_type=Path))
@click.option("--dry-run", type=click.Choice(["server"]), help="Change nothing; print the difference as the cluster sees it.")
@click.option(
    "--canary",
    type=click.IntRange(1, 99),
    metavar="PERCENT",
    help="Beside the pipeline that serves, for so many percent of the requests; then `promote` or `abort`.",
)
@image_option
@timeout_option
@force_option
@cluster_options
@store_options
def deploy(
    spec: Path,
    dry_run: str | None,
    canary: int | None,
    image: str | None,
    timeout: float,
    force_conflicts: bool,
    connect: "Callable[[], Cluster]",
    store: StoreOptions,
) -> None:
    """Bring the pipeline that SPEC describes, or that `render` wrote into FOLDER, onto a cluster, and print the gateway's URL.

    New stages come up beside the old ones; then the gateway moves; the old stages go when their last answer ended. Done means
    that everything is Ready, Eventing as well. Deploying the same again changes nothing. Of two deploys at the same time the
    second is told who is at work.

    \b
    python -m knative deploy pipeline.yaml --dry-run=server
    python -m knative deploy another-cut.yaml --canary 10
    python -m knative render pipeline.yaml --output manifests/; python -m knative deploy manifests/
    python -m knative ask "$(python -m knative deploy pipeline.yaml)" "Hello?"
    """
    objects = _objects(spec, image, store)
    from knative.cluster.deployer import Deployer

    deployer = Deployer(connect(), objects[0]["metadata"]["namespace"], say, timeout)
    if dry_run:
        lines = list(deployer.diff(objects))
        click.echo("\n".join(lines) if lines else "nothing would change")
        return
    if canary is not None:
        click.echo(deployer.canary(objects, canary, force=force_conflicts))
        return
    click.echo(deployer.deploy(objects, force=force_conflicts))


def _objects(spec: Path, image: str | None, store: StoreOptions) -> list[KubernetesObject]:
    if not spec.is_dir():
        return rendered_objects(read_spec(spec, image), store)
    if image is not None:
        raise click.UsageError("--image belongs to a spec; the manifests in a folder name their image themselves")
    try:
        return read_rendered(spec)
    except ManifestError as error:
        raise click.ClickException(str(error)) from error
