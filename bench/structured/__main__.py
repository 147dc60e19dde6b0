"""`make bench-structured`: the cost of a token with a grammar, and the answers to random grammars while stages are killed.

200 random schemas, expressions, choices and grammars are asked at temperature 1 through three stages. Exit status 1 if an
answer does not match. Needs the packages of requirements-bench.txt; the first part a machine with nothing else to do.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from os import getloadavg
from pathlib import Path
from typing import Final

import click
import psutil

from bench.pipeline import RunningPipeline, running_pipeline
from bench.report import STATE, command_line, machine, output_option, table, write_section
from bench.structured.asking import Ended, ask_all
from bench.structured.speed import Ratio, compare

_STATE: Final = STATE / "bench-structured"
_MAX_TOKENS: Final = 256
_KILL_ANSWERS: Final = 30  # a stage is killed after so many, in turn: one that dies often is restarted ever later
_WANTED: Final = 1.1


@click.command(help=__doc__)
@click.option("--dtype", default="int8", show_default=True)
@click.option("--cases", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Turns with and without a grammar.")
@output_option
def main(dtype: str, cases: int, rounds: int, output: Path) -> None:
    began, load = time.monotonic(), getloadavg()[0]
    with running_pipeline(dtype, _STATE / dtype) as pipeline:
        ratios = [asyncio.run(compare(pipeline.direct_url, pipeline.model, at_once, rounds)) for at_once in (1, 8)]
        for ratio in ratios:
            click.echo(f"{ratio.at_once} at once: {ratio.ratio:.3f} of the time per token without")
        found, kills = asyncio.run(_killed(pipeline, cases))
    facts = (
        f"{command_line('bench.structured')} on {machine()}; SmolLM2-135M-Instruct in {dtype}, three stages. The run took "
        f"{time.monotonic() - began:.0f} s; the load average before it was {load:.1f}."
    )
    write_section(output, "structured", markdown(list(found.values()), kills, ratios, facts))
    wrong = [answer for answer in found.values() if not answer.fits]
    for answer in wrong:
        click.echo(f"case {answer.number}: {answer.text!r}")
    click.echo(f"{len(found)} answers, {kills} kills, {len(wrong)} wrong")
    sys.exit(bool(wrong))


def markdown(answers: Sequence[Ended], kills: int, ratios: Sequence[Ratio], facts: str) -> str:
    ended = sum(answer.finish_reason == "stop" for answer in answers)
    wrong = sum(not answer.fits for answer in answers)
    columns = ["answers at once", "ms per token, plain", "with a grammar", f"ratio (wanted: at most {_WANTED})"]
    rows = [
        [each.at_once, f"{1000 * each.plain_seconds:.2f}", f"{1000 * each.grammar_seconds:.2f}", f"{each.ratio:.3f}"]
        for each in ratios
    ]
    return (
        f"## Structured output\n\n{facts}\n\n"
        f"{len(answers)} random schemas, expressions, choices and grammars at temperature 1, {kills} kills of a stage "
        f"meanwhile: {ended} answers ended by themselves, {wrong} of them wrong; {len(answers) - ended} ran into max_tokens."
        f"\n\n{table(columns, rows)}"
    )


async def _killed(pipeline: RunningPipeline, cases: int) -> tuple[dict[int, Ended], int]:
    """Asks the platform's gateway, which knows which stages are away. Returns the answers by case, and the number of kills."""
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
    """Process ids of the running stages, in order; all are children of the platform."""
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
