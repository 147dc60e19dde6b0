"""`make bench`: Lamina's three stages in every dtype, and llama.cpp with the same model on the same machine, in one run.

    python -m bench.serving                    all of it, about seven minutes on two cores; writes docs/benchmarks.md
    python -m bench.serving --rounds 1 --dtype int8 --workload "single stream" --output some/where/benchmarks.md

Lamina runs as users run it (`python -m knative run`: gateway and stages as processes behind queue-proxies). Needs the packages
of requirements-bench.txt, and a machine with nothing else to do.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from os import getloadavg, sched_getaffinity
from pathlib import Path
from typing import Final

import click

from bench.llama_cpp import SLOTS, llama_server
from bench.peers.models import PACKAGED
from bench.peers.models import model as bench_model
from bench.pipeline import DidNotStart, RunningPipeline, running_pipeline
from bench.report import STATE, help_text, machine, output_option, report
from bench.serving.client import Client
from bench.serving.contenders import CONCURRENT, LLAMA_CPP, PREFILL, SINGLE, Contender, measure_all
from bench.serving.report import Findings, draw, markdown, verdicts
from bench.serving.requests import Requests
from bench.serving.round import RoundTime, measure_rounds

_STATE: Final = STATE / "bench"
_ROUNDS_OF_A_STEP: Final = 60


@click.command(help=help_text(__doc__))
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Each contender's turns.")
@click.option("--new-tokens", type=click.IntRange(min=8), default=96, show_default=True, help="Of the single stream.")
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "int8", "q4", "float32"), show_default=True)
@click.option("--workload", "chosen", multiple=True, default=(SINGLE, CONCURRENT, PREFILL), show_default=True)
@output_option
def main(rounds: int, new_tokens: int, dtypes: Sequence[str], chosen: Sequence[str], output: Path) -> None:
    began, load = time.monotonic(), getloadavg()[0]
    found = measure(rounds, new_tokens, dtypes, chosen)
    picture = output.with_name("serving.png")
    draw(found, picture)
    facts = _facts(rounds, new_tokens, time.monotonic() - began, load)
    report(output, "serving", markdown(found, facts, picture.name), verdicts(found))


def measure(rounds: int, new_tokens: int, dtypes: Sequence[str], chosen: Sequence[str]) -> Findings:
    """All contenders start first and stay up, idle while it is not their turn."""
    log = _STATE / "logs"
    log.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        pipelines = [stack.enter_context(running_pipeline(dtype, _STATE / dtype)) for dtype in dtypes]
        contenders, did_not_run = list[Contender](), {}
        for pipeline in pipelines:
            client = Client(pipeline.url, pipeline.model, {})
            contenders.append(Contender(f"Lamina {pipeline.dtype}", (pipeline.pid,), client.measure))
        try:
            file = bench_model(PACKAGED, STATE / "peers" / "models").gguf("Q4_0")
            url, pid = stack.enter_context(llama_server(file, log / "llama-server.log", len(sched_getaffinity(0))))
            client = Client(url, "any", {"ignore_eos": True, "cache_prompt": False})
            contenders.append(Contender(LLAMA_CPP, (pid,), client.measure))
        except DidNotStart as error:
            click.echo(f"llama.cpp did not run: {error}")
            did_not_run[LLAMA_CPP] = error.why
        requests = Requests(pipelines[0].tokenizer())
        workloads = {
            SINGLE: [requests.cut(0, 128, new_tokens)],
            CONCURRENT: requests.ragged(16),
            PREFILL: [requests.cut(0, 1024, 1)],
        }
        work = {name: asked for name, asked in workloads.items() if name in chosen}
        return Findings(
            asyncio.run(measure_all(contenders, work, rounds, click.echo, did_not_run)),
            dict(_rounds(pipelines, requests)),
            did_not_run,
        )


def _rounds(pipelines: Sequence[RunningPipeline], requests: Requests) -> Iterator[tuple[str, RoundTime]]:
    for pipeline in pipelines:
        # Short prompts, so that decoding dominates.
        asked = [requests.cut(97 * index, 64, 2 * _ROUNDS_OF_A_STEP) for index in range(16)]
        for name, batches in (("1", [asked[:1]]), ("2 × 8", [asked[:8], asked[8:]])):
            for suffix, through_proxies in (("", False), (", through queue-proxies", True)):
                found = measure_rounds(pipeline, batches, _ROUNDS_OF_A_STEP, through_proxies=through_proxies)
                click.echo(f"{pipeline.dtype}, {name}{suffix}: {found.total * 1000:.1f} ms a round")
                yield f"{pipeline.dtype}, {name}{suffix}", found


def _facts(rounds: int, new_tokens: int, seconds: float, load: float) -> list[str]:
    return [
        f"`python -m bench.serving --rounds {rounds} --new-tokens {new_tokens}` on {machine()}; SmolLM2-135M-Instruct, greedy, "
        f"every answer as long as asked for. The run took {seconds:.0f} s; the load average before it was {load:.1f}.\n",
        "Lamina is three stage processes and a gateway, started by `python -m knative run` with one replica "
        "a stage; every hop goes through a queue-proxy, all of them in the platform's one process. "
        "Nothing is drafted, nothing of earlier prompts is used. llama.cpp has both cores, too: built for this CPU "
        f"(`make llama-cpp`), it serves the model in Q4_0, its fastest format, with {SLOTS} slots, prompts not cached. "
        "Contenders take turns; rates and ratios are medians over the rounds, CPU seconds those of all its processes.\n",
    ]


if __name__ == "__main__":
    main()
