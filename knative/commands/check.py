"""Comparisons with Knative: `check` with its webhook, `kpa-replay` with recorded decisions of its autoscaler."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from knative.commands.manifest_files import FileObject, ManifestError, read_manifests
from knative.commands.options import FILE, cluster_options
from knative.local.autoscaler.replay import TraceError, replay
from knative.webhook.check import in_one_line, is_knative_service, validate, warnings
from knative.webhook.feature_flags import FeatureFlags, NoFeatures, read_features

if TYPE_CHECKING:
    from knative.cluster.client import Cluster

_SHOWN_DIFFERENCES: Final = 10


@click.command("check", short_help="Check Knative Services as Knative's webhook would.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--features",
    metavar="FILE|cluster",
    help="Feature flags: a file with a cluster's ConfigMap config-features, or `cluster` to read it. Default: Knative's own.",
)
@cluster_options
def check(files: tuple[Path, ...], features: str | None, connect: "Callable[[], Cluster]") -> None:
    """Say for each Knative Service in each FILE (YAML, several documents, or JSON) whether Knative's webhook would accept it.

    Prints `FILE: accepted` or `FILE: refused: REASON`, with the Service's name after FILE if there are several, and
    `FILE: warning: …` for mistakes that Knative accepts without a word. Status 1 if a Service is refused or a file cannot be
    read.

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
        from knative.cluster.client import Ref

        where = Ref("v1", "ConfigMap", "knative-serving", "config-features")
        config_map = connect().get(where)
        if config_map is None:
            raise click.ClickException(f"{where} does not exist; is Knative Serving in another namespace? Give a file instead")
        return read_features(config_map)
    try:
        found = read_manifests(Path(features))
        return read_features(found[0].object if found else None)
    except NoFeatures as error:
        raise click.ClickException(f"{features}: {error}") from error


def _check(file: Path, manifests: list[FileObject], flags: FeatureFlags) -> bool:
    services = [manifest for manifest in manifests if is_knative_service(manifest.object)]
    for manifest in manifests:
        if manifest not in services:
            name = f"{manifest.object.get('kind', 'object without kind')} {manifest.name}".strip()
            click.echo(f"{file}: note: {name} is not a Knative Service and was skipped")
    if not services:
        click.echo(f"{file}: note: it has no Knative Service")
    accepted = True
    for service in services:
        label = f"{file} {service.name}" if len(services) > 1 else str(file)
        if violations := validate(service.object, features=flags):
            click.echo(f"{label}: refused: {in_one_line(violations)}")
            accepted = False
            continue
        click.echo(f"{label}: accepted")
        for warning in warnings(service.object):
            click.echo(f"{label}: warning: {warning.field}: {warning.reason}")
        for key in service.repeated_keys:
            click.echo(f"{label}: warning: {key} occurs twice; only the last one counts")
    return accepted


@click.command("kpa-replay", short_help="Compare the local autoscaler with recorded decisions.")
@click.argument("file", type=FILE)
def kpa_replay(file: Path) -> None:
    """Replay recorded traces of Knative's autoscaler (JSON lines, plain or gzip) through the local one.

    Prints `N decisions, M differ`, and the first differences to standard error. A decision differs if the wanted scale, an
    average, the burst capacity or the panic mode is not what Knative recorded. Status 1 if any differ.
    """
    try:
        result = replay(file)
    except (TraceError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for difference in result.differences[:_SHOWN_DIFFERENCES]:
        click.echo(str(difference), err=True)
    click.echo(f"{result.decisions} decisions, {len(result.differences)} differ")
    raise SystemExit(1 if result.differences else 0)
