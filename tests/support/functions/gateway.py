"""A scheduler over stages of a test (`stage_server`), and what an API does with it."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Final

from eventing.http.delivery import Sender
from functions.gateway.scheduling.batching import SchedulerLimits
from functions.gateway.scheduling.prefix_sharing import PrefixSharing
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.sequence import Prompt
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.stages.client import PipelineIdentity, StageClient
from functions.gateway.stages.routes import Placement
from tests.support.functions.counting_group import VOCAB
from tests.support.functions.stage_server import FINGERPRINT, TOKEN, StageServer

WAIT_SECONDS: Final = 120.0  # deadline of everything that a test waits for


@contextmanager
def scheduling(
    stages: Sequence[StageServer],
    *,
    step_timeout_seconds: float = WAIT_SECONDS,
    placement: Placement | None = None,
    sharing: str = "pipeline",
    **limits: Any,
) -> Iterator[Scheduler]:
    """A scheduler over the stages by their URLs, or by `placement`."""
    source = f"/gateways/{id(stages)}-{time.monotonic_ns()}"
    identity = PipelineIdentity(FINGERPRINT, TOKEN, source, tuple(stage.first_layer for stage in stages))
    with closing(Sender()) as sender:
        client = StageClient(sender, identity, step_timeout_seconds)
        placement = placement or Placement([stage.url for stage in stages], watched=False)
        scheduler = Scheduler(client, placement, SchedulerLimits(**limits), PrefixSharing(FINGERPRINT, sharing))
        try:
            yield scheduler
        finally:
            scheduler.close()


def submit(scheduler: Scheduler, token_ids: Sequence[int], max_tokens: int, **settings: Any) -> TokenStream:
    return scheduler.submit(Prompt(token_ids, max_tokens, **({"deadline_seconds": WAIT_SECONDS} | settings)))


def tokens_of(stream: TokenStream) -> list[int]:
    """All tokens, taken as an API takes them. Raises the Problem that ended the answer."""
    deadline = time.monotonic() + WAIT_SECONDS
    tokens = []
    while not stream.finish_reason or len(tokens) < len(stream.token_ids):
        assert time.monotonic() < deadline, f"only {tokens} came"
        token = stream.next_token(1.0)
        if token is not None:
            tokens.append(token)
    return tokens


def counted(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The answer that the stages compute."""
    total, tokens = sum(prompt), []
    for _ in range(max_tokens):
        tokens.append(total % VOCAB)
        total += tokens[-1]
    return tokens


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about"
        time.sleep(0.002)


def check(streams: Iterable[TokenStream], prompts: Iterable[list[int]], max_tokens: int) -> None:
    """Checks every token of every answer."""
    for stream, prompt in zip(streams, prompts, strict=True):
        assert tokens_of(stream) == counted(prompt, max_tokens)


def answers_of(scheduler: Scheduler, prompts: list[list[int]], max_tokens: int) -> list[TokenStream]:
    """Submits all at once, and checks every token."""
    streams = [submit(scheduler, prompt, max_tokens) for prompt in prompts]
    check(streams, prompts, max_tokens)
    assert {stream.finish_reason for stream in streams} == {"length"}
    return streams


def nothing_left(stages: list[StageServer]) -> None:
    wait_until(lambda: not any(stage.engine.sequences.by_id for stage in stages), "the release of all sequences")
    wait_until(
        lambda: all(stage.engine.cache.free_tokens == stage.group.kv.capacity_tokens for stage in stages),
        "all memory to be free",
    )
