"""Whether processes grow: each compared with itself, at the lulls of the last two thirds of a soak.

Memory for keys and values is left out: a stage reserves all of it when it starts, so that it can neither leak nor run over, but
the kernel gives it page by page, where sequences come to lie for the first time. That they let go of it is another verdict.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Final

from bench.soak.records import ROUND_LULLS, Began, Lull, Record, Usage, of

_FEWEST_LULLS: Final = 2
_SHARE: Final = 0.05
_ALLOWED: Final = {"threads": 6.0, "descriptors": 12.0, "own_bytes": 16.0 * 2**20}
"""What honest clients, who are there in lulls too, and the allocator move by themselves; or 5 % of it, if that is more."""
QUANTITIES: Final = tuple(_ALLOWED)


@dataclass(frozen=True, slots=True)
class Growth:
    """One quantity of one process."""

    service: str
    pid: int
    quantity: str
    lulls: int
    level: float
    grown: float  # along the fitted line, from the first of these lulls to the last

    @property
    def allowed(self) -> float:
        return max(_ALLOWED[self.quantity], _SHARE * self.level)

    @property
    def flat(self) -> bool:
        return self.grown <= self.allowed


def growths(records: Sequence[Record]) -> list[Growth]:
    """Of every process that lived through at least two lulls of the last two thirds."""
    found = []
    for (service, pid), points in _at_lulls(records).items():
        if len(points) >= _FEWEST_LULLS:
            found += [_growth(service, pid, quantity, points) for quantity in QUANTITIES]
    return found


def _growth(service: str, pid: int, quantity: str, points: Sequence[Usage]) -> Growth:
    times, values = [point.t for point in points], [float(getattr(point, quantity)) for point in points]
    slope = linear_regression(times, values).slope
    return Growth(service, pid, quantity, len(points), fmean(values), slope * (times[-1] - times[0]))


def _at_lulls(records: Sequence[Record]) -> dict[tuple[str, int], list[Usage]]:
    """(service, pid) → the last look at it in each lull but those of its first round, in which it loads and its pools fill."""
    found: dict[tuple[str, int], list[Usage]] = {}
    born = {(usage.service, usage.pid): usage.t for usage in reversed(of(Usage, records))}
    for lull in lulls(records):
        last = {
            (usage.service, usage.pid): usage
            for usage in of(Usage, records)
            if (lull.t + lull.until) / 2 <= usage.t < lull.until
        }
        for key, usage in last.items():
            if lull.t - born[key] >= ROUND_LULLS * (lull.until - lull.t):
                found.setdefault(key, []).append(usage)
    return found


def lulls(records: Sequence[Record]) -> Iterator[Lull]:
    """Those of the last two thirds."""
    for began in of(Began, records)[:1]:
        yield from (lull for lull in of(Lull, records) if lull.t >= began.t + began.seconds / 3)
