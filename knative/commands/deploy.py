"""Commands that change a pipeline on a cluster: preflight, deploy, promote, abort, rollback, rotate-token, delete."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knative.commands.fleet import deploy_fleet
from knative.commands.manifest_files import read_rendered
from knative.commands.options import (
    FILE,
    OpenStore,
    cluster_options,
    force_option,
    image_option,
    pipeline_options,
    say,
    store_options,
    timeout_option,
)
from knative.commands.render import fleet_objects, read_spec, rendered_objects
from knative.render.fleet import door_files
from knative.spec.fleet_spec import is_fleet
from knative.spec.kubernetes_object import KubernetesObject

if TYPE_CHECKING:
    from knative.cluster.client import Cluster
    from knative.cluster.deployer import Deployer


def _on_a_pipeline(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds PIPELINE and the options of the cluster. The command gets the pipeline's `name` and a `deployer`."""

    @pipeline_options
    @timeout_option
    @cluster_options
    @functools.wraps(command)
    def with_deployer(
        *args: Any, namespace: str | None, timeout: float, connect: "Callable[[], Cluster]", **kwargs: Any
    ) -> Any:
        from knative.cluster.deployer import Deployer

        cluster = connect()
        deployer = Deployer(cluster, namespace or cluster.default_namespace, say, timeout)
        return command(*args, deployer=deployer, **kwargs)

    return with_deployer


@click.command(short_help="Deploy a pipeline to a cluster.")
@click.argument("spec", metavar="SPEC|FOLDER", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--dry-run", type=click.Choice(["server"]), help="Change nothing; print the difference that the cluster computes."
)
@click.option(
    "--canary",
    type=click.IntRange(1, 99),
    metavar="PERCENT",
    help="Run beside the serving pipeline and take this percentage of requests; then `promote` or `abort`.",
)
@click.option("--member", help="Of a Fleet: deploy this member only.")
@image_option
@timeout_option
@force_option
@cluster_options
@store_options
def deploy(
    spec: Path,
    dry_run: str | None,
    canary: int | None,
    member: str | None,
    image: str | None,
    timeout: float,
    force_conflicts: bool,
    connect: "Callable[[], Cluster]",
    open_store: OpenStore,
) -> None:
    """Deploy the pipeline of SPEC, or of a FOLDER that `render` wrote, to a cluster, and print the gateway's URL.

    SPEC may be a Fleet. Its members are deployed one after the other, and those that it no longer has are deleted.

    New stages start beside the old ones, then the gateway switches; old stages are deleted after their last answer. The command
    ends when everything is Ready, Eventing included. Deploying the same again changes nothing. If another deployment of the
    pipeline is under way, the command names its holder and stops.

    \b
    python -m knative deploy pipeline.yaml --dry-run=server
    python -m knative deploy another-cut.yaml --canary 10
    python -m knative deploy fleet.yaml --member chat --canary 10
    python -m knative render pipeline.yaml --output manifests/; python -m knative deploy manifests/
    python -m knative ask "$(python -m knative deploy pipeline.yaml)" "Hello?"
    """
    fleet = None
    door: list[KubernetesObject] = []
    if spec.is_file() and is_fleet(spec):
        if canary is not None and member is None:
            raise click.UsageError("--canary needs --member: a canary runs beside one member of a fleet")
        fleet, members = fleet_objects(spec, open_store, image, member)
        objects = [each for files in members.values() for found in files.values() for each in found]
        door = [] if member else [each for found in door_files(fleet).values() for each in found]
    elif member is not None:
        raise click.UsageError("--member is for a Fleet")
    elif spec.is_file():
        objects = rendered_objects(read_spec(spec, image), open_store)
    elif image is not None:
        raise click.UsageError("--image needs a SPEC; manifests in a folder name their image themselves")
    else:
        objects = read_rendered(spec)
    from knative.cluster.deployer import Deployer

    namespace = objects[0]["metadata"]["namespace"] if fleet is None else fleet.namespace
    deployer = Deployer(connect(), namespace, say, timeout)
    if dry_run:
        click.echo("\n".join(deployer.diff([*door, *objects])) or "nothing would change")
    elif canary is not None:
        click.echo(deployer.canary(objects, canary, force=force_conflicts))
    elif fleet is not None:
        click.echo(deploy_fleet(deployer, fleet, members, whole=member is None, force=force_conflicts))
    else:
        click.echo(deployer.deploy(objects, force=force_conflicts))


@click.command(short_help="List what a cluster lacks for a pipeline.")
@click.argument("spec", type=FILE)
@image_option
@cluster_options
@store_options
def preflight(spec: Path, image: str | None, connect: "Callable[[], Cluster]", open_store: OpenStore) -> None:
    """List everything that a cluster lacks for the pipeline of SPEC. If nothing, create the pipeline's token Secret.

    `deploy` starts with the same checks. Use this command before kn, kubectl or GitOps apply the manifests.
    """
    objects = rendered_objects(read_spec(spec, image), open_store)
    from knative.cluster.pipeline_token import ensure_token
    from knative.cluster.preflight import check

    cluster = connect()
    check(cluster, objects, say)
    ensure_token(cluster, objects, say)
    click.echo("nothing is missing")


@click.command(short_help="Send all requests to the canary.")
@_on_a_pipeline
@force_option
def promote(name: str, deployer: "Deployer", force_conflicts: bool) -> None:
    """Send all requests of PIPELINE (its name, or the file of its spec) to its canary, and print the gateway's URL.

    The previous pipeline is deleted after its last answer, as in any deployment. Eventing, monitoring and network follow the
    canary.
    """
    click.echo(deployer.promote(name, force=force_conflicts))


@click.command(short_help="Remove the canary.")
@_on_a_pipeline
@force_option
def abort(name: str, deployer: "Deployer", force_conflicts: bool) -> None:
    """Remove the canary of PIPELINE (its name, or the file of its spec), and print the gateway's URL.

    The canary gets no more requests at once; it finishes its answers, then its stages are deleted.
    """
    click.echo(deployer.abort(name, force=force_conflicts))


@click.command(short_help="Deploy an earlier version of a pipeline.")
@_on_a_pipeline
@click.option(
    "--to",
    "number",
    type=click.IntRange(min=1),
    help="Number of the version. Default: the last that served, or the one before.",
)
@force_option
def rollback(name: str, deployer: "Deployer", number: int | None, force_conflicts: bool) -> None:
    """Deploy an earlier version of PIPELINE (its name, or the file of its spec), and print the gateway's URL.

    After a failed deployment this is the version that still serves, and the leftovers of the failure are deleted. Otherwise it
    is the version that served before. The cluster keeps the last ten versions. A rollback is a deployment like any other: old
    stages run beside new ones until the gateway has switched.
    """
    click.echo(deployer.rollback(name, number, force=force_conflicts))


@click.command("rotate-token", short_help="Replace the token between gateway and stages.")
@_on_a_pipeline
@force_option
def rotate_token(name: str, deployer: "Deployer", force_conflicts: bool) -> None:
    """Replace the token between gateway and stages of PIPELINE (its name, or the file of its spec), or of a Fleet.

    Pods are replaced three times: stages accept both tokens, gateways send the new one, the old one becomes invalid. No answer
    is lost. Prints the gateway's URL. If it is interrupted, run it again: it continues. Members of a Fleet share one token, and
    follow one after the other.
    """
    click.echo(deployer.rotate_token(name, force=force_conflicts))


@click.command(short_help="Delete a pipeline from a cluster.")
@_on_a_pipeline
def delete(name: str, deployer: "Deployer") -> None:
    """Delete PIPELINE (its name, or the file of its spec) with everything that was created for it; of a Fleet all members.

    The published model stays in the store. A token Secret that another pipeline uses stays as well.
    """
    count = sum(map(deployer.delete, deployer.members_of(name))) + deployer.delete(name)
    click.echo(f"{count} objects deleted" if count else f"nothing of {name} is in namespace {deployer.namespace}")
