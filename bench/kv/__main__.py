"""`make bench-kv`: the same questions where keys and values are remembered and where they are not.

    python -m bench.kv                            bfloat16 and float32, then llama.cpp; some six minutes on two cores
    python -m bench.kv --dtype bfloat16 --rounds 1

Two gateways ask the same three stage processes directly, one with LAMINA_PREFIX_SHARING=off; ratios are of one run, medians of
the rounds. Needs the packages of requirements-bench.txt, and a machine with nothing else to do.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from os import getloadavg
from pathlib import Path
from typing import Final

import click
from tokenizers import Tokenizer

from bench.kv.cases import Texts, second_turns, shared_prompt
from bench.kv.client import Server
from bench.kv.report import Case, Found, markdown, met, ratio
from bench.report import machine, write_section
from bench.serving.peers_llama_cpp import running_llama_cpp
from bench.serving.pipeline import ROOT, DidNotStart, RunningPipeline, gateway_beside, running_pipeline
from bench.serving.requests import Requests
from functions.stage.engine.threads import usable_cores
from knative.spec.model_sources import packaged_model
from storage.models.model_repository import read_file, read_manifest
from storage.store.object_store import ObjectStore

_STATE: Final = ROOT / ".lamina" / "bench-kv"
_KV_CACHE: Final = "640Mi"
"""For the shared prompt's 32 sequences in float32."""
_LLAMA_CPP_SLOTS: Final = 8
"""Of 4,096 tokens each."""


@click.command(help=__doc__)
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "float32"), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Second turns of each kind.")
@click.option("--llama-cpp/--no-llama-cpp", default=True, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "docs" / "benchmarks.md")
def main(dtypes: Sequence[str], rounds: int, llama_cpp: bool, output: Path) -> None:
    began, load = time.monotonic(), getloadavg()[0]
    found: dict[tuple[str, Case], list[Found]] = {}
    peer = "llama.cpp was not asked"
    for index, dtype in enumerate(dtypes):
        with running_pipeline(dtype, _STATE / dtype, _KV_CACHE) as pipeline:
            texts = Texts(Requests(_tokenizer(pipeline)))
            for one in _of_pipeline(pipeline, texts, rounds):
                found.setdefault((dtype, one.case), []).append(one)
                click.echo(f"{dtype}: {one.case}: {one.seconds:.3f} s against {one.plain_seconds:.3f} s")
        if llama_cpp and index == len(dtypes) - 1:
            peer = _llama_cpp(texts, rounds, found)
    facts = (
        f"`{' '.join(['python -m bench.kv', *sys.argv[1:]])}` on {machine()}; SmolLM2-135M-Instruct, greedy, three stages and "
        f"two gateways that ask them directly, one with `LAMINA_PREFIX_SHARING=off`. {peer}. The run took "
        f"{time.monotonic() - began:.0f} s; the load average before it was {load:.1f}."
    )
    write_section(output, "kv", markdown(found, facts))
    for (dtype, case), tries in found.items():
        verdict = {True: "met", False: "missed", None: "told"}[met(tries)]
        click.echo(f"{verdict}: {dtype}: {case}: {ratio(tries):.3f}")


def _of_pipeline(pipeline: RunningPipeline, texts: Texts, rounds: int) -> Iterator[Found]:
    stages, logs = [stage.function for stage in pipeline.stages], _STATE / pipeline.dtype
    sharing = {name: {"LAMINA_PREFIX_SHARING": name} for name in ("pipeline", "off")}
    with (
        gateway_beside(pipeline.local, stages, logs / "holding.log", sharing["pipeline"]) as (holding_url, _),
        gateway_beside(pipeline.local, stages, logs / "plain.log", sharing["off"]) as (plain_url, _),
    ):
        holding, plain = (Server(url, pipeline.model, {}) for url in (holding_url, plain_url))
        yield from second_turns(Case.SECOND_TURN, holding, plain, texts, rounds)
        yield shared_prompt(holding, plain, texts)


def _llama_cpp(texts: Texts, rounds: int, found: dict[tuple[str, Case], list[Found]]) -> str:
    """Who was asked."""
    logs = _STATE / "llama.cpp"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        with running_llama_cpp(packaged_model(), usable_cores(), logs, slots=_LLAMA_CPP_SLOTS) as server:
            holding, plain = (Server(server.url, "any", {"cache_prompt": cached}) for cached in (True, False))
            found["Q4_1", Case.LLAMA_CPP] = list(second_turns(Case.LLAMA_CPP, holding, plain, texts, rounds))
            return f"llama.cpp is {server.build}, with {_LLAMA_CPP_SLOTS} slots"
    except DidNotStart as error:
        return f"llama.cpp did not start: {error.why}"


def _tokenizer(pipeline: RunningPipeline) -> Tokenizer:
    store = ObjectStore(pipeline.store)
    manifest = read_manifest(store, pipeline.model, pipeline.dtype)
    return Tokenizer.from_str(read_file(store, manifest, "tokenizer.json").decode())


if __name__ == "__main__":
    main()
