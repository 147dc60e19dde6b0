"""`python -m bench.many`: 64, 256 and 1,000 conversations at once, and two and four gateways, on stages that sleep.

    python -m bench.many                                   some three minutes on two cores
    python -m bench.many --conversations 64 --gateways 1

Stages are three processes that sleep in each pass, behind real HTTP, so that the gateway is measured. Clients share its cores:
on a machine with few cores more gateways have no core to run on, and the verdict says so.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import getloadavg
from pathlib import Path
from typing import Final

import click
import psutil

from bench.many.conversations import Conversation, converse
from bench.many.report import Load, LoadFindings, markdown, verdicts
from bench.pipeline import NUM_STAGES, gateway_beside, local_spec, published_pipeline, stage_alone
from bench.report import STATE, help_text, machine, output_option, report
from functions.stage.engine.threads import usable_cores
from knative.commands.local_pipeline import LocalPipeline
from knative.commands.model_choice import DEFAULT_MODEL

_STATE: Final = STATE / "bench-many"
_PASS_SECONDS: Final = 0.04
_MICRO_BATCH_SEQUENCES: Final = 170  # three equal stages get six micro-batches, which hold 1,000 conversations
_MOST_MERGED: Final = 8
_KV_CACHE: Final = "4Gi"  # of stages that sleep: a number, not memory


@click.command(help=help_text(__doc__))
@click.option("--conversations", type=click.IntRange(min=1), multiple=True, default=(64, 256, 1000), show_default=True)
@click.option("--gateways", type=click.IntRange(min=1), multiple=True, default=(1, 2, 4), show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=8), default=48, show_default=True)
@output_option
def main(conversations: Sequence[int], gateways: Sequence[int], max_tokens: int, output: Path) -> None:
    load_before = getloadavg()[0]
    loads = [Load(count, 1) for count in conversations]
    loads += [Load(max(conversations), count) for count in gateways if count > 1]
    found = {}
    with _pipeline() as (local, urls, stage_pids):
        for load in loads:
            found[load] = _measure(local, urls, stage_pids, load, max_tokens)
            click.echo(f"{load}: {found[load].tokens_per_second:.0f} tokens/s, {len(found[load].errors)} errors")
            for error in sorted(set(found[load].errors))[:5]:
                click.echo(f"  {error}")
    facts = (
        f"`python -m bench.many` on {machine()}; three stages that sleep {_PASS_SECONDS * 1000:g} ms a pass, micro-batches of "
        f"at most {_MICRO_BATCH_SEQUENCES}, all conversations asked at once and streamed, {max_tokens} tokens each, nothing "
        f"drafted. Clients run on the same cores. The load average before it was {load_before:.1f}."
    )
    report(output, "many", markdown(found, facts), verdicts(found))


@contextmanager
def _pipeline() -> Iterator[tuple[LocalPipeline, list[str], list[int]]]:
    spec = local_spec(
        "many",
        model={"name": DEFAULT_MODEL, "dtype": "bfloat16"},
        stages=NUM_STAGES,
        stage={
            "resources": {"cpu": "1", "memory": "5Gi"},
            "kv_cache": _KV_CACHE,
            "max_merge": _MOST_MERGED,
            "layer_group": "sleep",
            "sleep_seconds": [_PASS_SECONDS] * NUM_STAGES,
        },
        gateway={
            "micro_batch_sequences": _MICRO_BATCH_SEQUENCES,
            "queue_limit": 1000,
            "draft_tokens": 0,
            "prefix_sharing": "pipeline",
            "access_log": "off",
        },
    )
    with ExitStack() as stack:
        local, _ = stack.enter_context(published_pipeline(spec, _STATE))
        logs = [_STATE / f"stage-{index}.log" for index in range(NUM_STAGES)]
        stages = [stack.enter_context(stage_alone(local, index, log)) for index, log in enumerate(logs)]
        yield local, [url for url, _ in stages], [pid for _, pid in stages]


def _measure(local: LocalPipeline, urls: Sequence[str], stage_pids: Sequence[int], load: Load, max_tokens: int) -> LoadFindings:
    with ExitStack() as stack:
        started = [
            stack.enter_context(gateway_beside(local, urls, _STATE / f"gateway-{number}.log"))
            for number in range(load.gateways)
        ]
        gateways = [psutil.Process(pid) for _, pid in started]
        asyncio.run(converse([url for url, _ in started], local.pipeline.spec.model.name, load.gateways, max_tokens))
        others = [psutil.Process(pid) for pid in (*stage_pids, os.getpid())]
        memory, cpu, other = _resident(gateways), _cpu(gateways), _cpu(others)
        began, idle = time.perf_counter(), psutil.cpu_times().idle
        answers, peak = asyncio.run(
            _watched(gateways, [url for url, _ in started], local.pipeline.spec.model.name, load, max_tokens)
        )
        seconds = time.perf_counter() - began
        return LoadFindings(
            [each.error for each in answers if each.error],
            sum(each.tokens for each in answers),
            seconds,
            [gap for each in answers for gap in each.gaps],
            _cpu(gateways) - cpu,
            _cpu(others) - other,
            (peak - memory) / load.conversations,
            usable_cores() - (psutil.cpu_times().idle - idle) / seconds,
            usable_cores(),
        )


async def _watched(
    gateways: Sequence[psutil.Process], urls: Sequence[str], model: str, load: Load, max_tokens: int
) -> tuple[list[Conversation], int]:
    """All answers, and the peak memory of the gateways meanwhile."""
    answering = asyncio.ensure_future(converse(urls, model, load.conversations, max_tokens))
    peak = 0
    while not answering.done():
        peak = max(peak, _resident(gateways))
        await asyncio.wait([answering], timeout=0.5)
    return answering.result(), peak


def _resident(processes: Sequence[psutil.Process]) -> int:
    resident: list[int] = [process.memory_info().rss for process in processes]
    return sum(resident)


def _cpu(processes: Sequence[psutil.Process]) -> float:
    seconds: list[float] = [sum(process.cpu_times()[:2]) for process in processes]
    return sum(seconds)


if __name__ == "__main__":
    main()
