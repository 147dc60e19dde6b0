"""`make bench-kv`: the same questions with a prefix cache and without.

    python -m bench.kv                            bfloat16 and float32, then llama.cpp; some nine minutes on two cores
    python -m bench.kv --dtype bfloat16 --rounds 1
    python -m bench.kv --part pods                peers, store, scale-in and zero only

Two gateways ask the same three stage processes, one with LAMINA_PREFIX_SHARING=off. Ratios are medians of the rounds of one
run. Scaling a stage in and starting from zero are measured in the first dtype only. Needs the packages of
requirements-bench.txt, and a machine with nothing else to do.
"""

import asyncio
import time
from collections.abc import Sequence
from os import getloadavg
from pathlib import Path
from typing import Final

import aiohttp
import click

from bench.kv.cases import Texts, second_turns, shared_prompt
from bench.kv.client import Server
from bench.kv.deployed import deployed
from bench.kv.pods import from_peer, from_store, from_zero, scaled_in
from bench.kv.report import Case, Found, NotMeasured, markdown, verdicts
from bench.llama_cpp import llama_server
from bench.peers.models import PACKAGED, model
from bench.pipeline import DidNotStart, RunningPipeline, gateway_beside, running_pipeline
from bench.report import STATE, command_line, machine, output_option, write_section
from bench.serving.requests import Requests
from functions.stage.engine.threads import usable_cores

_STATE: Final = STATE / "bench-kv"
_KV_CACHE: Final = "640Mi"  # for the shared prompt's 32 sequences in float32
_LLAMA_CPP_SLOTS: Final = 8  # of 4,096 tokens each
_PARTS: Final = ("memory", "pods")


@click.command(help=__doc__)
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "float32"), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Second turns of each kind.")
@click.option("--part", "parts", type=click.Choice(_PARTS), multiple=True, default=_PARTS, show_default=True)
@click.option("--llama-cpp/--no-llama-cpp", default=True, show_default=True)
@click.option("--running", type=click.IntRange(min=1), default=16, show_default=True, help="While a stage is scaled in.")
@output_option
def main(dtypes: Sequence[str], rounds: int, parts: Sequence[str], llama_cpp: bool, running: int, output: Path) -> None:
    bench = _Bench(rounds, running)
    load = getloadavg()[0]
    for dtype in dtypes:
        if "memory" in parts:
            with running_pipeline(dtype, _STATE / dtype, _KV_CACHE) as pipeline:
                bench.measure_memory(pipeline)
        if "pods" in parts:
            asyncio.run(bench.measure_pods(dtype, everything=dtype == dtypes[0]))
    peer = bench.measure_llama_cpp() if llama_cpp else "llama.cpp was not asked"
    facts = (
        f"{command_line('bench.kv')} on {machine()}; SmolLM2-135M-Instruct, greedy, three stages and "
        "two gateways, one with `LAMINA_PREFIX_SHARING=off`. For keys and values in memory they ask the stages directly; if "
        "pods come and go, they are on the local platform behind ingress and activator. Second turns at 2,000 tokens. "
        f"{running} conversations run while a stage is scaled in; that and zero are measured in {dtypes[0]} only. {peer}. "
        f"The run took {bench.seconds:.0f} s; the load average before it was {load:.1f}."
    )
    write_section(output, "kv", markdown(bench.found, bench.missing, facts))
    for verdict in verdicts(bench.found, bench.missing):
        click.echo(verdict)


class _Bench:
    def __init__(self, rounds: int, running: int) -> None:
        self.found: dict[tuple[str, Case], list[Found]] = {}
        self.missing: dict[str, list[NotMeasured]] = {}
        self._rounds = rounds
        self._running = running
        self._began = time.monotonic()
        self._texts: Texts  # for the model's tokenizer, the same in each dtype

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def measure_memory(self, pipeline: RunningPipeline) -> None:
        """Keys and values in a pod's own memory."""
        texts = self._texts = Texts(Requests(pipeline.tokenizer()))
        stages, logs = [stage.function for stage in pipeline.stages], _STATE / pipeline.dtype
        sharing = {name: {"LAMINA_PREFIX_SHARING": name} for name in ("pipeline", "off")}
        with (
            gateway_beside(pipeline.local, stages, logs / "holding.log", sharing["pipeline"]) as (holding_url, _),
            gateway_beside(pipeline.local, stages, logs / "plain.log", sharing["off"]) as (plain_url, _),
        ):
            holding, plain = (Server(url, pipeline.model, {}) for url in (holding_url, plain_url))
            for one in second_turns(Case.SECOND_TURN, holding, plain, texts, self._rounds):
                self._add(pipeline.dtype, one)
            self._add(pipeline.dtype, shared_prompt(holding, plain, texts))

    async def measure_pods(self, dtype: str, *, everything: bool) -> None:
        """Keys and values from other pods and from the store. everything: also scaling in and starting from zero."""
        async with deployed(dtype, _STATE / f"{dtype}-pods") as at:
            texts = self._texts = Texts(Requests(at.tokenizer))
            cases = {Case.PEER: from_peer(at, texts, self._rounds), Case.STORE: from_store(at, texts, self._rounds)}
            if everything:
                cases |= {Case.SCALED_IN: scaled_in(at, texts, self._running), Case.FROM_ZERO: from_zero(at, texts)}
            for case, measured in cases.items():
                try:
                    async for one in measured:
                        self._add(dtype, one)
                except (TimeoutError, aiohttp.ClientError, RuntimeError) as error:
                    self.missing.setdefault(dtype, []).append(NotMeasured(case, str(error) or type(error).__name__))
                    click.echo(f"{self.seconds:.0f} s: {dtype}: {case}: not measured: {error}")
                    return

    def measure_llama_cpp(self) -> str:
        """Returns a description of the peer, or the reason why it is missing."""
        logs = _STATE / "llama.cpp"
        logs.mkdir(parents=True, exist_ok=True)
        try:
            file = model(PACKAGED, STATE / "peers" / "models").gguf("Q4_0")
            with llama_server(file, logs / "llama-server.log", usable_cores(), slots=_LLAMA_CPP_SLOTS) as (url, _):
                holding, plain = (Server(url, "any", {"cache_prompt": cached}) for cached in (True, False))
                for one in second_turns(Case.LLAMA_CPP, holding, plain, self._texts, self._rounds):
                    self._add("Q4_0", one)
                return f"llama.cpp is built for this CPU and serves Q4_0 with {_LLAMA_CPP_SLOTS} slots"
        except DidNotStart as error:
            return f"llama.cpp did not start: {error.why}"

    def _add(self, dtype: str, one: Found) -> None:
        self.found.setdefault((dtype, one.case), []).append(one)
        click.echo(f"{self.seconds:.0f} s: {dtype}: {one.case}: {one.seconds:.3f} s against {one.plain_seconds:.3f} s")


if __name__ == "__main__":
    main()
