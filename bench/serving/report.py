"""The section of docs/benchmarks.md that `bench.serving` writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Final

from bench.serving.contenders import CONCURRENT, PREFILL, SINGLE, Results
from bench.serving.interference import Interference
from bench.serving.round import RoundTime
from bench.serving.token_time import TokenTime, table, verdicts

GENERATE: Final = "transformers generate, bf16"
GENERATE_BATCH: Final = "transformers generate_batch, bf16"
LLAMA_CPP: Final = "llama.cpp server, Q4_1"
BF16: Final = "Lamina bfloat16"
INT8: Final = "Lamina int8"
Q4: Final = "Lamina q4"


@dataclass(frozen=True, slots=True)
class Findings:
    """All of one run."""

    results: Results
    rounds: Mapping[str, RoundTime]
    """By what went round."""
    interference: Mapping[str, Interference]
    """By dtype."""
    sleeping: Mapping[str, tuple[float, float]]
    """Milliseconds of the stages → steps per second, and what the slowest stage alone would reach."""
    bytes_per_second: float
    weights_bytes: Mapping[str, int]
    """By dtype: what a token's step reads of them."""
    llama_cpp: str
    """The build that served it, empty where none did."""
    did_not_run: Mapping[str, str]
    """Contender → why."""
    token_times: Mapping[str, TokenTime] = field(default_factory=dict)
    """By dtype, and with queue-proxies on the way or not."""


@dataclass(frozen=True, slots=True)
class Target:
    what: str
    wanted: float
    seen: float
    """0 where not measured."""
    at_most: bool = False
    percent: bool = False

    @property
    def verdict(self) -> str:
        if not self.seen:
            return "not measured"
        return "met" if (self.seen <= self.wanted if self.at_most else self.seen >= self.wanted) else "missed"


def targets(found: Findings) -> list[Target]:
    """What serving is to reach, as far as this run was to measure it, and what it saw."""
    ratio = found.results.ratio

    def best(workload: str) -> float:
        return max(ratio(workload, own, LLAMA_CPP) for own in (BF16, INT8, Q4))

    against_llama_cpp = [
        Target("single stream, q4, × llama.cpp", 1.35, ratio(SINGLE, Q4, LLAMA_CPP)),
        Target("16 concurrent, best dtype, × llama.cpp", 4.3, best(CONCURRENT)),
        Target("prefill of 1k, best dtype, × llama.cpp", 5.0, best(PREFILL)),
    ]
    wanted = [
        Target("single stream, bf16, × generate", 2.2, ratio(SINGLE, BF16, GENERATE)),
        Target("single stream, int8, × generate", 2.8, ratio(SINGLE, INT8, GENERATE)),
        *against_llama_cpp,
        Target("16 concurrent, bf16, × static batch", 3.6, ratio(CONCURRENT, BF16, GENERATE)),
        Target("16 concurrent, bf16, × generate_batch", 1.3, ratio(CONCURRENT, BF16, GENERATE_BATCH)),
        *(
            Target(f"transport and codec of a round, {name}", wanted, found.rounds[name].transport_share, True, True)
            for name, wanted in (("int8, 2 × 8", 0.15), ("bfloat16, 2 × 8", 0.08))
            if name in found.rounds
        ),
        *(
            Target(f"p99 between tokens while 4k are admitted, {dtype}, × p50", 3.0, _slowed(each), True)
            for dtype, each in found.interference.items()
        ),
        *(
            Target(what, wanted, seen, at_most, True)
            for name, one in found.token_times.items()
            for what, wanted, seen, at_most in verdicts(name, one)
        ),
        *(Target(f"sleeping {name} ms, × slowest stage", 0.8, rate / bound) for name, (rate, bound) in found.sleeping.items()),
    ]
    return [target for target in wanted if target.seen or (target in against_llama_cpp and LLAMA_CPP in found.did_not_run)]


def markdown(found: Findings, facts: Sequence[str], picture: str) -> str:
    parts = ["## Serving", *facts, f"![Tokens per second of all contenders]({picture})", *_targets_table(targets(found))]
    for workload in found.results.workloads():
        parts += _workload_table(found, workload)
    parts += table(found.token_times) if found.token_times else []
    parts += _round_table(found.rounds) + _interference_table(found.interference) + _sleeping_table(found.sleeping)
    return "\n".join(parts)


def _targets_table(rows: Sequence[Target]) -> list[str]:
    return [
        "\n| wanted | | seen | |\n|---|---:|---:|---|",
        *(
            f"| {row.what} | {'≤' if row.at_most else '≥'} {_number(row.wanted, row)} "
            f"| {_number(row.seen, row)} | {row.verdict} |"
            for row in rows
        ),
    ]


def _number(value: float, row: Target) -> str:
    if not value:
        return "–"
    return f"{value:.1%}" if row.percent else f"{value:.2f}"


def _workload_table(found: Findings, workload: str) -> list[str]:
    results = found.results
    rows = [
        f"\n### {_TITLES[workload]}\n",
        "| | first token, ms | between tokens p50, ms | p99, ms | tokens/s | × generate | CPU s per 1k tokens |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in results.names(workload):
        measured = results.of(workload, name)
        first = [seconds for each in measured for seconds in each.first_token_seconds]
        gaps = [seconds for each in measured for seconds in each.gap_seconds]
        cpu = median(each.cpu_seconds / each.tokens * 1000 for each in measured)
        ratio = results.ratio(workload, name, GENERATE)
        rows.append(
            f"| {name} | {_ms(median(first)) if first else '–'} | {_ms(median(gaps)) if gaps else '–'} "
            f"| {_ms(_p99(gaps)) if gaps else '–'} | {results.rate(workload, name):.1f} "
            f"| {f'{ratio:.2f}' if ratio else '–'} | {cpu:.1f} |"
        )
    rows += [f"| {name} did not run: {why} | – | – | – | – | – | – |" for name, why in found.did_not_run.items()]
    if workload == SINGLE:
        rows += [
            f"| bound: {size / 1e6:.0f} MB of {dtype} weights a token at {found.bytes_per_second / 1e9:.1f} GB/s "
            f"| | | | {found.bytes_per_second / size:.0f} | | |"
            for dtype, size in found.weights_bytes.items()
        ]
    return rows


_TITLES: Final = {
    SINGLE: "Single stream: a prompt of 128 tokens",
    CONCURRENT: "16 concurrent: prompts of 16 to 512, answers of 16 to 256 tokens",
    PREFILL: "Prefill: a prompt of 1,024 tokens, one token of answer (tokens/s are the prompt's)",
}


def _round_table(rounds: Mapping[str, RoundTime]) -> list[str]:
    return [
        "\n### Where a decode step's time goes\n",
        "One micro-batch's round through the three stages, milliseconds; `2 × 8`: two micro-batches of eight on their way.\n",
        "| | compute | queue | codec | HTTP | gateway | round | codec and HTTP |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {_ms(each.compute)} | {_ms(each.queue)} | {_ms(each.codec, 2)} | {_ms(each.http, 2)} "
            f"| {_ms(each.gateway, 2)} | {_ms(each.total)} | {each.transport_share:.1%} |"
            for name, each in rounds.items()
        ),
    ]


def _interference_table(interference: Mapping[str, Interference]) -> list[str]:
    return [
        "\n### Running answers while a prompt of 4,096 tokens is admitted\n",
        "Milliseconds between tokens of eight running answers.\n",
        "| | alone p50 | p99 | meanwhile p50 | p99 | p99 meanwhile / p50 meanwhile | the prompt's first token, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {dtype} | {_ms(median(each.alone))} | {_ms(_p99(each.alone))} | {_ms(median(each.during))} "
            f"| {_ms(_p99(each.during))} | {_slowed(each):.2f} | {each.first_token_seconds:.2f} |"
            for dtype, each in interference.items()
        ),
    ]


def _sleeping_table(sleeping: Mapping[str, tuple[float, float]]) -> list[str]:
    return [
        "\n### Pipelining: stages that sleep instead of computing, eight micro-batches\n",
        "| ms a pass | steps/s | slowest stage alone | ratio |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {rate:.1f} | {bound:.1f} | {rate / bound:.2f} |" for name, (rate, bound) in sleeping.items()),
    ]


def _slowed(each: Interference) -> float:
    return _p99(each.during) / median(each.during)


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def _ms(seconds: float, digits: int = 1) -> str:
    return f"{seconds * 1000:.{digits}f}"
