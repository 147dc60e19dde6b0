"""Leases of gateways, whose sequences are freed when they expire, and requests that wait for memory."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from eventing.wire.control import LEASE_SECONDS, RENEWAL_SECONDS, ReleaseRow, ReserveRow
from eventing.wire.events import Row, Status
from functions.stage.engine import engine as engine_module
from functions.stage.engine.engine import Engine
from functions.stage.engine.sequences import MAX_MEMORY_WAITERS, GatewayLeases
from tests.support.functions.counting_group import CountingGroup
from tests.support.functions.stage_pipeline import batch, engines, reserved, wait_for

LEASE = 0.4  # seconds
CAPACITY = 100
HOLD = 0.5  # seconds
EARLY = 60.0  # what ends sooner was not ended by its time limit of twice as long


@contextmanager
def renewing(engine: Engine, source: str) -> Iterator[None]:
    """Renews the lease of `source` all the time, as a gateway does, by releases without rows."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(LEASE / 20):
            assert engine.release([], source=source) == 0

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_lost_gateways_sequences_are_freed_and_others_stay() -> None:
    with engines([CountingGroup(capacity_tokens=100)], lease_seconds=LEASE) as (engine,):
        assert reserved(engine, [ReserveRow("a", 0, 60)], source="killed") == [Status.OK]
        assert reserved(engine, [ReserveRow("b", 0, 30)], source="idle") == [Status.OK]
        with renewing(engine, "idle"):
            wait_for(lambda: engine.cache.free_tokens == 70)
            assert reserved(engine, [ReserveRow("c", 0, 70)], source="idle") == [Status.OK]
            engine.release([], source="third")
            wait_for(lambda: "third" not in engine._leases._renewed)
            assert engine.cache.free_tokens == 0
        wait_for(lambda: engine.cache.free_tokens == 100)


def test_a_pass_longer_than_a_lease_expires_no_lease() -> None:
    group = CountingGroup(capacity_tokens=100)
    with engines([group], lease_seconds=LEASE) as (engine,):
        assert reserved(engine, [ReserveRow("a", 0, 60)], source="gateway") == [Status.OK]
        group.gate.clear()
        event = batch([Row("b", 0, 0, 1, reserve_tokens=2)], [1])
        pass_ = threading.Thread(target=lambda: engine.handle(event, source="other"))
        pass_.start()
        assert group.began.wait(30)
        time.sleep(3 * LEASE)
        group.gate.set()
        pass_.join()
        with renewing(engine, "gateway"):
            wait_for(lambda: engine.cache.free_tokens == 40)
            assert len(engine.sequences.by_id) == 1


def test_a_lease_renewed_just_as_it_expired_expires_again_later() -> None:
    leases = GatewayLeases()
    leases.renew("a")
    for _ in range(2):
        for _ in range(GatewayLeases.CHECKS):
            assert not leases.expired(["a"])
        assert leases.expired(["a"]) == {"a"}
    leases.renew("b")
    for _ in range(GatewayLeases.CHECKS + 1):
        leases.expired([])
    assert not leases._renewed, "gateways come and go"


def test_gateways_renew_often_enough_for_some_renewals_to_be_lost() -> None:
    assert 3 * RENEWAL_SECONDS < LEASE_SECONDS


@pytest.fixture(autouse=True)
def _long_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HOLD_SECONDS", 2 * EARLY)


@pytest.fixture
def full() -> Iterator[Engine]:
    """An engine without free memory: "a" has 60 tokens, "b" 40."""
    with engines([CountingGroup(capacity_tokens=CAPACITY)]) as (engine,):
        assert reserved(engine, [ReserveRow("a", 0, 60), ReserveRow("b", 0, 40)]) == [Status.OK, Status.OK]
        yield engine


@contextmanager
def waiting(engine: Engine, tokens: int, takes: Callable[[float], bool]) -> Iterator[threading.Thread]:
    """A request waits for `tokens` while inside. At the end its waiting time in seconds satisfies `takes`."""
    took: list[float] = []

    def wait() -> None:
        began = time.monotonic()
        engine.await_memory(tokens, source="gateway")
        took.append(time.monotonic() - began)

    before = engine._memory_waiters.waiting
    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(lambda: engine._memory_waiters.waiting > before or not thread.is_alive())
    yield thread
    thread.join(3 * EARLY)
    assert len(took) == 1
    assert takes(took[0]), took


def early(seconds: float) -> bool:
    return seconds < EARLY


def whole(seconds: float) -> bool:
    return seconds >= HOLD


def test_a_request_that_fits_does_not_wait(full: Engine) -> None:
    full.release([ReleaseRow("b", 0)], source="gateway")
    with waiting(full, 40, early):
        pass


def test_waiting_ends_as_soon_as_enough_memory_is_released(full: Engine) -> None:
    with waiting(full, 60, early) as thread:
        full.release([ReleaseRow("b", 0)], source="gateway")
        thread.join(0.1)
        assert thread.is_alive(), "40 tokens are not 60"
        full.release([ReleaseRow("a", 0)], source="gateway")


def test_waiting_ends_when_a_lost_gateways_memory_is_freed() -> None:
    with engines([CountingGroup(capacity_tokens=CAPACITY)], lease_seconds=0.2) as (engine,):
        assert reserved(engine, [ReserveRow("a", 0, CAPACITY)], source="killed") == [Status.OK]
        with waiting(engine, CAPACITY, early):
            pass


def test_waiting_ends_when_its_time_is_over(full: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HOLD_SECONDS", HOLD)
    with waiting(full, 1, whole):
        pass


def test_waiting_ends_well_before_the_request_expires(full: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(full._memory_waiters, "wait", lambda _tokens, seconds: waited.append(seconds))
    full.await_memory(1, source="gateway", expires_at=time.time() + EARLY)
    assert 0 < waited[0] <= EARLY / 2


def test_draining_ends_all_waiting_now_and_later(full: Engine) -> None:
    with waiting(full, 1, early):
        full.drain()
    with waiting(full, 1, early):
        pass
    assert reserved(full, [ReserveRow("c", 0, 1)]) == [Status.FULL], "it serves until it is stopped"


def test_at_most_two_requests_wait(full: Engine) -> None:
    """Each takes a place of containerConcurrency."""
    assert MAX_MEMORY_WAITERS == 2
    with waiting(full, 1, whole), waiting(full, 1, whole), waiting(full, 1, early):
        pass


def test_nothing_waits_if_no_waiters_are_allowed() -> None:
    with engines([CountingGroup(capacity_tokens=1)], max_memory_waiters=0) as (engine,):
        assert reserved(engine, [ReserveRow("a", 0, 1)]) == [Status.OK]
        with waiting(engine, 1, early):
            pass


def test_waiting_requests_delay_nothing_else(full: Engine) -> None:
    with waiting(full, 60, early):
        full.release([ReleaseRow("b", 0)], source="gateway")
        assert reserved(full, [ReserveRow("c", 0, 30)], source="another") == [Status.OK]
        assert full.cache.free_tokens == 10
        full.release([ReleaseRow("a", 0)], source="gateway")
        assert full.cache.free_tokens == 70, "waiting reserves nothing"
