"""The findings of `bench.many`, their verdicts, and the section of docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from bench.report import Verdict, judged, p99, table

_MOST_GAP_RATIO: Final = 3.0
_LEAST_GAIN_OF_TWO: Final = 1.8
_CORES_IN_USE: Final = 0.85  # share of all cores: from here on more gateways have no core to run on


@dataclass(frozen=True, slots=True)
class Load:
    conversations: int
    gateways: int


@dataclass(frozen=True, slots=True)
class LoadFindings:
    """The findings for one load."""

    errors: Sequence[str]
    tokens: int
    seconds: float
    gaps: Sequence[float]  # seconds between one arrival at a client and the next, of all conversations
    gateway_cpu_seconds: float  # of all gateways
    other_cpu_seconds: float  # of stages and clients
    bytes_per_conversation: float  # growth of the gateways' memory while all conversations were open
    busy_cores: float  # by everything on the machine, the benchmark's own processes included
    cores: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def gap_ratio(self) -> float:
        """p99 divided by p50."""
        return p99(self.gaps) / median(self.gaps)

    @property
    def tokens_per_gateway_cpu_second(self) -> float:
        return self.tokens / self.gateway_cpu_seconds


def verdicts(found: Mapping[Load, LoadFindings]) -> list[Verdict]:
    errors = sum(len(each.errors) for each in found.values())
    told = [Verdict("no conversation ends with an error", f"{errors} errors", errors == 0)]
    most = max(load.conversations for load in found if load.gateways == 1)
    one = found[Load(most, 1)]
    told.append(judged(f"{most} conversations: p99 between tokens by p50", one.gap_ratio, _MOST_GAP_RATIO, at_most=True))
    if (two := found.get(Load(most, 2))) is not None:
        gain = two.tokens_per_second / one.tokens_per_second
        met = gain >= _LEAST_GAIN_OF_TWO
        starved = not met and two.busy_cores >= _CORES_IN_USE * two.cores
        kept = two.tokens_per_gateway_cpu_second / one.tokens_per_gateway_cpu_second
        busy = f"{two.busy_cores:.2f} of {two.cores} cores busy"
        seen = f"{gain:.2f} with {busy}; {kept:.2f} × the tokens for a CPU second of a gateway"
        told.append(Verdict(f"two gateways: at least {_LEAST_GAIN_OF_TWO:g} × one", seen, None if starved else met))
    return told


def markdown(found: Mapping[Load, LoadFindings], facts: str) -> str:
    columns = [
        "conversations", "gateways", "tokens/s", "gateway CPU a token", "other CPU a token", "cores busy",
        "gateway memory a conversation", "between tokens p50, p99", "errors",
    ]  # fmt: skip
    rows = [
        [
            load.conversations,
            load.gateways,
            f"{each.tokens_per_second:.0f}",
            f"{each.gateway_cpu_seconds / each.tokens * 1e6:.0f} µs",
            f"{each.other_cpu_seconds / each.tokens * 1e6:.0f} µs",
            f"{each.busy_cores:.2f} of {each.cores}",
            f"{each.bytes_per_conversation / 1024:.0f} KiB",
            f"{median(each.gaps) * 1000:.0f}, {p99(each.gaps) * 1000:.0f} ms ({each.gap_ratio:.2f} ×)",
            len(each.errors),
        ]
        for load, each in found.items()
    ]
    limit = max(each.tokens_per_gateway_cpu_second for each in found.values())
    told = [f"* {verdict}." for verdict in verdicts(found)]
    told.append(
        f"* A gateway is one process whose Python runs on one core: it ends at {limit:.0f} tokens a second here. At 20 tokens "
        f"a second for each conversation that is {limit / 20:.0f} of them."
    )
    return "\n".join(["## Many at once", "", facts, "", table(columns, rows), "", *told])
