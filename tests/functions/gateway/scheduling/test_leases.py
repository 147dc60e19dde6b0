"""Leases at stages are renewed while the gateway holds something there, and releases that failed are repeated."""

import time

import pytest

from eventing.wire.events import EventType
from functions.gateway.scheduling import leases
from tests.support.functions.gateway import counted, nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import Fault, Seen, counting_stages, hold, inspecting, on_forward_from

LEASE = 2.0  # seconds


@pytest.fixture(autouse=True)
def _short_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", LEASE / 8)


@pytest.mark.slow
def test_a_step_that_takes_longer_than_a_lease_costs_nothing_at_the_other_stages() -> None:
    with counting_stages(lease_seconds=LEASE) as stages, scheduling(stages) as scheduler:
        stages[1].inspect = on_forward_from(15, lambda: time.sleep(1.5 * LEASE))
        began = time.monotonic()
        stream = submit(scheduler, [3] * 10, 12)
        assert tokens_of(stream) == counted([3] * 10, 12)
        assert time.monotonic() - began > 1.5 * LEASE
        assert stream.timings().replays == 0
        nothing_left(stages)


@pytest.mark.slow
def test_a_gateway_that_holds_nothing_sends_nothing() -> None:
    with counting_stages(lease_seconds=LEASE) as stages, scheduling(stages) as scheduler:
        assert tokens_of(submit(scheduler, [3] * 10, 3)) == counted([3] * 10, 3)
        nothing_left(stages)
        wait_until(lambda: not scheduler.stats().micro_batches)
        before = [len(stage.seen) for stage in stages]
        time.sleep(LEASE / 2)
        assert [len(stage.seen) for stage in stages] == before


@pytest.mark.slow
@pytest.mark.parametrize("others_run", [True, False])
def test_a_release_that_failed_is_repeated_once_the_gateway_uses_the_instance(others_run: bool) -> None:
    """Otherwise the memory would stay taken for as long as the stage hears of this gateway."""

    def is_release(seen: Seen) -> bool:
        return seen.type == EventType.RELEASE and b'"rows":[{' in seen.body

    with counting_stages() as stages, scheduling(stages) as scheduler:
        go_on = hold(stages[0], range(30, 60))
        stages[2].inspect = inspecting(is_release, Fault.UNAVAILABLE, times=1)
        if others_run:
            long = submit(scheduler, [1] * 5, 50)
        assert tokens_of(submit(scheduler, [2] * 5, 2)) == counted([2] * 5, 2)
        wait_until(lambda: any(map(is_release, stages[2].seen)), "the release that fails")
        if not others_run:
            wait_until(lambda: not scheduler.stats().micro_batches)
            time.sleep(LEASE / 8)
            assert len(stages[2].engine.sequences.by_id) == 1
            long = submit(scheduler, [1] * 5, 50)
        wait_until(lambda: long.token_ids, "its first token")
        wait_until(lambda: len(stages[2].engine.sequences.by_id) == 1, "the repeated release")
        go_on.set()
        assert tokens_of(long) == counted([1] * 5, 50)
        nothing_left(stages)
