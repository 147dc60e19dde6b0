"""Memory at the stages: it is waited for in order, given back everywhere, and shared between gateways."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from eventing.problems import InvalidRequest
from functions.gateway.scheduling.scheduler import Scheduler
from tests.support.functions.gateway import counted, nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import StageServer, counting_stages


def test_what_can_never_fit_is_refused_and_holds_nobody_up() -> None:
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages) as scheduler:
        impossible = submit(scheduler, [1] * 60, 41)
        possible = submit(scheduler, [1] * 60, 40)
        with pytest.raises(InvalidRequest, match="101 tokens are more than a stage can ever hold"):
            tokens_of(impossible)
        assert tokens_of(possible) == counted([1] * 60, 40)
        nothing_left(stages)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_two_gateways_on_memory_for_one_and_a_half_sequences_both_finish(num_stages: int) -> None:
    with counting_stages(num_stages, capacity_tokens=90) as stages, _two_gateways(stages) as gateways:
        prompts = [[number] * 40 for number in range(4)]
        streams = [[submit(gateway, prompt, 20) for prompt in prompts] for gateway in gateways]
        for own in streams:
            for stream, prompt in zip(own, prompts, strict=True):
                assert tokens_of(stream) == counted(prompt, 20)
        nothing_left(stages)


def test_nobody_overtakes_a_large_sequence_that_waits_for_memory() -> None:
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages) as scheduler:
        stages[0].seconds = 0.005
        first = [submit(scheduler, [1] * 20, 10) for _ in range(2)]
        large = submit(scheduler, [2] * 70, 10)
        crowd = [submit(scheduler, [3] * 20, 10) for _ in range(10)]
        assert tokens_of(large) == counted([2] * 70, 10)
        assert sum(stream.finish_reason is None for stream in crowd) >= 7
        for stream in (*first, *crowd):
            tokens_of(stream)


def test_a_client_that_wants_most_of_the_memory_does_not_hold_up_others() -> None:
    """There is room for many small ones beside what runs; only what waits of the same client stays behind."""
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages, micro_batch_sequences=16) as scheduler:
        stages[0].seconds = 0.01
        holder = submit(scheduler, [1] * 5, 55, client_id="holder")
        wait_until(lambda: holder.token_ids, "its first token")
        greedy = [submit(scheduler, [2] * 70, 10, client_id="greedy") for _ in range(4)]
        wait_until(lambda: scheduler.stats().memory_backlog, "a sequence that waits for memory")
        for number in range(5):
            assert tokens_of(submit(scheduler, [number], 2, client_id="modest")) == counted([number], 2)
        assert holder.finish_reason is None, "all of that beside what still runs"
        assert not any(stream.token_ids for stream in greedy)
        for stream in (holder, *greedy):
            tokens_of(stream)
        nothing_left(stages)


def test_who_waits_for_memory_is_overtaken_so_far_and_no_further() -> None:
    """However many others there are, and though each of them would fit."""
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages, micro_batch_sequences=16) as scheduler:
        stages[0].seconds = 0.002
        holder = submit(scheduler, [1] * 5, 20, client_id="holder")
        wait_until(lambda: holder.token_ids, "its first token")
        large = submit(scheduler, [2] * 80, 10, client_id="large")
        wait_until(lambda: scheduler.stats().memory_backlog, "a sequence that waits for memory")
        crowd = [submit(scheduler, [3] * 20, 10, client_id=f"client-{number}") for number in range(40)]
        assert tokens_of(large) == counted([2] * 80, 10)
        served = sum(bool(stream.token_ids) for stream in crowd)
        assert served * 30 <= 4 * 90, "the memory that went to others before it"
        for stream in (holder, *crowd):
            tokens_of(stream)
        nothing_left(stages)


def test_cancelling_frees_memory_everywhere_at_once() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=8) as scheduler:
        stages[1].seconds = 0.05
        others = [submit(scheduler, [3], 8), submit(scheduler, [4] * 50, 4)]
        running, prefilling = submit(scheduler, [1], 1000), submit(scheduler, [2] * 400, 10)
        running.next_token(10)
        prefilling.cancel()
        running.cancel()
        assert running.finish_reason == prefilling.finish_reason == "cancelled"
        assert prefilling.next_token(1) is None
        assert [tokens_of(other) for other in others] == [counted([3], 8), counted([4] * 50, 4)]
        nothing_left(stages)
        assert scheduler.stats().sequences["cancelled"] == 2


@contextmanager
def _two_gateways(stages: list[StageServer]) -> Iterator[tuple[Scheduler, Scheduler]]:
    with scheduling(stages) as one, scheduling(stages) as other:
        yield one, other
