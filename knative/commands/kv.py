"""`python -m knative kv`: shows and prunes keys and values of idle conversations in the store."""

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from knative.commands.options import OpenStore, store_options
from knative.spec.pipeline_spec import KV_PREFIX
from storage.kv.kv_store import Retention, pipeline_and_layers
from storage.store.object_reader import ObjectInfo
from storage.store.payload_store import PayloadStore

_MIB: Final = 2**20


@click.command(short_help="Show and prune the storage of idle conversations.")
@click.option("--prefix", default=KV_PREFIX, show_default=True, help="Prefix in the bucket, as in the spec's kv_store.")
@click.option("--prune", is_flag=True, help="Delete what is beyond the age or size; without either, delete everything.")
@click.option("--pipeline", help="Only pipelines whose fingerprint begins with this.")
@click.option("--max-age-hours", type=click.FloatRange(min=0), help="With --prune: delete older objects.")
@click.option("--max-mib", type=click.IntRange(min=0), help="With --prune: delete the oldest objects beyond this size.")
@store_options
def kv(
    open_store: OpenStore, prefix: str, prune: bool, pipeline: str | None, max_age_hours: float | None, max_mib: int | None
) -> None:
    """Show the storage of idle conversations by pipeline and stage, and prune it.

    Deleted keys and values are computed again when their conversation continues.

    \b
    python -m knative kv
    python -m knative kv --prune --max-age-hours 24
    python -m knative kv --prune --pipeline 1f0a
    """
    if not prune and (max_age_hours, max_mib) != (None, None):
        raise click.UsageError("--max-age-hours and --max-mib need --prune")
    console, now = Console(), datetime.now(UTC)
    with open_store() as opened, PayloadStore(opened.settings) as objects:
        listed = objects.list(prefix.strip("/") + "/")
        found = [each for each in listed if pipeline_and_layers(each.key, prefix)[0].startswith(pipeline or "")]
        if prune:
            over = _over(found, max_age_hours, max_mib, now)
            for each in over:
                objects.delete(each.key)
            freed = sum(each.bytes for each in over)
            console.out(f"{len(over)} objects deleted, {freed / _MIB:.1f} MiB", highlight=False)
            found = [each for each in found if each not in over]
    console.print(_table(found, prefix, now) if found else "nothing is stored", highlight=False)


def _over(found: list[ObjectInfo], max_age_hours: float | None, max_mib: int | None, now: datetime) -> list[ObjectInfo]:
    if max_age_hours is None and max_mib is None:
        return found
    age = timedelta.max if max_age_hours is None else timedelta(hours=max_age_hours)
    most = sum(each.bytes for each in found) if max_mib is None else max_mib * _MIB
    return Retention(most, age).expired(found, now)


def _table(found: list[ObjectInfo], prefix: str, now: datetime) -> Table:
    by_stage: defaultdict[tuple[str, str], list[ObjectInfo]] = defaultdict(list)
    for each in found:
        by_stage[pipeline_and_layers(each.key, prefix)].append(each)
    table = Table("pipeline", "layers", "objects", "MiB", "oldest", "newest", box=None)
    for (pipeline, layers), objects in sorted(by_stage.items()):
        ages = [(now - each.modified).total_seconds() / 3600 for each in objects]
        size = sum(each.bytes for each in objects) / _MIB
        table.add_row(pipeline, layers, str(len(objects)), f"{size:.1f}", f"{max(ages):.1f} h", f"{min(ages):.1f} h")
    return table
