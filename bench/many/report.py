"""What `bench.many` found, its verdicts, and its section of docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Final

_MOST_GAP_RATIO: Final = 3.0
_LEAST_GAIN_OF_TWO: Final = 1.8
_CORES_IN_USE: Final = 0.85
"""Of all cores: from here on more gateways have nothing to run on, and their throughput says nothing."""


@dataclass(frozen=True, slots=True)
class Load:
    conversations: int
    gateways: int


@dataclass(frozen=True, slots=True)
class Found:
    """Of one load."""

    errors: Sequence[str]
    tokens: int
    seconds: float
    gaps: Sequence[float]
    """Seconds between what came to a client and what came next, of all conversations."""
    gateway_cpu_seconds: float
    """Of all gateways."""
    other_cpu_seconds: float
    """Of stages and clients."""
    bytes_per_conversation: float
    """That the gateways' memory grew by while all were open."""
    busy_cores: float
    """By all that ran on the machine, the benchmark's own included."""
    cores: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def gap_ratio(self) -> float:
        """p99 by p50."""
        return self.gap(0.99) / median(self.gaps)

    def gap(self, share: float) -> float:
        return quantiles(self.gaps, n=100, method="inclusive")[round(share * 100) - 1]

    @property
    def tokens_per_gateway_cpu_second(self) -> float:
        return self.tokens / self.gateway_cpu_seconds


@dataclass(frozen=True, slots=True)
class Verdict:
    word: str
    """met, missed or not measurable."""
    what: str
    seen: str


def verdicts(found: Mapping[Load, Found]) -> list[Verdict]:
    errors = sum(len(one.errors) for one in found.values())
    told = [Verdict(_word(errors == 0), "no conversation ends with an error", f"{errors} errors")]
    most = max(load.conversations for load in found if load.gateways == 1)
    one = found[Load(most, 1)]
    told.append(
        Verdict(
            _word(one.gap_ratio <= _MOST_GAP_RATIO),
            f"{most} conversations: p99 between tokens at most {_MOST_GAP_RATIO:g} × p50",
            f"{one.gap_ratio:.2f}",
        )
    )
    if (two := found.get(Load(most, 2))) is not None:
        gain = two.tokens_per_second / one.tokens_per_second
        starved = gain < _LEAST_GAIN_OF_TWO and two.busy_cores >= _CORES_IN_USE * two.cores
        kept = two.tokens_per_gateway_cpu_second / one.tokens_per_gateway_cpu_second
        told.append(
            Verdict(
                "not measurable" if starved else _word(gain >= _LEAST_GAIN_OF_TWO),
                f"two gateways: at least {_LEAST_GAIN_OF_TWO:g} × one",
                f"{gain:.2f} with {two.busy_cores:.2f} of {two.cores} cores busy; {kept:.2f} × the tokens for a CPU second "
                "of a gateway",
            )
        )
    return told


def _word(met: bool) -> str:
    return "met" if met else "missed"


def markdown(found: Mapping[Load, Found], facts: str) -> str:
    rows = [
        "| conversations | gateways | tokens/s | gateway CPU a token | cores busy | gateway memory a conversation "
        "| between tokens p50, p99 | errors |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for load, one in found.items():
        rows.append(
            f"| {load.conversations} | {load.gateways} | {one.tokens_per_second:.0f} "
            f"| {one.gateway_cpu_seconds / one.tokens * 1e6:.0f} µs | {one.other_cpu_seconds / one.tokens * 1e6:.0f} µs "
            f"| {one.busy_cores:.2f} of {one.cores} "
            f"| {one.bytes_per_conversation / 1024:.0f} KiB | {median(one.gaps) * 1000:.0f}, {one.gap(0.99) * 1000:.0f} ms "
            f"({one.gap_ratio:.2f} ×) | {len(one.errors)} |"
        )
    told = [f"* {verdict.word}: {verdict.what}: {verdict.seen}." for verdict in verdicts(found)]
    limit = max(one.tokens_per_gateway_cpu_second for one in found.values())
    told.append(
        f"* A gateway is one process whose Python runs on one core: it ends at {limit:.0f} tokens a second here. At 20 tokens "
        f"a second for each conversation that is {limit / 20:.0f} of them."
    )
    return "\n".join(["## Many at once", "", facts, "", *rows, "", *told])
