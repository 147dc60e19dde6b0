"""`make bench-speculation`: the same questions with and without draft tokens, through the same stages, in turns.

    python -m bench.speculation                       bfloat16 and int8, near and 5 ms away; some twenty minutes on two cores
    python -m bench.speculation --dtype int8 --delay 0

A turn of sixteen at once takes only seconds, so each gateway has five of them; the order alternates, and the median of the
ratios is judged. Two gateways ask the same three stage processes directly, one with LAMINA_DRAFT_TOKENS=0. prompts.yaml has the
questions and the rule for them. Needs the packages of requirements-bench.txt, and a machine with nothing else to do.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import getloadavg
from pathlib import Path
from typing import Final

import click
import yaml

from bench.network import relayed
from bench.pipeline import RunningPipeline, cpu_seconds, gateway_beside, running_pipeline
from bench.report import STATE, command_line, machine, output_option, write_section
from bench.speculation.answers import Answered, ask
from bench.speculation.report import Pair, Setting, markdown, verdicts
from knative.local.proxies.network import EmulatedNetwork

_STATE: Final = STATE / "bench-speculation"
_PROMPTS: Final = Path(__file__).with_name("prompts.yaml")


@click.command(help=__doc__)
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "int8"), show_default=True)
@click.option(
    "--delay", "delays", type=click.FloatRange(min=0), multiple=True, default=(0, 5), show_default=True, help="ms each way."
)
@click.option("--max-tokens", type=click.IntRange(min=8), default=128, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Turns of each gateway, one at a time."
)
@click.option("--rounds-at-once", type=click.IntRange(min=1), default=5, show_default=True, help="The same, sixteen at once.")
@click.option("--questions", "chosen", type=click.Choice(["quoting", "free"]), multiple=True, default=("quoting", "free"))
@click.option("--at-once", type=click.Choice(["1", "16"]), multiple=True, default=("1", "16"), show_default=True)
@output_option
def main(
    dtypes: Sequence[str],
    delays: Sequence[float],
    max_tokens: int,
    rounds: int,
    rounds_at_once: int,
    chosen: Sequence[str],
    at_once: Sequence[str],
    output: Path,
) -> None:
    began, load = time.monotonic(), getloadavg()[0]
    turns = {int(number): rounds if number == "1" else rounds_at_once for number in at_once}
    found = dict(pair for dtype in dtypes for pair in _of_dtype(dtype, delays, max_tokens, chosen, turns))
    facts = (
        f"{command_line('bench.speculation')} on {machine()}; SmolLM2-135M-Instruct, greedy, at most {max_tokens} tokens; "
        "20 questions whose answers quote and 20 whose answers do not (`bench/speculation/prompts.yaml`), each gateway in its "
        "turn, the same stages behind both. "
        f"The run took {time.monotonic() - began:.0f} s; the load average before it was {load:.1f}."
    )
    write_section(output, "speculation", markdown(found, facts))
    for verdict in verdicts(found):
        click.echo(verdict)


def _of_dtype(
    dtype: str, delays: Sequence[float], max_tokens: int, chosen: Sequence[str], turns: Mapping[int, int]
) -> Iterator[tuple[Setting, Pair]]:
    """turns: by how many are asked at once."""
    sets: dict[str, list[str]] = yaml.safe_load(_PROMPTS.read_text(encoding="utf-8"))
    with running_pipeline(dtype, _STATE / dtype) as pipeline:
        for delay in delays:
            with ExitStack() as stack:
                gateways = _gateways(stack, pipeline, delay / 1000)
                for at_once, rounds in turns.items():
                    for name in chosen:
                        setting = Setting(dtype, name, at_once, delay / 1000)
                        pair = _in_turns(gateways, pipeline, sets[name], max_tokens, at_once, rounds)
                        click.echo(f"{setting}: {pair.ratio:.2f}")
                        yield setting, pair


Gateway = tuple[str, int]  # its URL, and its process id


def _gateways(stack: ExitStack, pipeline: RunningPipeline, delay_seconds: float) -> tuple[Gateway, Gateway]:
    """The gateway with draft tokens, and the one without."""
    stages = [stage.function for stage in pipeline.stages]
    if delay_seconds:
        stages = stack.enter_context(relayed(stages, EmulatedNetwork(delay_seconds)))
    logs = _STATE / pipeline.dtype

    def gateway(name: str, environ: dict[str, str]) -> Gateway:
        return stack.enter_context(gateway_beside(pipeline.local, stages, logs / f"{name}.log", environ))

    return gateway("speculation", {"LAMINA_DRAFT_TOKENS": "16"}), gateway("plain", {"LAMINA_DRAFT_TOKENS": "0"})


def _in_turns(
    gateways: tuple[Gateway, Gateway],
    pipeline: RunningPipeline,
    questions: Sequence[str],
    max_tokens: int,
    at_once: int,
    rounds: int,
) -> Pair:
    """In the order A B, B A, A B …, so that changes on the machine meet both, and each is first equally often."""
    turns: tuple[list[Answered], list[Answered]] = ([], [])
    for number in range(rounds):
        for which in (1, 0) if number % 2 == 0 else (0, 1):
            url, pid = gateways[which]
            pids = (pipeline.pids[0], pid)
            before = cpu_seconds(pids)
            answered = asyncio.run(ask(url, pipeline.model, questions, max_tokens, at_once))
            turns[which].append(replace(answered, cpu_seconds=cpu_seconds(pids) - before))
    return Pair(*turns)


if __name__ == "__main__":
    main()
