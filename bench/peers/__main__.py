"""`make bench-peers`: Lamina beside llama.cpp, built and configured as its own experts would, at several sizes.

    python -m bench.peers                       three sizes, about forty minutes on two cores; writes docs/benchmarks.md
    python -m bench.peers --model 1.1B --dtype q4 --format Q4_0 --rounds 1 --output some/where/benchmarks.md

Needs `make llama-cpp`, and a machine with nothing else to do. One contender is asked at a time; the others are idle.
"""

import asyncio
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from os import getloadavg, sched_getaffinity
from pathlib import Path
from typing import Final

import click
from tokenizers import Tokenizer

from bench.peers.llama_cpp import llama_server, llama_server_over_rpc
from bench.peers.models import PACKAGED, SHAPES, Model, model
from bench.pipeline import DidNotStart, running_pipeline
from bench.report import STATE, Verdict, command_line, judged, machine, output_option, table, verdict_table, write_section
from bench.serving.client import Client
from bench.serving.contenders import CONCURRENT, PREFILL, SINGLE, Contender, Results, measure_all, rate, ratio
from bench.serving.requests import Requests
from storage.checkpoints.model_source import open_checkpoint

_STATE: Final = STATE / "peers"
_SIZES: Final = (PACKAGED, "Qwen2.5-0.5B", "1.1B")
_RPC: Final = "llama.cpp RPC, three servers, Q4_0"
# Lamina in one stage and in three against llama.cpp's best: SINGLE at each size, CONCURRENT at each size, PREFILL.
_WANTED: Final[Mapping[int, Mapping[str, tuple[float, float, float]]]] = {
    1: {SINGLE: (1.3, 1.15, 1.1)},
    3: {SINGLE: (0.95, 1.0, 1.05), CONCURRENT: (2.8, 2.4, 2.4), PREFILL: (3.5, 3.5, 3.5)},
}
_WANTED_RPC: Final = {SINGLE: 3.0, CONCURRENT: 5.0, PREFILL: 6.0}


@click.command(help=__doc__)
@click.option("--model", "names", type=click.Choice([PACKAGED, *SHAPES]), multiple=True, default=_SIZES, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Each contender's turns.")
@click.option("--dtype", "dtypes", multiple=True, default=("q4", "int8"), show_default=True)
@click.option("--stages", "cuts", type=click.IntRange(min=1), multiple=True, default=(1, 3), show_default=True)
@click.option("--format", "formats", multiple=True, default=("Q4_0", "Q8_0", "Q4_K_M"), show_default=True)
@click.option("--rpc/--no-rpc", default=True, show_default=True, help="llama.cpp over three RPC servers, too.")
@click.option("--workload", "chosen", multiple=True, default=(SINGLE, CONCURRENT, PREFILL), show_default=True)
@output_option
def main(
    names: Sequence[str],
    rounds: int,
    dtypes: Sequence[str],
    cuts: Sequence[int],
    formats: Sequence[str],
    rpc: bool,
    chosen: Sequence[str],
    output: Path,
) -> None:
    began, load, parts, verdicts = time.monotonic(), getloadavg()[0], list[str](), list[Verdict]()
    for name in names:
        found, failed = _measure(model(name, _STATE / "models"), rounds, dtypes, cuts, formats, rpc, chosen)
        parts.append(f"\n### {name}\n\n{_table(found, failed)}")
        verdicts += _verdicts(name, found)
    facts = (
        f"{command_line('bench.peers')} on {machine()}; took {time.monotonic() - began:.0f} s, load average before it {load:.1f}. "
        "llama.cpp is built from its sources for this CPU (GGML_NATIVE, weights repacked), the GGUF files by its own "
        "`llama-quantize`. Sizes other than the packaged model have random weights. Guesses and prefix cache are off on both "
        "sides. Contenders take turns; numbers are medians over the rounds, ratios medians of the ratios within each round.\n"
    )
    write_section(output, "peers", "\n".join(["## Peers", facts, verdict_table(verdicts), *parts]))
    for verdict in verdicts:
        click.echo(verdict)
    click.echo(f"{output} has the rest")


def _measure(
    measured: Model,
    rounds: int,
    dtypes: Sequence[str],
    cuts: Sequence[int],
    formats: Sequence[str],
    rpc: bool,
    chosen: Sequence[str],
) -> tuple[Results, dict[str, str]]:
    """The results, and why a contender did not run."""
    threads, failed = len(sched_getaffinity(0)), dict[str, str]()
    logs = _STATE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    options = {"ignore_eos": True, "cache_prompt": False}
    with ExitStack() as stack:
        contenders = []
        for dtype in dtypes:
            for stages in cuts:
                state = _STATE / f"{measured.name}-{dtype}-{stages}"
                pipeline = stack.enter_context(running_pipeline(dtype, state, model=measured.source, stages=stages))
                contenders.append(Contender(_own(dtype, stages), pipeline.pids, Client(pipeline.url, pipeline.model, {}).measure))
        for name, kind in [(f"llama.cpp {kind}", kind) for kind in formats] + ([(_RPC, "Q4_0")] if rpc else []):
            log = logs / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log"
            try:
                if name == _RPC:
                    url, pids = stack.enter_context(llama_server_over_rpc(measured.gguf(kind), log, threads, 3))
                else:
                    url, pid = stack.enter_context(llama_server(measured.gguf(kind), log, threads))
                    pids = (pid,)
            except DidNotStart as error:
                failed[name] = error.why
            else:
                contenders.append(Contender(name, pids, Client(url, "any", options).measure))
        requests = Requests(Tokenizer.from_str(_tokenizer()))
        work = {SINGLE: [requests.cut(0, 128, 96)], CONCURRENT: requests.ragged(16), PREFILL: [requests.cut(0, 1000, 1)]}
        work = {workload: asked for workload, asked in work.items() if workload in chosen}
        return asyncio.run(measure_all(contenders, work, rounds, click.echo)), failed


def _own(dtype: str, stages: int) -> str:
    return f"Lamina {dtype}, {'one stage' if stages == 1 else f'{stages} stages'}"


def _tokenizer() -> str:
    from knative.commands.model_choice import packaged_model

    return open_checkpoint(Path(packaged_model())).files["tokenizer.json"].decode()


def _best(results: Mapping[str, Sequence[object]], like: str) -> Iterator[str]:
    return (name for name in results if name.startswith(like) and name != _RPC)


def _verdicts(name: str, found: Results) -> Iterator[Verdict]:
    """Lamina's best dtype against llama.cpp's best format, and against its RPC."""
    for workload, results in found.items():
        peers = list(_best(results, "llama.cpp"))
        if not peers:
            continue
        peer = max(peers, key=lambda each: rate(results[each]))
        for stages in (1, 3):
            own = [each for each in _best(results, "Lamina") if each.endswith("one stage" if stages == 1 else f"{stages} stages")]
            if not own:
                continue
            best = max(own, key=lambda each: rate(results[each]))
            wanted = _WANTED[stages].get(workload)
            if wanted and name in _SIZES:
                what = f"{name}, {workload}: {best} × {peer}"
                yield judged(what, ratio(results, best, peer), wanted[_SIZES.index(name)])
            if stages == 3 and _RPC in results:
                yield judged(f"{name}, {workload}: {best} × {_RPC}", ratio(results, best, _RPC), _WANTED_RPC[workload])


def _table(found: Results, failed: Mapping[str, str]) -> str:
    workloads = list(found)
    best = {each: max(_best(found[each], "llama.cpp"), key=lambda name: rate(found[each][name]), default="") for each in workloads}
    rows = []
    for name in dict.fromkeys(name for each in found.values() for name in each):
        row = [name]
        for workload in workloads:
            results = found[workload]
            row.append(f"{rate(results[name]):.1f}")
            row.append(f"{ratio(results, name, best[workload]):.2f}" if best[workload] else "–")
        rows.append(row)
    rows += [[f"{name} did not run: {why}", *["–"] * (2 * len(workloads))] for name, why in failed.items()]
    columns = [column for workload in workloads for column in (f"{workload}, tokens/s", "× best llama.cpp")]
    return table(["", *columns], rows)


if __name__ == "__main__":
    main()
