"""The records of a load run, and figures computed from them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec

from bench.records import Record, decoded, of


class Phase(Record, frozen=True):
    """From here on the plan wants this many conversations."""

    conversations: int
    seconds: float


class Second(Record, frozen=True):
    """The second that ended at `t`."""

    in_flight: int  # questions without a complete answer
    tokens: int


class Answer(Record, frozen=True):
    """An answer that was complete at `t`."""

    conversation: int
    started: float
    prompt: str
    text: str
    tokens: int
    time_to_first_token_seconds: float
    replays: int


class Failure(Record, frozen=True):
    """A question without a complete answer; conversation -1: the metrics page could not be read."""

    conversation: int
    started: float
    reason: str


class Replicas(Record, frozen=True):
    """A revision's pods at `t`."""

    service: str
    revision: str
    ready: float = 0
    desired: float = 0
    starting: float = 0
    not_ready: float = 0
    leaving: float = 0
    concurrency: float = 0
    panicking: float = 0

    @property
    def held(self) -> float:
        """Pods that use resources, in any state."""
        return self.ready + self.starting + self.not_ready + self.leaving


_DECODER: Final[msgspec.json.Decoder[Record]] = msgspec.json.Decoder(Phase | Second | Answer | Failure | Replicas)


def read_records(path: Path) -> list[Record]:
    """In order of time. Raises msgspec.DecodeError, OSError."""
    return decoded(path, _DECODER)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed; NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def phases(records: Iterable[Record]) -> Iterator[tuple[Phase, float]]:
    """Each phase with its end; the last one lasts until the last record."""
    records = list(records)
    found = of(Phase, records)
    ends = [phase.t for phase in found[1:]] + [records[-1].t if records else 0.0]
    yield from zip(found, ends, strict=True)


def replica_seconds(records: Iterable[Record]) -> dict[str, tuple[float, float]]:
    """Service → (its replica-seconds, the replica-seconds of its peak held throughout)."""
    held: dict[str, dict[float, float]] = {}
    for record in of(Replicas, records):
        by_time = held.setdefault(record.service, {})
        by_time[record.t] = by_time.get(record.t, 0.0) + record.held
    result = {}
    for service, by_time in held.items():
        times = sorted(by_time)
        area = sum(by_time[start] * (end - start) for start, end in pairwise(times))
        result[service] = area, max(by_time.values()) * (times[-1] - times[0])
    return result


def idle_seconds(records: Iterable[Record]) -> float:
    """How long no service held a pod."""
    held: dict[float, float] = {}
    for record in of(Replicas, records):
        held[record.t] = held.get(record.t, 0.0) + record.held
    return sum(end - start for start, end in pairwise(sorted(held)) if not held[start])
