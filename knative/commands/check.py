"""`python -m knative check FILE…`: would a cluster's Knative accept these Services?"""

from collections.abc import Iterator
from pathlib import Path

import click

from knative.commands.sources.manifest_files import FileObject, ManifestError, read_manifests
from knative.webhook.check import in_one_line, is_knative_service, validate, warnings


@click.command("check")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
def check(files: tuple[Path, ...]) -> None:
    """Say for each Knative Service in each FILE (YAML, several documents, or JSON) whether Knative's webhook would accept it.

    Prints `FILE: accepted` or `FILE: refused: REASON`, with the Service's name behind FILE where there are several, and
    `FILE: warning: …` for what Knative accepts in silence and is surely a mistake. Status 1 where a Service is refused or
    a file cannot be read.
    """
    good = True
    for file in files:
        try:
            good &= _check(file, read_manifests(file))
        except ManifestError as error:
            click.echo(str(error), err=True)
            good = False
    raise SystemExit(0 if good else 1)


def _check(file: Path, manifests: list[FileObject]) -> bool:
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
        violations = validate(service.object)
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
