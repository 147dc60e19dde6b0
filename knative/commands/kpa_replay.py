"""`python -m knative kpa-replay FILE`: recorded Knative decisions against the local autoscaler's."""

from pathlib import Path
from typing import Final

import click

from knative.local.autoscaler.replay import TraceError, replay

_SHOWN: Final = 10


@click.command("kpa-replay")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def kpa_replay(file: Path) -> None:
    """Replay recorded traces of Knative's autoscaler (JSON lines, plain or gzip) through the local one.

    Prints `N decisions, M differ`, and the first differences to standard error; status 1 where any differ.
    """
    try:
        result = replay(file)
    except (TraceError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for difference in result.differences[:_SHOWN]:
        click.echo(str(difference), err=True)
    click.echo(f"{result.decisions} decisions, {len(result.differences)} differ")
    raise SystemExit(1 if result.differences else 0)
