"""What BLAKE3 costs while a stage loads: `python -m bench.digest`.

The packaged model in fp32 out of the embedded store, whole, over the loader's own connections, in one process; every way of
checking in turn, round after round, so that what else the machine does is fair. The costs are medians of the rounds' ratios.
Prints a table for docs/log.md; status 1 where BLAKE3 takes more than a tenth of the loading time.
"""

import os
import sys
import time
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from bench.digest.contenders import CONTENDERS, checking_by
from bench.digest.report import MOST, Load, cost, in_turn, table
from bench.report import machine
from knative.commands.sources.local_pipeline import ensure_published
from knative.local.platform import ROOT
from storage.loading.weight_loader import iterate_layers
from storage.models.model_repository import ModelManifest
from storage.store.embedded import EmbeddedStore
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore

_STATE: Final = ROOT / ".lamina" / "digest"


def load(reader: ObjectReader, manifest: ModelManifest) -> Load:
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in iterate_layers(reader, manifest, 0, manifest.num_layers):
        pass
    return Load(time.perf_counter() - began, time.process_time() - cpu_began)


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=25, show_default=True)
@click.option("--state", type=click.Path(path_type=Path), default=_STATE, help="Its store keeps the model.")
def main(rounds: int, state: Path) -> None:
    loads: dict[str, list[Load]] = {name: [] for name in CONTENDERS}
    with EmbeddedStore(state / "store") as embedded, ObjectReader(embedded.settings) as reader:
        manifest = ensure_published(ObjectStore(embedded.settings), None, "float32", Console(stderr=True))
        for number in range(-1, rounds):
            for name in in_turn(list(CONTENDERS), number):
                with checking_by(CONTENDERS[name]):
                    seen = load(reader, manifest)
                if number >= 0:  # The first round finds the pages of the files.
                    loads[name].append(seen)
    total = sum(stored.bytes for stored in manifest.objects.values())
    click.echo(
        f"{machine()}, load {os.getloadavg()[0]:.1f}; {manifest.name} in float32, {total / 2**20:.0f} MiB; {rounds} rounds\n"
    )
    click.echo(table(loads))
    found = cost(loads)
    click.echo(f"\nBLAKE3 costs {found:.1%} of the loading time; wanted: at most {MOST:.0%}")
    sys.exit(0 if found <= MOST else 1)


if __name__ == "__main__":
    main()
