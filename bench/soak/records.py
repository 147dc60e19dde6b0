"""The records of a soak, to which all of its processes append."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from bench.records import Record, decoded

GATEWAY: Final = "gateway"  # begins the names of the gateways
STORE: Final = "store"
GREEDY: Final = "greedy"  # the client with many connections
HOSTILE: Final = "hostile"  # all hostile clients together
FREE: Final = "lamina_stage_free_tokens"  # the gauge that is at its maximum, not 0, if nothing is held


class Began(Record, frozen=True):
    """The beginning of the disturbance."""

    seconds: float
    services: tuple[str, ...]  # names of the processes: the gateways, then the stages in order
    model: str
    honest: tuple[str, ...]  # clients, each with one question at a time
    greedy: int  # connections of the greedy client
    kill_seconds: float  # between two kills of stages
    gateway_kill_seconds: float
    hostile: tuple[str, ...] = ()  # planned kinds of clients


class Reference(Record, frozen=True):
    """The undisturbed answer to a question."""

    question: str
    text: str
    token_ids: tuple[int, ...]
    completion_tokens: int


class Answer(Record, frozen=True):
    """An answer to a client that asks honest questions."""

    client: str
    question: str
    api: str
    started: float
    text: str
    completion_tokens: int
    token_ids: tuple[int, ...] | None = None  # None: the OpenAI API returns no ids
    replays: int = 0
    broken: int = 0  # attempts of the same question that broke before


class Broken(Record, frozen=True):
    """An attempt ended without a complete answer; the client asks again with the same key for it."""

    client: str
    question: str
    api: str
    gateway: str  # the one that was asked; GATEWAY: any
    asked: float
    reason: str


class Refused(Record, frozen=True):
    """A client was told to come again: 429 or 503."""

    client: str
    api: str
    status: int
    retry_after: str | None  # the header, as it came


class Lost(Record, frozen=True):
    """A client got no complete answer, however often it asked."""

    client: str
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
    """From `t` to `until`. kill: SIGKILL, of a gateway until its replacement serves; hang: SIGSTOP; away: there is no store."""

    fault: Literal["kill", "hang", "away"]
    service: str
    until: float


class Health(Record, frozen=True):
    """`/healthz` of a process, asked at `t`; status 0: no answer."""

    service: str
    status: int
    seconds: float


class Resources(msgspec.Struct, frozen=True):
    """Resources of one process."""

    threads: int
    descriptors: int
    peak_bytes: int  # the most that was ever resident, mapped files included
    resident_bytes: int  # without mapped files
    kv_bytes: int = 0  # part of resident_bytes: keys and values, reserved at the start and resident from their first use

    @property
    def own_bytes(self) -> int:
        """Resident memory without keys and values."""
        return self.resident_bytes - self.kv_bytes


class Usage(Record, frozen=True):
    """What a process uses now."""

    service: str
    pid: int
    uses: Resources


class Ended(Record, frozen=True):
    """A process of the service has ended before `t`; the platform started another."""

    service: str
    cause: str


class Rest(Record, frozen=True):
    """A process without requests: before and after the disturbance."""

    moment: Literal["before", "after"]
    service: str
    gauges: dict[str, float]  # empty: it did not answer
    uses: Resources | None = None  # None: there is no process


_DECODER: Final[msgspec.json.Decoder[Record]] = msgspec.json.Decoder(
    Began | Reference | Answer | Broken | Refused | Lost | Attempt | Fault | Health | Usage | Ended | Rest
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
    services: Mapping[str, str]  # name in the records → its Service on the platform; as many names as the Service has pods
    model: str
    keys: Mapping[str, str]  # client → API key
    greedy: int  # connections of the greedy client
    seed: int = 1

    @property
    def honest(self) -> tuple[str, ...]:
        """The clients with one question at a time."""
        return tuple(client for client in self.keys if client not in (GREEDY, HOSTILE))


def is_gateway(service: str) -> bool:
    return service.startswith(GATEWAY)


def named_pods(status: Mapping[str, Any], services: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Name in the records → the pod in the platform's status document. A pod keeps its name when its process is replaced."""
    pods = {
        service["name"]: iter([pod for revision in service["revisions"] for pod in revision["pods"]])
        for service in status["services"]
    }
    found = {name: next(pods.get(service, iter(())), None) for name, service in services.items()}
    return {name: pod for name, pod in found.items() if pod is not None}
