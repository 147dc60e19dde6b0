"""Conversations through two gateways, while stages break and micro-batches migrate: cached KV changes no token.

Each turn goes to one of the two gateways. The stages' memory is too small for all conversations.
"""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

import pytest

from eventing.wire.events import EventType, Sampling
from functions.gateway.scheduling import leases
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.stages.routes import Endpoint, Placement
from tests.support.functions import native_models
from tests.support.functions.gateway import nothing_left, scheduling, submit, tokens_of
from tests.support.functions.kv_stages import native_stage
from tests.support.functions.stage_server import Fault, Seen, StageServer, running
from tests.support.storage import tiny_models

TALKS: Final = 6
TURNS: Final = 3
NEW_TOKENS: Final = 16
MIDDLE: Final = 1
BUDGET: Final = 2**19  # bytes for a stage's KV
FAULTS: Final = 12
LEASE: Final = 4.0  # seconds; frees what the last lost release left
TROUBLES: Final = (Fault.KILLED_RESTARTED, Fault.REFUSED, Fault.REPLY_LOST, Fault.TWICE, Fault.UNAVAILABLE)
SAMPLINGS: Final = (
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=1.0, seed=5, repetition_penalty=1.3, presence_penalty=0.5),
)

Ask = Callable[[int, list[int]], list[int]]  # a conversation's number and its tokens so far → the answer


def talk(number: int, ask: Ask) -> list[list[int]]:
    """The answers of one conversation. All conversations share a prefix, some a longer one."""
    shared = random.Random(1).choices(range(3, tiny_models.VOCAB_SIZE), k=70)
    dice = random.Random(100 + number)
    said, answers = shared[: dice.choice([16, 66, 70])], []
    for _ in range(TURNS):
        said = said + dice.choices(range(3, tiny_models.VOCAB_SIZE), k=dice.choice([1, 5, 20]))
        answers.append(ask(number, said))
        said = said + answers[-1]
    return answers


@contextmanager
def two_gateways(stages: list[StageServer], middle: list[StageServer]) -> Iterator[list[Scheduler]]:
    """One of them drafts tokens. Until the end, one or both of the instances in `middle` are ready, at random."""
    over = threading.Event()
    places = [Placement([each.url for each in stages], watched=True) for _ in range(2)]
    limits = {"chunk_tokens": 32, "micro_batch_sequences": 3}

    def move(one: Scheduler, other: Scheduler) -> None:
        dice = random.Random(2)
        while not over.is_set():
            takes_work = dice.choice([(True, False), (False, True), (True, True)])
            endpoints = [
                Endpoint(at.url, ready=ready, terminating=not ready) for at, ready in zip(middle, takes_work, strict=True)
            ]
            for each in (one, other):
                each.endpoints_changed(MIDDLE, endpoints)
            over.wait(dice.uniform(0.02, 0.2))

    with (
        scheduling(stages, placement=places[0], draft_tokens=0, **limits) as one,
        scheduling(stages, placement=places[1], draft_tokens=6, **limits) as other,
    ):
        for each in (one, other):
            for index in (0, 2):
                each.endpoints_changed(index, [Endpoint(stages[index].url)])
        mover = threading.Thread(target=move, args=(one, other))
        mover.start()
        try:
            yield [one, other]
        finally:
            over.set()
            mover.join()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_kv_gives_the_tokens_that_computing_gives(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_models, "BUDGET", BUDGET)
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", LEASE / 8)
    dice, lock = random.Random(4), threading.Lock()
    happened: list[Fault] = []
    quiet = 20

    def trouble(seen: Seen) -> Fault | None:
        nonlocal quiet
        with lock:
            quiet -= seen.type in (EventType.FORWARD, EventType.RESERVE, EventType.RELEASE)
            if quiet >= 0 or len(happened) == FAULTS:
                return None
            quiet = dice.randrange(15, 50)
            happened.append(dice.choice(TROUBLES))
            return happened[-1]

    def answer(gateway: Scheduler, number: int, said: list[int]) -> tuple[list[int], int]:
        """The answer, and how many prompt tokens were cached."""
        stream = submit(gateway, said, NEW_TOKENS, sampling=SAMPLINGS[number % 3])
        return tokens_of(stream), stream.cached_tokens

    make = native_stage(dtype, with_peers=True, lease_seconds=LEASE)
    with running(make, 3) as stages, running(lambda _: make(MIDDLE), 1) as (spare,):
        with scheduling(stages, sharing="off", draft_tokens=0) as alone:
            expected = [talk(number, lambda number, said: answer(alone, number, said)[0]) for number in range(TALKS)]
        for each in (*stages, spare):
            each.inspect = trouble
        with two_gateways(stages, [stages[MIDDLE], spare]) as gateways, ThreadPoolExecutor(2 * TALKS) as threads:
            found: list[int] = []

            def ask(number: int, said: list[int]) -> list[int]:
                """Alternates between the gateways, so that one prefix begins at both at the same time."""
                tokens, cached = answer(gateways[(number + len(found)) % 2], number, said)
                found.append(cached)
                return tokens

            answers = list(threads.map(lambda number: talk(number % TALKS, ask), range(2 * TALKS)))
            assert answers == 2 * expected
            assert sum(found) > 0
            assert len(happened) == FAULTS
            nothing_left([*stages, spare])
