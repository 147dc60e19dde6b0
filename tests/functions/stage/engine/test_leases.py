"""What a gateway that is gone held is freed; what one holds that only has nothing to say stays."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from eventing.wire.control import LEASE_SECONDS, RENEWAL_SECONDS, ReserveRow
from eventing.wire.events import Row, Status
from functions.stage.engine.engine import Engine
from functions.stage.engine.sequences import GatewayLeases
from tests.support.functions.counting_group import CountingGroup
from tests.support.functions.stage_pipeline import batch, engines, reserved

LEASE = 0.4
"""Seconds."""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.005)


@contextmanager
def renewing(engine: Engine, source: str) -> Iterator[None]:
    """While inside, `source` says that it lives, as a gateway does: in a release without rows."""
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


def test_what_a_gateway_held_that_is_gone_is_freed_and_what_others_hold_stays() -> None:
    with engines([CountingGroup(capacity_tokens=100)], lease_seconds=LEASE) as (engine,):
        assert reserved(engine, [ReserveRow("a", 0, 60)], source="killed") == [Status.OK]
        assert reserved(engine, [ReserveRow("b", 0, 30)], source="idle") == [Status.OK]
        with renewing(engine, "idle"):
            wait_for(lambda: engine.free_tokens == 70)
            assert reserved(engine, [ReserveRow("c", 0, 70)], source="idle") == [Status.OK]
            engine.release([], source="third")
            wait_for(lambda: "third" not in engine._leases._renewed)
            assert engine.free_tokens == 0
        wait_for(lambda: engine.free_tokens == 100)


def test_a_pass_that_takes_longer_than_a_lease_is_nobodys_silence() -> None:
    group = CountingGroup(capacity_tokens=100)
    with engines([group], lease_seconds=LEASE) as (engine,):
        assert reserved(engine, [ReserveRow("a", 0, 60)], source="gateway") == [Status.OK]
        group.gate.clear()
        event = batch([Row("b", 0, 0, 1, reserve_tokens=2)], [1])
        pass_ = threading.Thread(target=lambda: engine.handle(event, source="other"))
        pass_.start()
        assert group.began.wait(30)
        ends = time.monotonic() + 3 * LEASE
        wait_for(lambda: time.monotonic() > ends)
        group.gate.set()
        pass_.join()
        with renewing(engine, "gateway"):
            wait_for(lambda: engine.free_tokens == 40)
            assert engine.sequences == 1


def test_who_is_heard_of_just_as_it_was_taken_for_gone_is_seen_to_be_gone_later() -> None:
    leases = GatewayLeases()
    leases.renew("a")
    for _ in range(GatewayLeases.CHECKS):
        assert not leases.expired(["a"])
    assert leases.expired(["a"]) == {"a"}
    for _ in range(GatewayLeases.CHECKS):
        assert not leases.expired(["a"]), "what it reserves from now on"
    assert leases.expired(["a"]) == {"a"}
    leases.renew("b")
    for _ in range(GatewayLeases.CHECKS + 1):
        leases.expired([])
    assert not leases._renewed, "gateways come and go"


def test_gateways_renew_often_enough_for_some_renewals_to_be_lost() -> None:
    assert 3 * RENEWAL_SECONDS < LEASE_SECONDS
