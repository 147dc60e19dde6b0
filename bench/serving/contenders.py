"""The contenders of `bench.serving` and `bench.peers`, the three workloads, and the turns in which they are measured."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

from bench.pipeline import cpu_seconds
from bench.serving.client import Measurement
from bench.serving.requests import Request

SINGLE: Final = "single stream"
CONCURRENT: Final = "16 concurrent"
PREFILL: Final = "prefill of 1k"
LLAMA_CPP: Final = "llama.cpp server, Q4_0"
_REST_SECONDS: Final = 3.0  # before each turn: prompts were a third slower directly after vLLM (docs/log.md)


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    pids: tuple[int, ...]  # processes whose CPU time counts, with all below them
    answer: Callable[[Sequence[Request]], Awaitable[Measurement]]


class ContenderEnded(RuntimeError):
    """A contender's process has ended. why: for a report, without this machine's paths."""

    def __init__(self, why: str, log: Path) -> None:
        super().__init__(f"{why}; {log} says more")
        self.why = why


Results = dict[str, dict[str, list[Measurement]]]  # by workload and contender, a measurement of each round


def rate(measured: Sequence[Measurement]) -> float:
    """Tokens per second, generated (in `PREFILL`: of the prompt): the median of all rounds."""
    return median(each.tokens / each.seconds for each in measured)


def ratio(measured: Mapping[str, Sequence[Measurement]], name: str, other: str) -> float:
    """One contender's rate divided by another's in one workload; 0: not measured.

    The median of the ratios within each round, whose noise both have met.
    """
    pairs = zip(measured.get(name, ()), measured.get(other, ()), strict=False)
    ratios = [(own.tokens / own.seconds) / (their.tokens / their.seconds) for own, their in pairs]
    return median(ratios) if ratios else 0.0


async def measure_all(
    contenders: Sequence[Contender],
    work: Mapping[str, list[Request]],
    rounds: int,
    say: Callable[[str], None],
    failed: dict[str, str],
    rest_seconds: float = _REST_SECONDS,
) -> Results:
    """In the order A B C A B C …, so that changes on the machine meet all of them, with a rest before each turn.

    failed: gets those that end on the way, by name, and why; what was measured of them before stays.
    """
    for contender in contenders:
        await contender.answer([replace(request, max_tokens=8) for request in next(iter(work.values()))[:1]])
    results: Results = {}
    for number in range(rounds):
        for workload, asked in work.items():
            for contender in (each for each in contenders if each.name not in failed):
                await asyncio.sleep(rest_seconds)
                cpu = cpu_seconds(contender.pids)
                try:
                    found = await contender.answer(asked)
                except ContenderEnded as error:
                    failed[contender.name] = error.why
                    say(f"{number + 1}/{rounds} {workload}: {contender.name}: {error}")
                    continue
                except TimeoutError:
                    failed[contender.name] = why = "it did not answer in time"
                    say(f"{number + 1}/{rounds} {workload}: {contender.name}: {why}")
                    continue
                found = replace(found, cpu_seconds=cpu_seconds(contender.pids) - cpu)
                if workload == PREFILL:
                    found = replace(found, tokens=sum(len(request.token_ids) for request in asked))
                results.setdefault(workload, {}).setdefault(contender.name, []).append(found)
                say(f"{number + 1}/{rounds} {workload}: {contender.name}: {found.tokens / found.seconds:.1f} tokens/s")
    return results
