"""`make bench-guesses`: the same questions with and without guesses, through the same stages, in turns.

    python -m bench.guesses                       bfloat16 and int8, near and 5 ms away; some ten minutes on two cores
    python -m bench.guesses --dtype int8 --delay 0

Two gateways ask the same three stage processes directly, one with LAMINA_GUESSES=0. The questions are in prompts.yaml, with the
rule for what is in them. Needs the packages of requirements-bench.txt, and a machine with nothing else to do.
"""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from os import getloadavg
from pathlib import Path
from typing import Final

import click
import yaml

from bench.guesses.answers import ask
from bench.guesses.delay import delayed
from bench.guesses.report import Pair, Setting, markdown, wanted
from bench.report import machine, write_section
from bench.serving.pipeline import ROOT, RunningPipeline, gateway_beside, running_pipeline

_STATE: Final = ROOT / ".lamina" / "bench-guesses"
_PROMPTS: Final = Path(__file__).with_name("prompts.yaml")
_CONCURRENT: Final = 16


@click.command(help=__doc__)
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "int8"), show_default=True)
@click.option(
    "--delay", "delays", type=click.FloatRange(min=0), multiple=True, default=(0, 5), show_default=True, help="ms each way."
)
@click.option("--max-tokens", type=click.IntRange(min=8), default=128, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Turns of each gateway.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "docs" / "benchmarks.md")
def main(dtypes: Sequence[str], delays: Sequence[float], max_tokens: int, rounds: int, output: Path) -> None:
    began, load = time.monotonic(), getloadavg()[0]
    found = dict(pair for dtype in dtypes for pair in _of_dtype(dtype, delays, max_tokens, rounds))
    command = " ".join(["python -m bench.guesses", *sys.argv[1:]])
    facts = (
        f"`{command}` on {machine()}; SmolLM2-135M-Instruct, greedy, at most {max_tokens} tokens; 20 questions whose answers "
        "quote and 20 whose answers do not (`bench/guesses/prompts.yaml`), each gateway in its turn, the same stages behind "
        f"both. The run took {time.monotonic() - began:.0f} s; the load average before it was {load:.1f}."
    )
    write_section(output, "guesses", markdown(found, facts))
    for setting, pair in found.items():
        verdict = "met" if pair.ratio >= wanted(setting) and not pair.different else "missed"
        click.echo(f"{verdict}: {setting}: {pair.ratio:.2f}, wanted {wanted(setting):g}; {pair.different} other answers")


def _of_dtype(dtype: str, delays: Sequence[float], max_tokens: int, rounds: int) -> Iterator[tuple[Setting, Pair]]:
    sets: dict[str, list[str]] = yaml.safe_load(_PROMPTS.read_text(encoding="utf-8"))
    with running_pipeline(dtype, _STATE / dtype) as pipeline:
        for delay in delays:
            with ExitStack() as stack:
                urls = _gateways(stack, pipeline, delay / 1000)
                for at_once in (1, _CONCURRENT):
                    for name, questions in sets.items():
                        setting = Setting(dtype, name, at_once, delay / 1000)
                        pair = asyncio.run(_in_turns(urls, pipeline.model, questions, max_tokens, at_once, rounds))
                        click.echo(f"{setting}: {pair.ratio:.2f}")
                        yield setting, pair


def _gateways(stack: ExitStack, pipeline: RunningPipeline, delay_seconds: float) -> tuple[str, str]:
    """With guesses, without."""
    stages = [stage.function for stage in pipeline.stages]
    if delay_seconds:
        stages = stack.enter_context(delayed(stages, delay_seconds))
    logs = _STATE / pipeline.dtype

    def gateway(name: str, environ: dict[str, str]) -> str:
        return stack.enter_context(gateway_beside(pipeline.local, stages, logs / f"{name}.log", environ))[0]

    return gateway("guessing", {"LAMINA_GUESSES": "16"}), gateway("plain", {"LAMINA_GUESSES": "0"})


async def _in_turns(
    urls: tuple[str, str], model: str, questions: Sequence[str], max_tokens: int, at_once: int, rounds: int
) -> Pair:
    guessing, plain = [], []
    for _ in range(rounds):
        plain.append(await ask(urls[1], model, questions, max_tokens, at_once))
        guessing.append(await ask(urls[0], model, questions, max_tokens, at_once))
    return Pair(guessing, plain)


if __name__ == "__main__":
    main()
