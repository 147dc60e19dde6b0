"""Who waits for room at a stage is held there, and let go when there is some, when it is time, or when the stage leaves."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from eventing.wire.control import HOLD_SECONDS, ReleaseRow, ReserveRow
from eventing.wire.events import Status
from functions.stage.engine.engine import Engine
from functions.stage.engine.sequences import MAX_MEMORY_WAITERS
from tests.support.functions.counting_group import CountingGroup
from tests.support.functions.stage_pipeline import engines, reserved

CAPACITY = 100
LONG_BEFORE = HOLD_SECONDS / 2
"""What ends sooner was not ended by the clock."""


@pytest.fixture
def full() -> Iterator[Engine]:
    """One that has no room left."""
    with engines([CountingGroup(capacity_tokens=CAPACITY)]) as (engine,):
        assert reserved(engine, [ReserveRow("a", 0, 60), ReserveRow("b", 0, 40)]) == [Status.OK, Status.OK]
        yield engine


@contextmanager
def waiting(engine: Engine, tokens: int, ends: Callable[[float], bool]) -> Iterator[threading.Thread]:
    """Somebody who waits for `tokens` at its beginning, and is held for seconds that `ends` says at its end."""
    took: list[float] = []

    def wait() -> None:
        began = time.monotonic()
        engine.await_memory(tokens, source="gateway")
        took.append(time.monotonic() - began)

    before = engine._memory_waiters.waiting
    thread = threading.Thread(target=wait)
    thread.start()
    deadline = time.monotonic() + 30
    while engine._memory_waiters.waiting == before and thread.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    yield thread
    thread.join(30)
    assert len(took) == 1
    assert ends(took[0]), took


def test_what_there_is_room_for_does_not_wait(full: Engine) -> None:
    full.release([ReleaseRow("b", 0)], source="gateway")
    with waiting(full, 40, lambda seconds: seconds < LONG_BEFORE):
        pass


def test_it_ends_as_soon_as_enough_was_given_back(full: Engine) -> None:
    with waiting(full, 60, lambda seconds: seconds < LONG_BEFORE) as thread:
        full.release([ReleaseRow("b", 0)], source="gateway")
        thread.join(0.1)
        assert thread.is_alive(), "40 tokens are not 60"
        full.release([ReleaseRow("a", 0)], source="gateway")


def test_it_ends_when_a_gateway_that_is_gone_gives_nothing_back() -> None:
    with engines([CountingGroup(capacity_tokens=CAPACITY)], lease_seconds=0.2) as (engine,):
        assert reserved(engine, [ReserveRow("a", 0, CAPACITY)], source="killed") == [Status.OK]
        with waiting(engine, CAPACITY, lambda seconds: seconds < LONG_BEFORE):
            pass


def test_it_ends_when_its_time_is_over(full: Engine) -> None:
    with waiting(full, 1, lambda seconds: seconds >= HOLD_SECONDS):
        pass


def test_it_is_answered_well_before_it_expires(full: Engine) -> None:
    began = time.monotonic()
    full.await_memory(1, source="gateway", expires_at=time.time() + 0.6)
    assert 0.2 < time.monotonic() - began < 0.6


def test_a_stage_that_is_told_to_stop_lets_go_and_holds_nobody_any_more(full: Engine) -> None:
    with waiting(full, 1, lambda seconds: seconds < LONG_BEFORE):
        full.drain()
    with waiting(full, 1, lambda seconds: seconds < LONG_BEFORE):
        pass
    assert reserved(full, [ReserveRow("c", 0, 1)]) == [Status.FULL], "it serves on until it is stopped"


def test_a_few_wait_and_no_more(full: Engine) -> None:
    """Each takes a place of containerConcurrency."""
    assert MAX_MEMORY_WAITERS == 2
    with (
        waiting(full, 1, lambda seconds: seconds >= HOLD_SECONDS),
        waiting(full, 1, lambda seconds: seconds >= HOLD_SECONDS),
        waiting(full, 1, lambda seconds: seconds < LONG_BEFORE),
    ):
        pass


def test_none_waits_where_none_may() -> None:
    with engines([CountingGroup(capacity_tokens=1)], max_memory_waiters=0) as (engine,):
        assert reserved(engine, [ReserveRow("a", 0, 1)]) == [Status.OK]
        with waiting(engine, 1, lambda seconds: seconds < LONG_BEFORE):
            pass


def test_what_waits_holds_up_nothing_else(full: Engine) -> None:
    with waiting(full, 60, lambda seconds: seconds < LONG_BEFORE):
        full.release([ReleaseRow("b", 0)], source="gateway")
        assert reserved(full, [ReserveRow("c", 0, 30)], source="another") == [Status.OK]
        assert full.free_tokens == 10
        full.release([ReleaseRow("a", 0)], source="gateway")
        assert full.free_tokens == 70, "whoever waits has nothing reserved"
