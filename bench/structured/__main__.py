"""`python -m bench.structured`: what a token costs with a grammar and without; then 200 random schemas and the like at
temperature 1 through three stages, one of which is killed now and then, and whether answers are as asked.

Exit status 1 where an answer is not as asked. Needs the packages of requirements-bench.txt; the first part a machine with
nothing else to do.
"""

import asyncio
import os
import signal
import sys
import time
from os import getloadavg
from pathlib import Path
from typing import Final

import click
import psutil

from bench.pipeline import RunningPipeline, running_pipeline
from bench.report import ROOT, machine, write_section
from bench.structured.asking import Ended, ask_all
from bench.structured.report import markdown
from bench.structured.speed import compare

_STATE: Final = ROOT / ".lamina" / "bench-structured"
_MAX_TOKENS: Final = 256
_KILL_ANSWERS: Final = 30
"""After so many a stage is killed, each in its turn: one that is killed often is started ever later, as on a cluster."""


@click.command(help=__doc__)
@click.option("--dtype", default="int8", show_default=True)
@click.option("--cases", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Turns with and without a grammar.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "docs" / "benchmarks.md")
def main(dtype: str, cases: int, rounds: int, output: Path) -> None:
    began, load = time.monotonic(), getloadavg()[0]
    with running_pipeline(dtype, _STATE / dtype) as pipeline:
        ratios = [asyncio.run(compare(pipeline.direct_url, pipeline.model, at_once, rounds)) for at_once in (1, 8)]
        for ratio in ratios:
            click.echo(f"{ratio.at_once} at once: {ratio.ratio:.3f} of the time per token without")
        found, kills = asyncio.run(_killed(pipeline, cases))
    command = " ".join(["python -m bench.structured", *sys.argv[1:]])
    facts = (
        f"`{command}` on {machine()}; SmolLM2-135M-Instruct in {dtype}, three stages. The run took "
        f"{time.monotonic() - began:.0f} s; the load average before it was {load:.1f}."
    )
    write_section(output, "structured", markdown(list(found.values()), kills, ratios, facts))
    wrong = [answer for answer in found.values() if not answer.fits]
    for answer in wrong:
        click.echo(f"case {answer.number}: {answer.text!r}")
    click.echo(f"{len(found)} answers, {kills} kills, {len(wrong)} not as asked")
    sys.exit(bool(wrong))


async def _killed(pipeline: RunningPipeline, cases: int) -> tuple[dict[int, Ended], int]:
    """By the gateway of the platform, which knows of stages that are away."""
    found: dict[int, Ended] = {}
    kills = 0
    asked = asyncio.create_task(ask_all(pipeline.url, pipeline.model, range(cases), _MAX_TOKENS, found))
    while not (await asyncio.wait([asked], timeout=0.1))[0]:
        stages = _stages(pipeline) if len(found) >= _KILL_ANSWERS * (kills + 1) else []
        if len(stages) == len(pipeline.stages):
            os.kill(stages[kills % len(stages)], signal.SIGKILL)
            kills += 1
    await asked
    return found, kills


def _stages(pipeline: RunningPipeline) -> list[int]:
    """Process ids of stages that run, children of the platform all; the first stage's first."""
    children = psutil.Process(pipeline.pids[0]).children(recursive=True)
    told = {child.pid: _environ(child) for child in children}
    stages = {pid: int(told[pid]["LAMINA_LAYERS"].split(":")[0]) for pid in told if told[pid].get("LAMINA_ROLE") == "stage"}
    return sorted(stages, key=stages.__getitem__)


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        environ: dict[str, str] = process.environ()
    except psutil.Error:
        return {}
    return environ


if __name__ == "__main__":
    main()
