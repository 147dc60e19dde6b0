"""The document that `GET /v1/pipeline/events` sends: the pipeline's state, in which everything that comes and goes has a key.

A null field may also be missing. Numbers are those of this gateway and of its last seconds. docs/openai.md says how the stream
is read.
"""

from msgspec import Struct

from functions.gateway.scheduling.pipeline_status import InstanceState


class ReplicaState(Struct, frozen=True, kw_only=True):
    """One instance of a stage: a pod."""

    state: InstanceState
    revision: str
    concurrency: float  # forward events in flight there, on average
    routes: int  # micro-batches whose route it is on
    free_tokens: int | None = None  # free memory for keys and values, by its last reply


class ColdStartState(Struct, frozen=True, kw_only=True):
    """A start from zero replicas."""

    seconds: float  # from the warm-up event to its reply, or until now
    over: bool
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
    waiting: int
    limit: int
    running: int
    micro_batches: int


class RunningAnswer(Struct, frozen=True, kw_only=True):
    """An answer of the client that reads the stream."""

    route: tuple[int, ...]  # number of the replica at each stage; empty while the answer waits
    prompt_tokens: int
    tokens: int  # drawn so far
    replays: int


class PipelineState(Struct, frozen=True, kw_only=True):
    """Data of the event `snapshot`. The data of a `change` is a JSON merge patch (RFC 7396) of it."""

    model: str
    pipeline: str  # its fingerprint
    ready: bool  # this gateway has loaded its tokenizer
    stages: dict[str, StageState]  # by number, from 0 on
    queue: QueueState
    tokens_per_second: float
    answers: dict[str, RunningAnswer]  # by the id of the response; at most 32, running ones first
