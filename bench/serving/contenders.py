"""The contenders of `bench.serving`, the three workloads, and the turns in which they are measured."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from bench.pipeline import RunningPipeline, cpu_seconds
from bench.serving.client import Client, Measurement
from bench.serving.peers import Transformers
from bench.serving.peers_llama_cpp import LlamaCpp
from bench.serving.requests import Request, Requests

SINGLE: Final = "single stream"
CONCURRENT: Final = "16 concurrent"
PREFILL: Final = "prefill of 1k"
Workload = str


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    pids: tuple[int, ...]  # processes whose CPU time counts, with all below them
    answer: Callable[[Sequence[Request]], Awaitable[Measurement]]
    workloads: tuple[Workload, ...] = (SINGLE, CONCURRENT, PREFILL)


def lamina(pipeline: RunningPipeline) -> list[Contender]:
    """As users run it, and through the gateway without queue-proxies (not in float32)."""
    found = [
        Contender(name, pipeline.pids, Client(url, pipeline.model, {}).measure)
        for name, url in (
            (f"Lamina {pipeline.dtype}", pipeline.url),
            (f"Lamina {pipeline.dtype}, no queue-proxy", pipeline.direct_url),
        )
    ]
    return found[:1] if pipeline.dtype == "float32" else found


def transformers(peer: Transformers) -> list[Contender]:
    """`generate`, with one request or a static batch, and continuous batching."""
    return [
        Contender("transformers generate, bf16", peer.pids, lambda requests: peer.measure("generate", requests)),
        Contender(
            "transformers generate_batch, bf16",
            peer.pids,
            lambda requests: peer.measure("generate_batch", requests),
            (CONCURRENT,),
        ),
    ]


def llama_cpp(peer: LlamaCpp) -> Contender:
    return Contender("llama.cpp server, Q4_1", peer.pids, peer.measure)


class Results:
    """All measurements by workload and contender."""

    def __init__(self) -> None:
        self._found: dict[Workload, dict[str, list[Measurement]]] = defaultdict(lambda: defaultdict(list))

    def add(self, workload: Workload, name: str, measurement: Measurement) -> None:
        self._found[workload][name].append(measurement)

    def workloads(self) -> list[Workload]:
        return list(self._found)

    def names(self, workload: Workload) -> list[str]:
        return list(self._found[workload])

    def of(self, workload: Workload, name: str) -> list[Measurement]:
        return self._found[workload][name]

    def rate(self, workload: Workload, name: str) -> float:
        """Tokens per second, generated (in `PREFILL`: of the prompt): the median of all rounds; 0: not measured."""
        rates = [each.tokens / each.seconds for each in self._found.get(workload, {}).get(name, ())]
        return median(rates) if rates else 0.0

    def ratio(self, workload: Workload, name: str, other: str) -> float:
        """The rate divided by that of `other`: the median of the ratios within each round, whose noise both have met."""
        found = self._found.get(workload, {})
        pairs = zip(found.get(name, ()), found.get(other, ()), strict=False)
        ratios = [(own.tokens / own.seconds) / (their.tokens / their.seconds) for own, their in pairs]
        return median(ratios) if ratios else 0.0


def workloads(requests: Requests, new_tokens: int) -> dict[Workload, list[Request]]:
    """new_tokens: of the single stream."""
    return {SINGLE: [requests.single(new_tokens)], CONCURRENT: requests.ragged(16), PREFILL: [requests.prefill()]}


async def measure_all(
    contenders: Sequence[Contender], work: Mapping[Workload, list[Request]], rounds: int, say: Callable[[str], None]
) -> Results:
    """In the order A B C A B C …, so that changes on the machine meet all of them."""
    for contender in contenders:
        await contender.answer([replace(request, max_tokens=8) for request in next(iter(work.values()))[:1]])
    results = Results()
    for number in range(rounds):
        for workload, asked in work.items():
            for contender in contenders:
                if workload in contender.workloads:
                    cpu = cpu_seconds(contender.pids)
                    found = await contender.answer(asked)
                    found = replace(found, cpu_seconds=cpu_seconds(contender.pids) - cpu)
                    if workload == PREFILL:
                        found = replace(found, tokens=sum(len(request.token_ids) for request in asked))
                    results.add(workload, contender.name, found)
                    say(f"{number + 1}/{rounds} {workload}: {contender.name}: {found.tokens / found.seconds:.1f} tokens/s")
    return results
