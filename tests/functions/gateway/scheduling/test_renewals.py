"""Stages hear of a gateway while it holds something there, and only then; and what could not be released is released later."""

import time

import pytest

from eventing.wire.events import EventType
from functions.gateway.scheduling import leases
from tests.support.functions.gateway import counted, nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import Fault, Seen, counting_stages

LEASE = 1.0
"""Seconds."""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", LEASE / 8)


def test_a_step_that_takes_longer_than_a_lease_costs_nothing_at_the_other_stages() -> None:
    with counting_stages(lease_seconds=LEASE) as stages, scheduling(stages) as scheduler:
        held_up = False

        def hold_up(seen: Seen) -> None:
            nonlocal held_up
            if seen.type == EventType.FORWARD and seen.rows[0].position == 15 and not held_up:
                held_up = True
                time.sleep(2 * LEASE)

        stages[1].inspect = hold_up
        stream = submit(scheduler, [3] * 10, 12)
        assert tokens_of(stream) == counted([3] * 10, 12)
        assert held_up
        assert stream.timings().replays == 0
        nothing_left(stages)


def test_a_gateway_that_holds_nothing_says_nothing() -> None:
    with counting_stages(lease_seconds=LEASE) as stages, scheduling(stages) as scheduler:
        assert tokens_of(submit(scheduler, [3] * 10, 3)) == counted([3] * 10, 3)
        nothing_left(stages)
        wait_until(lambda: not scheduler.stats().micro_batches)
        before = [len(stage.seen) for stage in stages]
        time.sleep(LEASE)
        assert [len(stage.seen) for stage in stages] == before


def test_a_release_that_was_lost_is_made_again_while_others_run() -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        stages[0].seconds = 0.02
        lost = False

        def lose_one(seen: Seen) -> Fault | None:
            nonlocal lost
            first = seen.type == EventType.RELEASE and b'"rows":[{' in seen.body and not lost
            lost = lost or first
            return Fault.UNAVAILABLE if first else None

        stages[2].inspect = lose_one
        long = submit(scheduler, [1] * 5, 50)
        assert tokens_of(submit(scheduler, [2] * 5, 2)) == counted([2] * 5, 2)
        wait_until(lambda: lost and stages[2].engine.sequences == 1, "the release of the short one alone")
        assert long.finish_reason is None
        assert tokens_of(long) == counted([1] * 5, 50)
        nothing_left(stages)


def test_a_release_that_was_lost_where_nothing_is_any_more_is_made_as_soon_as_something_is_again() -> None:
    """Or it would be held for as long as this gateway is heard of there, and other gateways would have that much less room."""
    with counting_stages() as stages, scheduling(stages) as scheduler:
        lost = False

        def lose_one(seen: Seen) -> Fault | None:
            nonlocal lost
            first = seen.type == EventType.RELEASE and not lost
            lost = lost or first
            return Fault.UNAVAILABLE if first else None

        stages[2].inspect = lose_one
        assert tokens_of(submit(scheduler, [2] * 5, 2)) == counted([2] * 5, 2)
        wait_until(lambda: lost and not scheduler.stats().micro_batches, "an end that stage 2 has not heard of")
        time.sleep(LEASE / 4)
        stages[0].seconds = 0.02
        long = submit(scheduler, [1] * 5, 50)
        wait_until(lambda: long.token_ids, "its first token")
        wait_until(lambda: stages[2].engine.sequences == 1, "the release")
        assert long.finish_reason is None
        assert tokens_of(long) == counted([1] * 5, 50)
        nothing_left(stages)
