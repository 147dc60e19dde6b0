"""`python -m knative kv`: what idle conversations take in the store, and taking it away."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from knative.commands.sources.store_access import StoreOptions, open_store, store_options
from knative.spec.pipeline_spec import KV_PREFIX
from storage.kv.kv_store import Retention, pipeline_and_layers
from storage.store.object_reader import ObjectInfo
from storage.store.payload_store import PayloadStore

_MIB: Final = 2**20


@click.command()
@click.option("--prefix", default=KV_PREFIX, show_default=True, help="Where a spec's kv_store has them in the bucket.")
@click.option("--prune", is_flag=True, help="Delete what is too old or too much; without either, everything.")
@click.option("--pipeline", help="Only that of this fingerprint, or of what it begins with.")
@click.option("--max-age-hours", type=click.FloatRange(min=0), help="With --prune: what was written longer ago goes.")
@click.option("--max-mib", type=click.IntRange(min=0), help="With --prune: the oldest beyond so much go.")
@store_options
def kv(
    store: StoreOptions, prefix: str, prune: bool, pipeline: str | None, max_age_hours: float | None, max_mib: int | None
) -> None:
    """Show what idle conversations take in the store, by pipeline and stage, and prune it.

    What is deleted is computed again when somebody goes on.

    \b
    python -m knative kv
    python -m knative kv --prune --max-age-hours 24
    python -m knative kv --prune --pipeline 1f0a
    """
    if not prune and (max_age_hours, max_mib) != (None, None):
        raise click.UsageError("--max-age-hours and --max-mib say what --prune deletes: add it")
    console, now = Console(), datetime.now(UTC)
    with open_store(store) as opened, PayloadStore(opened.settings) as objects:
        found = [one for one in objects.list(prefix.strip("/") + "/") if _of_pipeline(one, prefix, pipeline)]
        if prune:
            over = _over(found, max_age_hours, max_mib, now)
            for one in over:
                objects.delete(one.key)
            freed = sum(one.bytes for one in over)
            console.out(f"{len(over)} objects deleted, {freed / _MIB:.1f} MiB", highlight=False)
            found = [one for one in found if one not in over]
    console.print(_table(found, prefix, now) if found else "nothing is kept", highlight=False)


def _of_pipeline(found: ObjectInfo, prefix: str, pipeline: str | None) -> bool:
    return pipeline_and_layers(found.key, prefix)[0].startswith(pipeline or "")


def _over(found: list[ObjectInfo], max_age_hours: float | None, max_mib: int | None, now: datetime) -> list[ObjectInfo]:
    if max_age_hours is None and max_mib is None:
        return found
    age = timedelta.max if max_age_hours is None else timedelta(hours=max_age_hours)
    most = sum(one.bytes for one in found) if max_mib is None else max_mib * _MIB
    return Retention(most, age).expired(found, now)


def _table(found: Iterable[ObjectInfo], prefix: str, now: datetime) -> Table:
    by_stage: defaultdict[tuple[str, str], list[ObjectInfo]] = defaultdict(list)
    for one in found:
        by_stage[pipeline_and_layers(one.key, prefix)].append(one)
    table = Table("pipeline", "layers", "objects", "MiB", "oldest", "newest", box=None)
    for (pipeline, layers), objects in sorted(by_stage.items()):
        ages = [(now - one.modified).total_seconds() / 3600 for one in objects]
        size = sum(one.bytes for one in objects) / _MIB
        table.add_row(pipeline, layers, str(len(objects)), f"{size:.1f}", f"{max(ages):.1f} h", f"{min(ages):.1f} h")
    return table
