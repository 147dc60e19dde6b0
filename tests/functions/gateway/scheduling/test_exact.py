"""A tiny real model through gateway and stages, while stages are killed: greedy and sampled tokens are the whole model's."""

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from eventing.wire.events import EventType, Sampling
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.token_stream import TokenStream
from functions.stage.models.build import build_layer_group
from functions.stage.models.layer_group import LayerGroup
from tests.support.functions.gateway import scheduling, submit, tokens_of
from tests.support.functions.stage_pipeline import build_groups, engines, stage_tensors, whole_model
from tests.support.functions.stage_pipeline import generate as through_engines
from tests.support.functions.stage_server import Fault, Seen, StageServer, running
from tests.support.storage import tiny_models

CUT = ((0, 2), (2, 3), (3, 6))
MODEL = "llama"
NEW_TOKENS = 16
REQUESTS = 16
TROUBLES = [Fault.KILLED_RESTARTED, Fault.KILLED_RESTARTED, Fault.REFUSED, Fault.REPLY_LOST, Fault.TWICE, Fault.UNAVAILABLE]


def stage(index: int) -> StageServer:
    first, last = CUT[index]

    def build() -> LayerGroup:
        own = stage_tensors(MODEL, first, last)
        return build_layer_group("native", tiny_models.tiny_config(MODEL), own, first, last, "float32", "cpu", 2**22)

    return StageServer(index, CUT, build)


def requests(number: int) -> list[tuple[list[int], Sampling]]:
    """Prompts of 1 to 120 tokens; every other one is sampled at temperature 1."""
    dice = random.Random(11)
    prompts = [
        [dice.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(dice.choice([1, 2, 7, 40, 120]))] for _ in range(number)
    ]
    return [(prompt, Sampling(temperature=float(index % 2), seed=index)) for index, prompt in enumerate(prompts)]


def generate(
    scheduler: Scheduler, wanted: list[tuple[list[int], Sampling]], expected: list[list[int]] | None = None
) -> list[TokenStream]:
    """expected: the answers. Clients predict them with every fifth token wrong."""
    streams = []
    for index, (prompt, sampling) in enumerate(wanted):
        predicted = [token if place % 5 else 3 for place, token in enumerate(expected[index])] if expected else []
        streams.append(submit(scheduler, prompt, NEW_TOKENS, sampling=sampling, predicted_ids=predicted))
    return streams


@contextmanager
def gateways(stages: list[StageServer], *stages_at_once: int, draft_tokens: int = 0) -> Iterator[list[Scheduler]]:
    limits = {"chunk_tokens": 16, "micro_batch_sequences": 4, "draft_tokens": draft_tokens}
    with ExitStack() as stack:
        yield [stack.enter_context(scheduling(stages, stages_at_once=each, **limits)) for each in stages_at_once]


@pytest.fixture(scope="module")
def undisturbed() -> list[list[int]]:
    """Answers of one request at a time through the same engines; greedy ones are checked against transformers."""
    groups = build_groups(MODEL, CUT, "llama", kv_budget_bytes=2**22)
    with engines(groups) as stages:
        answers = [
            through_engines(stages, f"id-{index}", prompt, NEW_TOKENS, sampling=sampling)
            for index, (prompt, sampling) in enumerate(requests(REQUESTS))
        ]
    for (prompt, sampling), tokens in zip(requests(REQUESTS), answers, strict=True):
        if sampling.temperature == 0:
            assert tokens == tiny_models.greedy(whole_model(MODEL), prompt, NEW_TOKENS)
    return answers


@pytest.mark.sampled
@pytest.mark.parametrize("stages_at_once", [0, 1, 2])
@pytest.mark.parametrize("draft_tokens", [0, 6])
def test_batched_answers_equal_the_whole_models(undisturbed: list[list[int]], stages_at_once: int, draft_tokens: int) -> None:
    with running(stage, 3) as stages, gateways(stages, stages_at_once, draft_tokens=draft_tokens) as (scheduler,):
        streams = generate(scheduler, requests(REQUESTS), undisturbed)
        assert [tokens_of(stream) for stream in streams] == undisturbed
        assert bool(scheduler.stats().draft_tokens_accepted) == bool(draft_tokens)


@pytest.mark.parametrize("draft_tokens", [0, 6])
def test_answers_survive_all_faults_of_stages(undisturbed: list[list[int]], draft_tokens: int) -> None:
    """Two gateways. Fifteen times, after 15 to 30 events each, a random fault happens; some clients cancel.

    Faults are paced by events and not by time: on a slow machine one sequence would meet three without a step between them.
    """
    dice = random.Random(5)
    lock = threading.Lock()
    happened: list[Fault] = []
    quiet = 0

    def trouble(seen: Seen) -> Fault | None:
        nonlocal quiet
        with lock:
            if seen.type != EventType.FORWARD or len(happened) == 15:
                return None
            quiet -= 1
            if quiet >= 0:
                return None
            quiet = dice.randrange(15, 30)
            happened.append(dice.choice(TROUBLES))
            return happened[-1]

    with running(stage, 3) as stages, gateways(stages, 0, 1, draft_tokens=draft_tokens) as (one, other):
        for each in stages:
            each.inspect = trouble
        streams = [stream for each in (one, other) for stream in generate(each, requests(REQUESTS), undisturbed)]
        gone = generate(one, requests(6))
        for stream in gone:
            stream.cancel()
        assert [tokens_of(stream) for stream in streams] == undisturbed * 2
        assert len(set(happened)) >= 3
        again = generate(other, requests(REQUESTS), undisturbed)
        assert [tokens_of(stream) for stream in again] == undisturbed
        assert sum(stream.cached_tokens for stream in again) > 0, "the stages still have prefixes cached"
