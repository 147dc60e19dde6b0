"""Cold starts: loading against its contenders, first tokens against a cold monolith, load phases by the cut, imports.

    python -m bench.coldstart

One run prints the tables and writes its section of docs/benchmarks.md and docs/coldstart.png; status 1 where something that
must show does not. The page cache is warm: what is cold is every process. Needs requirements-bench.txt.
"""

import asyncio
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from bench.coldstart.imports import measure_imports
from bench.coldstart.loading import measure_loading
from bench.coldstart.models import publish_large, publish_smollm2
from bench.coldstart.monolith import publish_monolith
from bench.coldstart.plot import draw
from bench.coldstart.report import Results, markdown, verdicts
from bench.coldstart.runs import ColdStart, Surroundings, cold_monolith, cold_pipeline
from bench.report import machine, write_section
from knative.local.platform import ROOT
from storage.models.model_repository import ModelManifest
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore

_DOCUMENT: Final = ROOT / "docs" / "benchmarks.md"
_PICTURE: Final = ROOT / "docs" / "coldstart.png"
_FOLDER: Final = ROOT / ".lamina" / "coldstart"
_CUTS: Final = (1, 2, 3, 5)
_IMPORT_ROUNDS: Final = 7


@dataclass
class ColdStarts:
    """Filled round by round, so that what else the machine does meets all alike."""

    monolith: list[ColdStart]
    monolith_limited: list[ColdStart]
    stages: list[ColdStart]
    cached: list[ColdStart]
    limited: dict[int, list[ColdStart]]


def say(text: str) -> None:
    click.echo(text, err=True)


async def measure_cold_starts(around: Surroundings, bytes_per_second: float, rounds: int) -> ColdStarts:
    found = ColdStarts([], [], [], [], {stages: [] for stages in _CUTS})
    cache = around.logs.parent / "weights"
    await cold_pipeline(around, 3, weights_cache=cache)  # fills it
    for _ in range(rounds):
        found.stages.append(_told("3 stages", await cold_pipeline(around, 3)))
        found.cached.append(_told("3 stages, cache", await cold_pipeline(around, 3, weights_cache=cache)))
        found.monolith.append(_told("monolith", await cold_monolith(around)))
        limited = await cold_monolith(around, bytes_per_second=bytes_per_second)
        found.monolith_limited.append(_told("monolith, limited", limited))
        for stages, runs in found.limited.items():
            run = await cold_pipeline(around, stages, bytes_per_second=bytes_per_second)
            runs.append(_told(f"stages: {stages}, limited", run))
    return found


def _told(name: str, run: ColdStart) -> ColdStart:
    say(f"{name}: first token after {run.first_token_seconds:.2f} s")
    return run


def measure(folder: Path, rounds: int, bytes_per_second: float) -> Results:
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with EmbeddedStore(folder / "store") as embedded:
        store = ObjectStore(embedded.settings)
        say("publishing")
        large, small = publish_large(store, folder), publish_smollm2(store)
        publish_monolith(store, small)
        imports = measure_imports(_IMPORT_ROUNDS, say)
        loading = measure_loading(store.settings, large, folder / "cache", rounds, say)
        starts = asyncio.run(measure_cold_starts(Surroundings(store, small, logs), bytes_per_second, rounds))
    return Results(
        loading=loading,
        loading_bytes=_total_bytes(large),
        bytes_per_second=bytes_per_second,
        monolith=starts.monolith,
        monolith_limited=starts.monolith_limited,
        stages=starts.stages,
        cached=starts.cached,
        limited=starts.limited,
        imports=imports,
    )


def _total_bytes(manifest: ModelManifest) -> int:
    return sum(stored.bytes for stored in manifest.objects.values())


def _section(text: str, rounds: int) -> str:
    command = f"`python -m bench.coldstart --rounds {rounds}`"
    model = "SmolLM2-135M-Instruct in bfloat16 where not said otherwise; medians. Every process is cold, the page cache is warm"
    picture = f"![waits of a cold request; load phase by the cut]({_PICTURE.name})"
    return f"## Cold start\n\n{command} · {machine()} · {model}.\n\n{text}\n\n{picture}"


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Medians of so many.")
@click.option("--bytes-per-second", type=click.FloatRange(min=1), default=50e6, show_default=True, help="Of each pod.")
@click.option("--folder", type=click.Path(path_type=Path), default=_FOLDER, help="Store and models, kept for the next run.")
@click.option("--print-only", is_flag=True, help="Leave docs/ alone.")
def main(rounds: int, bytes_per_second: float, folder: Path, print_only: bool) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    results = measure(folder, rounds, bytes_per_second)
    text = markdown(results)
    click.echo(text)
    if not print_only:
        draw(results, _PICTURE)
        write_section(_DOCUMENT, "coldstart", _section(text, rounds))
    sys.exit(0 if all(verdict.holds for verdict in verdicts(results)) else 1)


if __name__ == "__main__":
    main()
