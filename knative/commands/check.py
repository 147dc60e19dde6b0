"""`python -m knative check FILE…`: would a cluster's Knative accept these Services?"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from knative.commands.sources.cluster_access import cluster_options
from knative.commands.sources.manifest_files import FileObject, ManifestError, read_manifests
from knative.webhook.check import in_one_line, is_knative_service, validate, warnings
from knative.webhook.feature_flags import FeatureFlags, NoFeatures, read_features

if TYPE_CHECKING:
    from knative.cluster.client import Cluster


@click.command("check")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--features",
    metavar="FILE|cluster",
    help="Feature flags of the cluster: a file with its ConfigMap config-features, or `cluster` to ask it. Default: Knative's.",
)
@cluster_options
def check(files: tuple[Path, ...], features: str | None, connect: "Callable[[], Cluster]") -> None:
    """Say for each Knative Service in each FILE (YAML, several documents, or JSON) whether Knative's webhook would accept it.

    Prints `FILE: accepted` or `FILE: refused: REASON`, with the Service's name behind FILE where there are several, and
    `FILE: warning: …` for what Knative accepts in silence and is surely a mistake. Status 1 where a Service is refused or
    a file cannot be read.

    \b
    python -m knative check manifests/*.yaml
    kubectl --namespace knative-serving get configmap config-features --output yaml > features.yaml
    python -m knative check --features features.yaml manifests/*.yaml
    """
    flags, good = _flags(features, connect), True
    for file in files:
        try:
            good &= _check(file, read_manifests(file), flags)
        except ManifestError as error:
            click.echo(str(error), err=True)
            good = False
    raise SystemExit(0 if good else 1)


def _flags(features: str | None, connect: "Callable[[], Cluster]") -> FeatureFlags:
    if features is None:
        return FeatureFlags()
    if features == "cluster":
        return _of_cluster(connect())
    try:
        found = read_manifests(Path(features))
        return read_features(found[0].object if found else None)
    except ManifestError as error:
        raise click.ClickException(str(error)) from error
    except NoFeatures as error:
        raise click.ClickException(f"{features}: {error}") from error


def _of_cluster(cluster: "Cluster") -> FeatureFlags:
    from knative.cluster.client import Ref

    where = Ref("v1", "ConfigMap", "knative-serving", "config-features")
    found = cluster.get(where)
    if found is None:
        raise click.ClickException(f"{where} is not there; is Knative Serving in another namespace? Give a file instead")
    return read_features(found)


def _check(file: Path, manifests: list[FileObject], flags: FeatureFlags) -> bool:
    services = [manifest for manifest in manifests if is_knative_service(manifest.object)]
    for manifest in manifests:
        if manifest not in services:
            click.echo(
                f"{file}: note: {manifest.kind} {manifest.name} is no Knative Service and was passed over".replace("  ", " ")
            )
    if not services:
        click.echo(f"{file}: note: no Knative Service in it")
    accepted = True
    for service in services:
        label = f"{file} {service.name}" if len(services) > 1 else str(file)
        violations = validate(service.object, features=flags)
        accepted &= not violations
        click.echo(f"{label}: refused: {in_one_line(violations)}" if violations else f"{label}: accepted")
        for warning in () if violations else _warnings(service):
            click.echo(f"{label}: warning: {warning}")
    return accepted


def _warnings(service: FileObject) -> Iterator[str]:
    for warning in warnings(service.object):
        yield f"{warning.field}: {warning.reason}"
    for key in service.repeated_keys:
        yield f"{key} stands twice; only the last one counts"
