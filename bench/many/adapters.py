"""100 adapters of rank 16 over the packaged model, and requests that draw them by Zipf's law (`python -m bench.many.adapters`).

Compares tokens per second at 16 requests at once with those of the base model, in rounds that alternate, and the stage's CPU
time a token, which other work on the machine changes less; and measures the first token of an adapter that is not loaded.
Adapters are random: they take the time of trained ones. Writes a section of docs/benchmarks.md; status 1 if a target is missed.
"""

import asyncio
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import getloadavg
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

import aiohttp
import click
import msgspec
import numpy as np
import psutil
from safetensors.numpy import save_file

from bench.pipeline import gateway_beside, local_spec, published_pipeline, stage_alone
from bench.report import ROOT, STATE, judged, machine, table, verdict_table, write_section
from functions.stage.engine.threads import usable_cores
from knative.commands.model_choice import DEFAULT_MODEL
from storage.checkpoints.decoder import layer_shapes
from storage.checkpoints.decoder_config import decoder_of
from storage.models.adapter_publisher import publish_adapter
from storage.models.adapters import list_adapters
from storage.models.model_repository import ModelManifest, read_file
from storage.store.object_store import ObjectStore

ADAPTERS: Final = 100
KEPT: Final = 32
RANK: Final = 16
AT_ONCE: Final = 16
NEW_TOKENS: Final = 48
LEAST_SHARE: Final = 0.75
MOST_FIRST_SECONDS: Final = 0.3
_PROMPT: Final = "Write a long story about a lighthouse keeper and the sea, in which number {} is the key to everything. "


def publish_adapters(store: ObjectStore, manifest: ModelManifest) -> list[str]:
    """Publishes the random adapters that the store lacks, and returns the names of all."""
    model = decoder_of(msgspec.json.decode(read_file(store, manifest, "config.json")))
    names = [f"a{number:03}" for number in range(ADAPTERS)]
    present = set(list_adapters(store, manifest.name))
    modules = (*model.names.qkv, model.names.out, model.names.gate, model.names.up, model.names.down)
    for number, name in enumerate(names):
        if name in present:
            continue
        dice, tensors = np.random.default_rng(number), {}
        for layer, description in enumerate(model.layers):
            shapes = layer_shapes(model, description)
            for module in modules:
                outs, width = shapes[f"{module}.weight"]
                prefix = f"base_model.model.{model.names.layers}.{layer}.{module}"
                tensors[f"{prefix}.lora_A.weight"] = dice.normal(0, 0.02, (RANK, width)).astype(np.float32)
                tensors[f"{prefix}.lora_B.weight"] = dice.normal(0, 0.02, (outs, RANK)).astype(np.float32)
        with TemporaryDirectory() as folder:
            config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
            (Path(folder) / "adapter_config.json").write_bytes(msgspec.json.encode(config))
            save_file(tensors, Path(folder) / "adapter_model.safetensors")
            publish_adapter(store, manifest.name, name, Path(folder))
    return names


@dataclass(frozen=True, slots=True)
class Rate:
    tokens_per_second: float
    cpu_milliseconds: float  # of the stage, a token


async def rate(url: str, models: Sequence[str], stage: psutil.Process) -> Rate:
    """Asks once for each of `models`, AT_ONCE at a time."""
    left = iter(enumerate(models))
    made = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal made
        for number, model in left:
            _, tokens = await _ask(session, url, model, number, NEW_TOKENS)
            made += tokens

    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        began, used = time.perf_counter(), sum(stage.cpu_times()[:2])
        async with asyncio.TaskGroup() as clients:
            for _ in range(AT_ONCE):
                clients.create_task(client(session))
        seconds, used = time.perf_counter() - began, sum(stage.cpu_times()[:2]) - used
        return Rate(made / seconds, 1000 * used / made)


async def first_token_seconds(url: str, models: Sequence[str]) -> list[float]:
    """Sends requests for one token, one after the other. Returns the seconds of each."""
    async with aiohttp.ClientSession() as session:
        return [(await _ask(session, url, model, number, 1))[0] for number, model in enumerate(models)]


async def _ask(session: aiohttp.ClientSession, url: str, model: str, number: int, tokens: int) -> tuple[float, int]:
    """Seconds until the whole answer, and its tokens."""
    body = {"model": model, "prompt": _PROMPT.format(number), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        answer = await reply.json()
        assert reply.status == 200, answer
        return time.perf_counter() - began, answer["usage"]["completion_tokens"]


def _speed(rates: Sequence[Rate]) -> float:
    return median(each.tokens_per_second for each in rates)


def _cpu(rates: Sequence[Rate]) -> float:
    return median(each.cpu_milliseconds for each in rates)


@click.command(help=__doc__)
@click.option("--dtype", default="q4", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--requests", type=click.IntRange(min=1), default=64, show_default=True, help="Of each round and contender.")
@click.option("--state", type=click.Path(path_type=Path), default=STATE / "adapters", help="Folder of the store and the logs.")
@click.option("--write/--no-write", default=True, help="Write the section of docs/benchmarks.md.")
def main(dtype: str, rounds: int, requests: int, state: Path, write: bool) -> None:
    load_before = getloadavg()[0]
    spec = local_spec(
        "adapters",
        model={"name": DEFAULT_MODEL, "dtype": dtype},
        stages=1,
        adapters=KEPT,
        adapter_rank=RANK,
        stage={"resources": {"cpu": str(usable_cores()), "memory": "4Gi"}},
        gateway={"draft_tokens": 0},
    )
    with ExitStack() as running:
        local, store = running.enter_context(published_pipeline(spec, state))
        manifest = local.manifest
        names = [f"{manifest.name}:{name}" for name in publish_adapters(store, manifest)]
        stage, pid = running.enter_context(stage_alone(local, 0, state / "stage.log"))
        process = psutil.Process(pid)
        url, _ = running.enter_context(gateway_beside(local, [stage], state / "gateway.log"))
        dice = random.Random(1)
        weights = [1 / rank for rank in range(1, ADAPTERS + 1)]
        base, adapted = list[Rate](), list[Rate]()
        asyncio.run(rate(url, [manifest.name] * AT_ONCE, process))
        for _ in range(rounds):
            base.append(asyncio.run(rate(url, [manifest.name] * requests, process)))
            adapted.append(asyncio.run(rate(url, dice.choices(names, weights, k=requests), process)))
        # Each of these is not loaded: more than the stage keeps were asked for since.
        cold = asyncio.run(first_token_seconds(url, [*names[-KEPT:], *names[-2 * KEPT : -KEPT]]))[KEPT:]
        warm = asyncio.run(first_token_seconds(url, names[-2 * KEPT : -KEPT]))
    verdicts = [
        judged("tokens/s with adapters, of the base model's", _speed(adapted) / _speed(base), LEAST_SHARE),
        judged(
            "the stage's CPU time a token of the base model, of that with adapters", _cpu(base) / _cpu(adapted), LEAST_SHARE
        ),
        judged("first token of an adapter that is not loaded, s", median(cold), MOST_FIRST_SECONDS, at_most=True),
    ]
    rows = [
        (name, f"{_speed(rates):.0f}", ", ".join(f"{each.tokens_per_second:.0f}" for each in rates), f"{_cpu(rates):.2f} ms")
        for name, rates in (("base model", base), (f"{ADAPTERS} adapters by Zipf's law", adapted))
    ]
    text = (
        f"## Adapters\n\n`python -m bench.many.adapters --dtype {dtype}` · {machine()} · {manifest.name} in {dtype}, one stage "
        f"that keeps {KEPT} adapters; {ADAPTERS} random adapters of rank {RANK} on all linear modules; {AT_ONCE} requests at "
        f"once, {requests} a round, {NEW_TOKENS} tokens each; {rounds} alternating rounds; speculative decoding off. The load "
        f"average before it was {load_before:.1f}.\n\n"
        f"{table(['', 'tokens/s, median', 'rounds', 'CPU of the stage a token'], rows)}\n\n"
        f"First token of an adapter that is loaded: {median(warm):.2f} s; that is not: {median(cold):.2f} s.\n\n"
        f"{verdict_table(verdicts)}"
    )
    print(text)
    if write:
        write_section(ROOT / "docs" / "benchmarks.md", "adapters", text)
    sys.exit(any(verdict.met is False for verdict in verdicts))


if __name__ == "__main__":
    main()
