"""The records of a soak, to which all of its processes append."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from bench.records import Record, decoded

GATEWAY: Final = "gateway"
STORE: Final = "store"
FREE: Final = "lamina_stage_free_tokens"  # the gauge that is at its maximum, not 0, if nothing is held
ROUND_LULLS: Final = 3  # length of a round in lulls


class Began(Record, frozen=True):
    """The beginning of the disturbance."""

    seconds: float
    services: tuple[str, ...]  # the gateway, then the stages in order
    model: str
    honest: int  # clients at a time
    kill_seconds: float
    hostile: tuple[str, ...] = ()  # planned kinds of clients


class Reference(Record, frozen=True):
    """The undisturbed answer to a question."""

    question: str
    text: str
    token_ids: tuple[int, ...]
    completion_tokens: int


class Answer(Record, frozen=True):
    """An honest client's answer."""

    question: str
    api: str
    started: float
    text: str
    completion_tokens: int
    token_ids: tuple[int, ...] | None = None  # None: the OpenAI API returns no ids
    replays: int = 0


class Refused(Record, frozen=True):
    """An honest client was told to come again: 429 or 503."""

    api: str
    status: int
    retry_after: str | None  # the header, as it came


class Lost(Record, frozen=True):
    """An honest client got no complete answer."""

    question: str
    api: str
    started: float
    reason: str


class Attempt(Record, frozen=True):
    """One attempt of a hostile client; outcomes: outcome → number of its requests or connections."""

    name: str
    seconds: float
    outcomes: dict[str, int]


class Fault(Record, frozen=True):
    """From `t` to `until`. kill: SIGKILL; hang: SIGSTOP; away: the store does not run."""

    fault: Literal["kill", "hang", "away"]
    service: str
    until: float


class Lull(Record, frozen=True):
    """From `t` to `until` no hostile client runs, so that processes can be compared with themselves."""

    until: float


class Health(Record, frozen=True):
    """`/healthz` of a process, asked at `t`; status 0: no answer."""

    service: str
    status: int
    seconds: float


class Usage(Record, frozen=True):
    """Resources of one process."""

    service: str
    pid: int
    threads: int
    descriptors: int
    resident_bytes: int
    kv_bytes: int = 0  # part of resident_bytes: keys and values, reserved at the start and resident from their first use

    @property
    def own_bytes(self) -> int:
        """Resident memory without keys and values."""
        return self.resident_bytes - self.kv_bytes


class Ended(Record, frozen=True):
    """A process of the service has ended before `t`; the platform started another."""

    service: str
    cause: str


class Rest(Record, frozen=True):
    """A service's gauges without requests: before and after the disturbance."""

    moment: Literal["before", "after"]
    service: str
    gauges: dict[str, float]


_DECODER: Final[msgspec.json.Decoder[Record]] = msgspec.json.Decoder(
    Began | Reference | Answer | Refused | Lost | Attempt | Fault | Lull | Health | Usage | Ended | Rest
)


def read_records(path: Path) -> list[Record]:
    """In order of time. Raises msgspec.DecodeError, OSError."""
    return decoded(path, _DECODER)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that a run's processes get, as JSON on their command line."""

    records: str
    started: float  # of the recorder's clock
    seconds: float  # of disturbance
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
        """A round has hostile clients, then a lull. It is short enough for a trend, and long enough to hold connections."""
        return min(60.0, max(15.0, self.seconds / 9))

    @property
    def lull_seconds(self) -> float:
        return self.round_seconds / ROUND_LULLS
