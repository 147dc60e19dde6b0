"""What `GET /v1/pipeline/events` tells: the pipeline as one JSON document, in which everything that comes and goes has a name.

What is null may as well be left out. docs/openai.md says how it is read; numbers are this gateway's, of its last seconds.
"""

from msgspec import Struct

from functions.gateway.scheduling.outlook import InstanceState


class Replica(Struct, frozen=True, kw_only=True):
    """One instance of a stage: a pod."""

    state: InstanceState
    revision: str
    concurrency: float
    """Forward events in flight there, on average."""
    routes: int
    """Micro-batches whose route it is on."""
    free_tokens: int | None = None
    """Room for keys and values, as it said last."""


class Start(Struct, frozen=True, kw_only=True):
    """A start from zero."""

    seconds: float
    """From the warm-up event to its reply, or until now."""
    over: bool
    failed: str | None = None
    """In a word, such as timeout."""
    phases: dict[str, float]
    """The pod's own account: phase → seconds from the start of its process to its end."""


class Stage(Struct, frozen=True, kw_only=True):
    """A layer group: one Knative Service."""

    service: str
    layers: tuple[int, int]
    """First, and the one behind the last."""
    target: float | None = None
    """Concurrency of one replica at which another one is added; None where it is not scaled by that, or not known."""
    asleep: bool
    """None of its replicas takes work now."""
    step_seconds: float | None = None
    """From an event to its reply, on average; None where there was none."""
    replicas: dict[str, Replica]
    """By number, in the order in which the gateway learned of them."""
    start: Start | None = None
    """The last that this gateway saw, or the one under way."""


class Queue(Struct, frozen=True, kw_only=True):
    """Answers in hand."""

    waiting: int
    limit: int
    running: int
    micro_batches: int


class RunningAnswer(Struct, frozen=True, kw_only=True):
    """One of the answers of whoever watches."""

    route: tuple[int, ...]
    """Number of the replica at each stage; empty while it waits."""
    prompt_tokens: int
    tokens: int
    """Drawn so far."""
    replays: int


class PipelineState(Struct, frozen=True, kw_only=True):
    """Data of the event `snapshot`. That of a `change` is a JSON merge patch (RFC 7396) of it."""

    model: str
    pipeline: str
    """Its fingerprint."""
    ready: bool
    """This gateway has its tokenizer."""
    stages: dict[str, Stage]
    """By number, from 0 on."""
    queue: Queue
    tokens_per_second: float
    answers: dict[str, RunningAnswer]
    """By the id of the response; 32 at most, those that compute first."""
