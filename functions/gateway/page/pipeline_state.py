"""The document that `GET /v1/pipeline/events` sends: the pipeline's state.

Things that come and go are members of objects and not elements of lists, so that a merge patch can name them. A null field may
also be missing. Rates and averages are those of this gateway over its last seconds. docs/openai.md says how clients read the
stream.
"""

from typing import Final

from msgspec import Struct

from functions.gateway.scheduling.pipeline_status import InstanceState

PIPELINE_EVENTS: Final = "/v1/pipeline/events"


class ReplicaState(Struct, frozen=True, kw_only=True):
    """One instance of a stage: a pod."""

    state: InstanceState
    revision: str
    concurrency: float  # forward events in flight there, on average
    routes: int  # micro-batches whose route it is on
    free_tokens: int | None = None  # free memory for keys and values, as its last reply said; None: unknown


class ColdStartState(Struct, frozen=True, kw_only=True):
    """A start of a stage from zero replicas."""

    seconds: float  # from the warm-up event to its reply, or until now
    over: bool  # it has ended, with or without success
    failed: str | None = None  # the cause in a word, such as timeout
    phases: dict[str, float]  # reported by the pod: phase → seconds from its process's start to the phase's end


class StageState(Struct, frozen=True, kw_only=True):
    """A layer group: one Knative Service."""

    service: str
    layers: tuple[int, int]  # first, and last + 1
    target: float | None = None  # concurrency at which a replica is added; None: not scaled by concurrency, or unknown
    asleep: bool  # no replica takes work now
    step_seconds: float | None = None  # average from an event to its reply; None: there was none
    replicas: dict[str, ReplicaState]  # by number, in the order in which the gateway learned of them
    start: ColdStartState | None = None  # the latest that this gateway saw


class QueueState(Struct, frozen=True, kw_only=True):
    waiting: int  # requests
    limit: int  # of requests that may wait
    running: int  # sequences
    micro_batches: int


class RunningAnswer(Struct, frozen=True, kw_only=True):
    """A running or waiting answer of the client that reads the stream. Answers of other clients are not shown."""

    route: tuple[int, ...]  # number of the replica at each stage; empty while the answer waits
    prompt_tokens: int
    tokens: int  # drawn so far
    replays: int


class AdapterState(Struct, frozen=True, kw_only=True):
    """An adapter (LoRA) of the model, as the store lists it."""

    running: int  # answers of all clients that are computed with it: the stages of their routes have it in memory


class PipelineState(Struct, frozen=True, kw_only=True):
    """Data of the event `snapshot`. The data of a `change` is a JSON merge patch (RFC 7396) of it."""

    model: str
    pipeline: str  # its fingerprint
    ready: bool  # this gateway has loaded its tokenizer
    stages: dict[str, StageState]  # by number, from 0 on
    queue: QueueState
    tokens_per_second: float
    answers: dict[str, RunningAnswer]  # by the id of the response; at most 32, running ones first
    adapters: dict[str, AdapterState] | None = None  # by name; None: none are served
    batches: bool  # `/v1/batches` is served here
