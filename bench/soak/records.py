"""What a soak records: JSON lines, one file that all of its processes append to."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeVar

import msgspec

GATEWAY: Final = "gateway"
STORE: Final = "store"
FREE: Final = "lamina_stage_free_tokens"  # the gauge that is as large as it can be, not 0, when nothing is held
ROUND_LULLS: Final = 3  # a round is as long as so many lulls


class Record(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """`t`: seconds since the start of the run."""

    t: float


class Began(Record, frozen=True):
    """The disturbance began, and is to last so long."""

    seconds: float
    services: tuple[str, ...]  # the gateway, then the stages in order
    model: str
    honest: int  # clients at a time
    kill_seconds: float
    hostile: tuple[str, ...] = ()  # kinds of clients that are to come


class Reference(Record, frozen=True):
    """What a question is answered while nothing disturbs."""

    question: str
    text: str
    token_ids: tuple[int, ...]
    completion_tokens: int


class Answer(Record, frozen=True):
    """An answer that an honest client got."""

    question: str
    door: str
    started: float
    text: str
    completion_tokens: int
    token_ids: tuple[int, ...] | None = None  # none: the OpenAI API tells no ids
    replays: int = 0


class Refused(Record, frozen=True):
    """An honest client was told to come again: 429 or 503."""

    door: str
    status: int
    retry_after: str | None  # the header, as it came


class Lost(Record, frozen=True):
    """An honest client got no answer, or half of one."""

    question: str
    door: str
    started: float
    reason: str


class Attempt(Record, frozen=True):
    """What one hostile client did, and what became of its requests or connections: outcome → how many."""

    name: str
    seconds: float
    outcomes: dict[str, int]


class Fault(Record, frozen=True):
    """From `t` to `until`. kill: SIGKILL; hang: SIGSTOP; away: the store is not there."""

    fault: Literal["kill", "hang", "away"]
    service: str
    until: float


class Lull(Record, frozen=True):
    """From `t` to `until` no hostile client is there, so that processes can be compared with themselves."""

    until: float


class Health(Record, frozen=True):
    """`/healthz` of a process, asked at `t`; status 0: no answer."""

    service: str
    status: int
    seconds: float


class Usage(Record, frozen=True):
    """Of one process."""

    service: str
    pid: int
    threads: int
    descriptors: int
    resident_bytes: int
    kv_bytes: int = 0
    """Of them, the memory for keys and values, which is reserved from the start and becomes resident where it is used first."""

    @property
    def own_bytes(self) -> int:
        """Resident, without keys and values."""
        return self.resident_bytes - self.kv_bytes


class Ended(Record, frozen=True):
    """A process of the service has ended, seen at `t`; the platform started another."""

    service: str
    cause: str


class Rest(Record, frozen=True):
    """A service's gauges while nobody asks: before the disturbance, and when it is over."""

    moment: Literal["before", "after"]
    service: str
    gauges: dict[str, float]


_DECODER: Final = msgspec.json.Decoder(
    Began | Reference | Answer | Refused | Lost | Attempt | Fault | Lull | Health | Usage | Ended | Rest
)
R = TypeVar("R", bound=Record)


def read_records(path: Path) -> list[Record]:
    """In order of time. Raises msgspec.DecodeError, OSError."""
    found: list[Record] = [_DECODER.decode(line) for line in path.read_bytes().splitlines() if line.strip()]
    return sorted(found, key=lambda record: record.t)


def of(kind: type[R], records: Sequence[Record]) -> list[R]:
    return [record for record in records if isinstance(record, kind)]


@dataclass
class Recorder:
    """Appends records as they happen. Processes share the clock by `started` (`time.monotonic` of the machine)."""

    path: Path
    started: float = field(default_factory=time.monotonic)
    _file: int = -1

    def __enter__(self) -> Self:
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)

    @property
    def now(self) -> float:
        return round(time.monotonic() - self.started, 4)

    def write(self, record: Record) -> None:
        """One write to a file opened for appending: lines of several processes do not mix."""
        os.write(self._file, msgspec.json.encode(record) + b"\n")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes of a run are told, as JSON on their command line."""

    records: str
    started: float  # of the recorder's clock
    seconds: float  # how long to disturb
    url: str  # of the gateway, as clients know it
    admin_url: str
    services: Mapping[str, str]  # name in the records → the Service's name on the platform
    model: str
    honest_key: str
    hostile_key: str
    honest: int
    seed: int = 1

    @property
    def round_seconds(self) -> float:
        """Hostile clients, then a lull: enough rounds for a trend, none too short to hold a connection open in."""
        return min(60.0, max(15.0, self.seconds / 9))

    @property
    def lull_seconds(self) -> float:
        return self.round_seconds / ROUND_LULLS
