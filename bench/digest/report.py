"""What a digest costs: each way of loading beside the one that checks nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

MOST: Final = 0.10
"""Of the loading time, BLAKE3 may cost (issue 12)."""
UNCHECKED: Final = "unchecked"
AS_STAGES_DO: Final = "BLAKE3, as stages do"


@dataclass(frozen=True, slots=True)
class Load:
    seconds: float
    cpu_seconds: float
    """Of this process; the store has its own."""


def cost(loads: Mapping[str, Sequence[Load]], name: str = AS_STAGES_DO, beside: str = UNCHECKED) -> float:
    """How much longer it takes than `beside`, as a share: the median over rounds, each of which had both in turn."""
    return median(own.seconds / other.seconds for own, other in zip(loads[name], loads[beside], strict=True)) - 1


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: who is first, and who follows whom, changes."""
    first = number % len(names)
    order = [*names[first:], *names[:first]]
    return order if number // len(names) % 2 == 0 else order[::-1]


def table(loads: Mapping[str, Sequence[Load]]) -> str:
    lines = [
        "| | wall, min (s) | median | CPU, min (s) | median | beside unchecked | beside xxh3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in loads.items():
        wall, cpu = [load.seconds for load in own], [load.cpu_seconds for load in own]
        lines.append(
            f"| {name} | {min(wall):.3f} | {median(wall):.3f} | {min(cpu):.3f} | {median(cpu):.3f} "
            f"| {cost(loads, name):+.1%} | {cost(loads, name, 'xxh3 only'):+.1%} |"
        )
    return "\n".join(lines)
