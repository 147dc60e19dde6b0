"""`make bench-coldstart`: first tokens of three stages from zero, and load phases by the number of stages.

    python -m bench.coldstart

One run prints the tables and writes its section of docs/benchmarks.md; status 1 if a target is missed.
The page cache is warm: every process is cold. Needs requirements-bench.txt.
"""

import asyncio
import logging
from pathlib import Path
from typing import Final

import click

from bench.coldstart.report import Results, markdown, verdicts
from bench.coldstart.runs import ColdStart, Store, cold_pipeline
from bench.report import STATE, conclude, help_text, machine
from knative.commands.model_choice import DEFAULT_MODEL, packaged_model
from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore

_CUTS: Final = (1, 2, 3, 5)


async def measure(store: Store, bytes_per_second: float, rounds: int) -> Results:
    """All settings in each round, so that other work on the machine meets all alike."""
    found = Results(bytes_per_second, [], [], {stages: [] for stages in _CUTS})
    cache = store.logs.parent / "weights"
    await cold_pipeline(store, 3, weights_cache=cache)  # fills it
    for _ in range(rounds):
        found.stages.append(_told("3 stages", await cold_pipeline(store, 3)))
        found.cached.append(_told("3 stages, cache", await cold_pipeline(store, 3, weights_cache=cache)))
        for stages, runs in found.limited.items():
            run = await cold_pipeline(store, stages, bytes_per_second=bytes_per_second)
            runs.append(_told(f"stages: {stages}, limited", run))
    return found


def _told(name: str, run: ColdStart) -> ColdStart:
    click.echo(f"{name}: first token after {run.first_token_seconds:.2f} s", err=True)
    return run


@click.command(help=help_text(__doc__))
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Medians of so many.")
@click.option("--bytes-per-second", type=click.FloatRange(min=1), default=50e6, show_default=True, help="Of each pod.")
@click.option("--folder", type=click.Path(path_type=Path), default=STATE / "coldstart", help="Kept for the next run.")
@click.option("--print-only", is_flag=True, help="Leave docs/ alone.")
def main(rounds: int, bytes_per_second: float, folder: Path, print_only: bool) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with EmbeddedStore(folder / "store") as embedded:
        objects = ObjectStore(embedded.settings)
        manifest = publish(packaged_model(), objects, DEFAULT_MODEL, "bfloat16")
        results = asyncio.run(measure(Store(objects, manifest, logs), bytes_per_second, rounds))
    text = (
        f"## Cold start\n\n`python -m bench.coldstart --rounds {rounds}` · {machine()} · SmolLM2-135M-Instruct in bfloat16; "
        f"medians. Every process is cold, the page cache is warm.\n\n{markdown(results)}"
    )
    conclude("coldstart", text, verdicts(results), write=not print_only)


if __name__ == "__main__":
    main()
