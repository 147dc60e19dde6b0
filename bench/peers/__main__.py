"""`make bench-peers`: Lamina beside llama.cpp and vLLM, built and configured as their own experts would, at several sizes.

    python -m bench.peers                       three sizes, over an hour on two cores; writes docs/benchmarks.md
    python -m bench.peers --model 1.1B --dtype q4 --format Q4_0 --rounds 1 --output some/where/benchmarks.md

Needs `make llama-cpp vllm`, and a machine with nothing else to do. One contender is asked at a time; the others are idle.
"""

import asyncio
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from os import getloadavg, sched_getaffinity
from pathlib import Path
from typing import Final

import click
from tokenizers import Tokenizer

from bench.llama_cpp import llama_server, llama_server_over_rpc
from bench.peers.models import PACKAGED, SHAPES, Model, model
from bench.peers.vllm import running_vllm
from bench.pipeline import DidNotStart, running_pipeline
from bench.report import STATE, Verdict, command_line, help_text, judged, machine, output_option, report, table, verdict_table
from bench.serving.client import Client, Measurement
from bench.serving.contenders import CONCURRENT, PREFILL, SINGLE, Contender, ContenderEnded, Results, measure_all, rate, ratio
from bench.serving.requests import Request, Requests
from knative.commands.model_choice import packaged_model
from storage.checkpoints.model_source import open_checkpoint

_STATE: Final = STATE / "peers"
_SIZES: Final = (PACKAGED, "Qwen2.5-0.5B", "1.1B")
_KV_CACHE: Final = "3Gi"  # for the recurrent states of sixteen conversations; what is not used takes no memory
_VLLM: Final = "vLLM int8, no HTTP"
_RPC: Final = "llama.cpp RPC, three servers, Q4_0"
# Lamina's dtypes, and llama.cpp's formats with as many bits.
_EQUAL: Final = {"q4": "Q4_0", "kept": "Q4_0", "int8": "Q8_0"}
# By stages: Lamina's best dtype against llama.cpp's fastest format, at each size.
_WANTED: Final[Mapping[int, Mapping[str, tuple[float, float, float]]]] = {
    1: {SINGLE: (1.3, 1.15, 1.1), CONCURRENT: (2.8, 2.4, 2.4), PREFILL: (3.5, 3.5, 3.5)},
    3: {SINGLE: (0.95, 1.0, 1.05), CONCURRENT: (2.8, 2.4, 2.4), PREFILL: (3.5, 3.5, 3.5)},
}
_WANTED_RPC: Final = {SINGLE: 3.0, CONCURRENT: 5.0, PREFILL: 6.0}
_WANTED_VLLM: Final[Mapping[int, Mapping[str, float]]] = {
    1: {CONCURRENT: 1.15, PREFILL: 1.1},
    3: {CONCURRENT: 1.0, PREFILL: 1.0},
}


@click.command(help=help_text(__doc__))
@click.option("--model", "names", type=click.Choice([PACKAGED, *SHAPES]), multiple=True, default=_SIZES, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Each contender's turns.")
@click.option("--dtype", "dtypes", multiple=True, default=tuple(_EQUAL), show_default=True)
@click.option("--stages", "cuts", type=click.IntRange(min=1), multiple=True, default=(1, 3), show_default=True)
@click.option("--format", "formats", multiple=True, default=("Q4_0", "Q8_0", "Q4_K_M"), show_default=True)
@click.option("--rpc/--no-rpc", default=True, show_default=True, help="llama.cpp over three RPC servers, too.")
@click.option("--vllm/--no-vllm", default=True, show_default=True, help="vLLM in int8, for sizes other than the packaged one.")
@click.option("--workload", "chosen", multiple=True, default=(SINGLE, CONCURRENT, PREFILL), show_default=True)
@output_option
def main(
    names: Sequence[str],
    rounds: int,
    dtypes: Sequence[str],
    cuts: Sequence[int],
    formats: Sequence[str],
    rpc: bool,
    vllm: bool,
    chosen: Sequence[str],
    output: Path,
) -> None:
    began, load, parts, verdicts = time.monotonic(), getloadavg()[0], list[str](), list[Verdict]()
    for name in names:
        measured = model(name, _STATE / "models")
        with ExitStack() as stack:
            contenders = list(_lamina(stack, measured, dtypes, cuts))
            failed = dict[str, str]()
            for peer, kind in [(f"llama.cpp {kind}", kind) for kind in formats] + [(_RPC, "Q4_0")] * rpc:
                try:
                    contenders.append(_llama_cpp(stack, peer, measured.gguf(kind)))
                except DidNotStart as error:
                    failed[peer] = error.why
            if vllm and name != PACKAGED:
                try:
                    contenders.append(stack.enter_context(running_vllm(_VLLM, measured.in_8_bits(), _logs() / "vllm.log")))
                except (DidNotStart, ContenderEnded) as error:
                    failed[_VLLM] = error.why
            work = {workload: asked for workload, asked in _requests().items() if workload in chosen}
            found = asyncio.run(measure_all(contenders, work, rounds, click.echo, failed))
        parts.append(f"\n### {name}\n\n{_table(found, failed)}")
        verdicts += _verdicts(name, found)
    facts = (
        f"{command_line('bench.peers')} on {machine()}; it took {time.monotonic() - began:.0f} s, the load average before it "
        f"was {load:.1f}. llama.cpp is built from its sources for this CPU (GGML_NATIVE, weights repacked), its files are made "
        "by its own `llama-quantize`. Sizes other than the packaged model have random weights. *kept* publishes llama.cpp's "
        "Q4_0 file as it is. vLLM's CPU build has weights and activations in 8 bits and both cores, and is asked in its own "
        "process. Guesses and prefix caches are off on all sides. "
        "Contenders take turns; rates are medians over the rounds, ratios medians of the ratios within each round.\n"
    )
    section, title = ("peers", "## Peers") if set(names) & set(_SIZES) else ("families", "## Other families")
    report(output, section, "\n".join([title, "", facts, *([verdict_table(verdicts)] if verdicts else []), *parts]), verdicts)


def _lamina(stack: ExitStack, measured: Model, dtypes: Sequence[str], cuts: Sequence[int]) -> Iterator[Contender]:
    for dtype, stages in product(dtypes, cuts):
        source = str(measured.gguf("Q4_0")) if dtype == "kept" else measured.source
        state = _STATE / f"{measured.name}-{dtype}-{stages}"
        pipeline = stack.enter_context(running_pipeline(dtype, state, source, stages, _KV_CACHE))
        yield Contender(f"Lamina {dtype}, {_cut(stages)}", (pipeline.pid,), Client(pipeline.url, pipeline.model, {}).measure)


def _cut(stages: int) -> str:
    return "one stage" if stages == 1 else f"{stages} stages"


def _llama_cpp(stack: ExitStack, name: str, file: Path) -> Contender:
    """Raises DidNotStart."""
    threads = len(sched_getaffinity(0))
    log = _logs() / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log"
    if name == _RPC:
        url, pids = stack.enter_context(llama_server_over_rpc(file, log, threads, 3))
    else:
        url, pid = stack.enter_context(llama_server(file, log, threads))
        pids = (pid,)
    return Contender(name, pids, Client(url, "any", {"ignore_eos": True, "cache_prompt": False}).measure)


def _logs() -> Path:
    logs = _STATE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def _requests() -> dict[str, list[Request]]:
    tokenizer = open_checkpoint(Path(packaged_model())).files["tokenizer.json"]
    requests = Requests(Tokenizer.from_str(tokenizer.decode()))
    return {SINGLE: [requests.cut(0, 128, 96)], CONCURRENT: requests.ragged(16), PREFILL: [requests.cut(0, 1000, 1)]}


def _fastest(results: Mapping[str, list[Measurement]], beginning: str) -> str:
    """The contender with the highest rate of those whose name begins so, RPC left out; empty: there is none."""
    names = [name for name in results if name.startswith(beginning) and name != _RPC]
    return max(names, key=lambda name: rate(results[name]), default="")


def _best_ratio(results: Mapping[str, list[Measurement]], stages: int, peer: str) -> tuple[str, float]:
    """Lamina's dtype with the highest ratio to a peer in this cut, and the ratio; empty and 0: there is none."""
    names = [name for name in results if name.startswith("Lamina") and name.endswith(_cut(stages))]
    return max(((name, ratio(results, name, peer)) for name in names), key=lambda found: found[1], default=("", 0.0))


def _verdicts(size: str, found: Results) -> Iterator[Verdict]:
    """Lamina's best dtype against llama.cpp's fastest format, its RPC, and vLLM."""
    for workload, results in found.items():
        llama_cpp = _fastest(results, "llama.cpp")
        for stages, wanted in _WANTED.items():
            peers = dict[str, float]()
            if llama_cpp and size in _SIZES:
                peers[llama_cpp] = wanted[workload][_SIZES.index(size)]
            if _VLLM in results and (at_least := _WANTED_VLLM[stages].get(workload)) is not None:
                peers[_VLLM] = at_least
            if stages == 3 and _RPC in results:
                peers[_RPC] = _WANTED_RPC[workload]
            for peer, at_least in peers.items():
                own, found_ratio = _best_ratio(results, stages, peer)
                if own:
                    yield judged(f"{size}, {workload}: {own} × {peer}", found_ratio, at_least)


def _table(found: Results, failed: Mapping[str, str]) -> str:
    """A row per contender: its rates, compared with llama.cpp's fastest format, and with its format of as many bits."""
    rows = []
    names = dict.fromkeys(name for results in found.values() for name in results)
    for name in names:
        row = [name]
        for results in found.values():
            against = [_fastest(results, "llama.cpp")]
            if name.startswith("Lamina"):
                against.append(f"llama.cpp {_EQUAL.get(name.split()[1].strip(','), '')}")
            ratios = [f"{ratio(results, name, peer):.2f}" if peer in results else "–" for peer in against]
            row += [f"{rate(results[name]):.1f}", " / ".join(ratios)] if name in results else ["–", "–"]
        rows.append(row)
    rows += [
        [f"{name} {'did not run to the end' if name in names else 'did not run'}: {why}", *["–"] * (2 * len(found))]
        for name, why in failed.items()
    ]
    heads = [column for workload in found for column in (f"{workload}, tokens/s", "× llama.cpp's best / of as many bits")]
    return table(["", *heads], rows)


if __name__ == "__main__":
    main()
