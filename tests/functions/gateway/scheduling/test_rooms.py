"""Who waits for memory is in flight at the stages that lack it, few at each; and uses the instances that come for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from eventing.wire.control import ROOM_SECONDS
from eventing.wire.events import EventType
from functions.gateway.stages.instances import Endpoint
from functions.gateway.stages.routes import Placement
from functions.stage.engine.sequences import MAX_MEMORY_WAITERS
from tests.support.functions.gateway import counted, nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import Fault, Seen, StageServer, counting_stage, counting_stages, running


@contextmanager
def narrow_in_the_middle() -> Iterator[list[StageServer]]:
    """Three stages; the second has memory for one and a half sequences of 60 tokens, the others for any number."""
    with running(lambda index: counting_stage(index, 3, 90 if index == 1 else 100_000), 3) as stages:
        stages[1].seconds = 0.02
        yield stages


def waiting(stages: list[StageServer]) -> list[int]:
    return [stage.engine._memory_waiters.waiting for stage in stages]


@pytest.mark.parametrize(("hungry", "held"), [(1, 1), (2, 2), (5, MAX_MEMORY_WAITERS)])
def test_who_waits_for_memory_is_in_flight_where_it_is_lacking_and_nowhere_else(hungry: int, held: int) -> None:
    with narrow_in_the_middle() as stages, scheduling(stages) as scheduler:
        streams = [submit(scheduler, [number] * 20, 40) for number in range(1 + hungry)]
        wait_until(lambda: waiting(stages) == [0, held, 0])
        for number, stream in enumerate(streams):
            assert tokens_of(stream) == counted([number] * 20, 40)
        wait_until(lambda: waiting(stages) == [0, 0, 0])
        nothing_left(stages)


def test_of_a_client_that_leaves_nobody_waits_any_more() -> None:
    with narrow_in_the_middle() as stages, scheduling(stages) as scheduler:
        stages[1].seconds = 0.05
        holder, leaving = (submit(scheduler, [number] * 5, 80) for number in range(2))
        wait_until(lambda: waiting(stages) == [0, 1, 0])
        leaving.cancel()
        wait_until(lambda: waiting(stages) == [0, 0, 0])
        asked = sum(seen.type == EventType.RELEASE for seen in stages[1].seen)
        time.sleep(0.3)
        assert holder.finish_reason is None, "there is still no room"
        assert waiting(stages) == [0, 0, 0]
        assert sum(seen.type == EventType.RELEASE for seen in stages[1].seen) <= asked + 1, "but for what renews the lease"
        tokens_of(holder)


def test_several_gateways_share_the_few_places() -> None:
    with narrow_in_the_middle() as stages, scheduling(stages) as one, scheduling(stages) as other:
        streams = [submit(gateway, [number] * 20, 40) for number in range(4) for gateway in (one, other)]
        most = 0
        while any(stream.finish_reason is None for stream in streams):
            most = max(most, *waiting(stages))
            time.sleep(0.002)
        assert most == MAX_MEMORY_WAITERS
        for stream, number in zip(streams, (number for number in range(4) for _ in range(2)), strict=True):
            assert tokens_of(stream) == counted([number] * 20, 40)
        nothing_left(stages)


def test_a_stage_that_answers_at_once_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not know the attribute."""
    with narrow_in_the_middle() as stages, scheduling(stages) as scheduler:
        asked: list[float] = []
        monkeypatch.setattr(stages[1].engine, "await_memory", lambda *_, **__: asked.append(time.monotonic()))
        streams = [submit(scheduler, [number] * 20, 60) for number in range(3)]
        for number, stream in enumerate(streams):
            assert tokens_of(stream) == counted([number] * 20, 60)
        seconds = asked[-1] - asked[0]
        assert len(asked) <= MAX_MEMORY_WAITERS * (1 + seconds / ROOM_SECONDS) + 2 * len(streams)


def test_where_it_fails_only_the_waiting_is_over() -> None:
    def refuse(seen: Seen) -> Fault | None:
        return Fault.UNAVAILABLE if seen.type == EventType.RELEASE and b'"rows":[]' in seen.body else None

    with narrow_in_the_middle() as stages, scheduling(stages) as scheduler:
        stages[1].inspect = refuse
        streams = [submit(scheduler, [number] * 20, 40) for number in range(4)]
        for number, stream in enumerate(streams):
            assert tokens_of(stream) == counted([number] * 20, 40)
            assert stream.timings().replays == 0
        nothing_left(stages)


def test_another_instance_is_used_for_its_memory_although_one_micro_batch_would_hold_all() -> None:
    with counting_stages(1, capacity_tokens=100) as (old,), counting_stages(1, capacity_tokens=100) as (new,):
        placement = Placement([old.url], watched=True)
        placement.update(0, [Endpoint(old.url)])
        old.seconds = new.seconds = 0.01
        with scheduling([old], placement=placement, micro_batch_sequences=8) as scheduler:
            streams = [submit(scheduler, [number] * 5, 45) for number in range(4)]
            wait_until(lambda: scheduler.stats().memory_backlog == 2)
            scheduler.endpoints_changed(0, [Endpoint(old.url), Endpoint(new.url)])
            wait_until(lambda: all(stream.token_ids for stream in streams), "a token of each")
            assert not any(stream.finish_reason for stream in streams[:1]), "all of them run beside each other"
            assert (old.engine.sequences, new.engine.sequences) == (2, 2)
            for number, stream in enumerate(streams):
                assert tokens_of(stream) == counted([number] * 5, 45)
