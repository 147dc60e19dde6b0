"""Memory at the stages: waited for in order, shown to autoscalers, reserved as answers grow, and freed everywhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.pipeline import local_spec
from eventing.problems import InvalidRequest
from eventing.wire.control import HOLD_SECONDS
from eventing.wire.events import EventType
from functions.gateway.scheduling.batching import IN_FLIGHT_PER_INSTANCE
from functions.gateway.stages.routes import Endpoint, Placement
from functions.stage.engine.sequences import MAX_MEMORY_WAITERS
from knative.local.autoscaler.revision_autoscaler import RevisionAutoscaler
from knative.local.autoscaler.revision_settings import revision_settings
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import stage_service
from tests.support.functions.gateway import (
    WAIT_SECONDS,
    check,
    counted,
    nothing_left,
    scheduling,
    submit,
    tokens_of,
    wait_until,
)
from tests.support.functions.stage_server import Fault, StageServer, counting_stage, counting_stages, hold, inspecting, running


def test_a_sequence_that_can_never_fit_is_refused_and_delays_no_other() -> None:
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages) as scheduler:
        impossible = submit(scheduler, [1] * 60, 41)
        possible = submit(scheduler, [1] * 60, 40)
        with pytest.raises(InvalidRequest, match="101 tokens are more than a stage can ever hold"):
            tokens_of(impossible)
        assert tokens_of(possible) == counted([1] * 60, 40)
        nothing_left(stages)


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [1, 3])
def test_two_gateways_finish_on_memory_for_one_and_a_half_sequences(num_stages: int) -> None:
    with counting_stages(num_stages, capacity_tokens=90) as stages, scheduling(stages) as one, scheduling(stages) as other:
        prompts = [[number] * 40 for number in range(4)]
        for streams in [[submit(gateway, prompt, 20) for prompt in prompts] for gateway in (one, other)]:
            check(streams, prompts, 20)
        nothing_left(stages)


@pytest.mark.slow
def test_a_sequence_in_the_memory_backlog_blocks_smaller_ones_of_its_client_only_in_the_end() -> None:
    """Behind an ingress without keys all requests are one client's: they overtake it too, and it does not starve."""
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages, micro_batch_sequences=16) as scheduler:
        go_on = hold(stages[0], range(20, 50))
        holder = submit(scheduler, [1] * 5, 45)
        wait_until(lambda: holder.token_ids, "its first token")
        large = [submit(scheduler, [2] * 70, 10) for _ in range(2)]
        wait_until(lambda: scheduler.stats().memory_backlog, "a sequence in the memory backlog")
        small = [submit(scheduler, [3] * 11, 1) for _ in range(60)]  # no decode steps: they would join the holder's, which wait
        assert tokens_of(small[0]) == counted([3] * 11, 1)
        assert holder.finish_reason is None, "all of that while it runs"
        go_on.set()
        assert [tokens_of(stream) for stream in large] == [counted([2] * 70, 10)] * 2
        check([holder], [[1] * 5], 45)
        check(small[1:], [[3] * 11] * 59, 1)
        assert stages[0].prompts_begun[-1] == 3, "the rest waits for the large ones"
        nothing_left(stages)


@pytest.mark.slow
def test_a_client_that_wants_most_of_the_memory_does_not_hold_up_others() -> None:
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages, micro_batch_sequences=16) as scheduler:
        go_on = hold(stages[0], range(20, 60))
        holder = submit(scheduler, [1] * 5, 55, client_id="holder")
        wait_until(lambda: holder.token_ids, "its first token")
        greedy = [submit(scheduler, [2] * 70, 10, client_id="greedy") for _ in range(4)]
        wait_until(lambda: scheduler.stats().memory_backlog, "a sequence in the memory backlog")
        for number in range(5):
            assert tokens_of(submit(scheduler, [number], 2, client_id="modest")) == counted([number], 2)
        assert holder.finish_reason is None, "all of that while it runs"
        assert not any(stream.token_ids for stream in greedy)
        go_on.set()
        for stream in (holder, *greedy):
            tokens_of(stream)
        nothing_left(stages)


@pytest.mark.slow
def test_a_sequence_in_the_memory_backlog_is_overtaken_only_so_far() -> None:
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages, micro_batch_sequences=16) as scheduler:
        go_on = hold(stages[0], range(10, 20))
        holder = submit(scheduler, [1] * 5, 20, client_id="holder")
        wait_until(lambda: holder.token_ids, "its first token")
        large = submit(scheduler, [2] * 80, 10, client_id="large")
        wait_until(lambda: scheduler.stats().memory_backlog, "a sequence in the memory backlog")
        crowd = [submit(scheduler, [3] * 20, 10, client_id=f"client-{number}") for number in range(40)]
        go_on.set()
        for stream in (holder, large, *crowd):
            tokens_of(stream)
        begun = stages[0].prompts_begun
        assert begun[: begun.index(2)].count(3) * 30 <= 4 * 90, "the memory that went to others before it"
        nothing_left(stages)


@pytest.mark.slow
def test_cancelling_frees_memory_everywhere_at_once() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=8) as scheduler:
        stages[1].seconds = 0.05
        others = [submit(scheduler, [3], 8), submit(scheduler, [4] * 50, 4)]
        decoding, prefilling = submit(scheduler, [1], 1000), submit(scheduler, [2] * 400, 10)
        decoding.next_token(WAIT_SECONDS)
        prefilling.cancel()
        decoding.cancel()
        assert decoding.finish_reason == prefilling.finish_reason == "cancelled"
        assert prefilling.next_token(0.0) is None
        assert [tokens_of(other) for other in others] == [counted([3], 8), counted([4] * 50, 4)]
        nothing_left(stages)
        assert scheduler.stats().sequences["cancelled"] == 2


# The memory backlog is in flight at full stages, where autoscalers see it.


@contextmanager
def narrow_in_the_middle() -> Iterator[list[StageServer]]:
    """Three stages. The second has memory for one and a half sequences of 60 tokens, the others for any number."""
    with running(lambda index: counting_stage(index, 3, 90 if index == 1 else 100_000), 3) as stages:
        yield stages


def signals(stages: list[StageServer]) -> list[int]:
    """Per stage, the replies that it holds until it has memory."""
    return [stage.engine._memory_waiters.waiting for stage in stages]


@pytest.mark.slow
@pytest.mark.parametrize(("backlog", "held"), [(1, 1), (2, 2), (5, MAX_MEMORY_WAITERS)])
def test_the_memory_backlog_is_in_flight_at_full_stages_only(backlog: int, held: int) -> None:
    with narrow_in_the_middle() as stages, scheduling(stages) as scheduler:
        go_on = hold(stages[1], range(20, 60))
        streams = [submit(scheduler, [number] * 20, 40) for number in range(1 + backlog)]
        wait_until(lambda: signals(stages) == [0, held, 0])
        go_on.set()
        check(streams, [[number] * 20 for number in range(len(streams))], 40)
        wait_until(lambda: signals(stages) == [0, 0, 0])
        nothing_left(stages)


@pytest.mark.slow
def test_a_cancelled_sequence_leaves_no_signal() -> None:
    with narrow_in_the_middle() as stages, scheduling(stages) as scheduler:
        go_on = hold(stages[1], range(10, 85))
        holder, leaving = (submit(scheduler, [number] * 5, 80) for number in range(2))
        wait_until(lambda: signals(stages) == [0, 1, 0])
        leaving.cancel()
        wait_until(lambda: signals(stages) == [0, 0, 0])

        def releases() -> int:
            return sum(seen.type == EventType.RELEASE for seen in stages[1].seen)

        def asks_no_more() -> bool:
            asked = releases()
            time.sleep(0.3)
            return releases() <= asked + 1  # one may renew the lease

        wait_until(asks_no_more)
        assert stages[1].engine.sequences.by_id, "the stage is still full"
        assert signals(stages) == [0, 0, 0]
        go_on.set()
        tokens_of(holder)


@pytest.mark.slow
def test_several_gateways_share_the_few_signals() -> None:
    with narrow_in_the_middle() as stages, scheduling(stages) as one, scheduling(stages) as other:
        stages[1].seconds = 0.02
        streams = [submit(gateway, [number] * 20, 40) for number in range(4) for gateway in (one, other)]
        most = 0
        while any(stream.finish_reason is None for stream in streams):
            most = max(most, *signals(stages))
            time.sleep(0.002)
        assert most == MAX_MEMORY_WAITERS
        check(streams, [[index // 2] * 20 for index in range(len(streams))], 40)
        nothing_left(stages)


@pytest.mark.slow
def test_a_stage_that_replies_at_once_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older stage, which does not know the attribute."""
    with narrow_in_the_middle() as stages, scheduling(stages) as scheduler:
        stages[1].seconds = 0.02
        asked: list[float] = []
        monkeypatch.setattr(stages[1].engine, "await_memory", lambda *_, **__: asked.append(time.monotonic()))
        streams = [submit(scheduler, [number] * 20, 60) for number in range(3)]
        check(streams, [[number] * 20 for number in range(len(streams))], 60)
        seconds = asked[-1] - asked[0]
        assert len(asked) <= MAX_MEMORY_WAITERS * (1 + seconds / HOLD_SECONDS) + 2 * len(streams)


@pytest.mark.slow
def test_signals_that_fail_cost_no_answer() -> None:
    with narrow_in_the_middle() as stages, scheduling(stages) as scheduler:
        stages[1].seconds = 0.005
        stages[1].inspect = inspecting(
            lambda seen: seen.type == EventType.RELEASE and b'"rows":[]' in seen.body, Fault.UNAVAILABLE
        )
        streams = [submit(scheduler, [number] * 20, 40) for number in range(4)]
        for number, stream in enumerate(streams):
            assert tokens_of(stream) == counted([number] * 20, 40)
            assert stream.timings().replays == 0
        nothing_left(stages)


@pytest.mark.slow
def test_a_new_instance_is_used_for_its_memory_although_one_micro_batch_could_hold_all() -> None:
    with counting_stages(1, capacity_tokens=100) as (old,), counting_stages(1, capacity_tokens=100) as (new,):
        placement = Placement([old.url], watched=True)
        placement.update(0, [Endpoint(old.url)])
        go_on = [hold(stage, range(10, 50)) for stage in (old, new)]
        with scheduling([old], placement=placement, micro_batch_sequences=8) as scheduler:
            streams = [submit(scheduler, [number] * 5, 45) for number in range(4)]
            wait_until(lambda: scheduler.stats().memory_backlog == 2)
            scheduler.endpoints_changed(0, [Endpoint(old.url), Endpoint(new.url)])
            wait_until(lambda: all(stream.token_ids for stream in streams), "a token of each")
            assert (len(old.engine.sequences.by_id), len(new.engine.sequences.by_id)) == (2, 2), (
                "all of them run at the same time"
            )
            for each in go_on:
                each.set()
            check(streams, [[number] * 5 for number in range(len(streams))], 45)


def test_chunks_wait_while_hidden_states_of_prompts_take_the_gateways_memory() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=32, prompt_bytes=1) as scheduler:
        assert tokens_of(submit(scheduler, [1] * 8, 2)) == counted([1] * 8, 2), "its hidden states tell how large others are"
        arrived, go_on = threading.Event(), threading.Event()

        def stay() -> None:
            arrived.set()
            go_on.wait(WAIT_SECONDS)

        stages[1].inspect = inspecting(lambda seen: any(row.position == 0 for row in seen.rows), stay)
        prompts = [[number] * 32 for number in range(6)]
        streams = [submit(scheduler, prompts[0], 2)]
        assert arrived.wait(WAIT_SECONDS)
        for prompt in prompts[1:]:  # the first stage is free, and the scheduler decides for each
            streams.append(submit(scheduler, prompt, 2))
            wait_until(lambda: scheduler.stats().running == len(streams), "it has memory")
        assert scheduler.stats().trips == 1
        go_on.set()
        check(streams, prompts, 2)
        nothing_left(stages)


# Prompts that would wait too long are in flight, too, at all stages that lack instances.


@pytest.mark.slow
def test_prompts_that_wait_are_in_flight_at_all_slow_stages_at_once() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=32, prompt_seconds=10.0) as scheduler:
        stages[0].seconds = stages[2].seconds = 0.2  # 40 s for all prompts; a pass of the other stage may take 50 ms
        streams = [submit(scheduler, [1] * 320, 2) for _ in range(20)]
        wait_until(lambda: signals(stages) == [MAX_MEMORY_WAITERS, 0, MAX_MEMORY_WAITERS])
        for stream in streams:
            stream.cancel()
        wait_until(lambda: signals(stages) == [0, 0, 0])


@pytest.mark.parametrize(("lacking", "wanted"), [(0, 1), (1, 2), (3, 4)])
def test_signals_make_the_autoscaler_want_the_instances_that_lack(lacking: int, wanted: int) -> None:
    """With a pod that is busy with passes, so that Knative wants no other, and the default settings."""
    pipeline = ResolvedPipeline(local_spec("chat", model={"name": "tiny"}, cut="0:1"), ((0, 1),), "0" * 64)
    settings = revision_settings(stage_service(pipeline, 0)["spec"]["template"])
    autoscaler = RevisionAutoscaler(settings, ready=1, now=0.0)
    for second in range(60):
        autoscaler.record(second, 1.0 + IN_FLIGHT_PER_INSTANCE * lacking * (second >= 40), 0.0)
        if second % 2:
            autoscaler.decide(second + 0.5, 1)
        if second == 39:
            assert autoscaler.desired_scale == 1
    assert wanted <= autoscaler.desired_scale <= wanted + 1


# Memory for open-ended answers is reserved as they grow.


@pytest.fixture
def eight_tokens_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("functions.gateway.scheduling.sequence.FIRST_RESERVED_TOKENS", 8)


@pytest.mark.usefixtures("eight_tokens_first")
def test_an_answer_that_fills_its_memory_goes_on_with_more() -> None:
    with counting_stages(capacity_tokens=200) as stages, scheduling(stages) as scheduler:
        stream = submit(scheduler, [1, 2, 3], 60, open_ended=True)
        assert tokens_of(stream) == counted([1, 2, 3], 60)
        assert stream.finish_reason == "length"
        assert scheduler.stats().grown == 3, "8, 16, 32 and 60 tokens"
        assert not scheduler.stats().replays
        nothing_left(stages)


@pytest.mark.slow
@pytest.mark.usefixtures("eight_tokens_first")
def test_many_answers_that_could_fill_the_memory_alone_run_beside_each_other() -> None:
    with counting_stages(capacity_tokens=100) as stages, scheduling(stages) as scheduler:
        prompts = [[number] for number in range(1, 9)]
        streams = [submit(scheduler, prompt, 90, open_ended=True) for prompt in prompts]
        assert submit(scheduler, [5], 4).next_token(WAIT_SECONDS) == 5
        check(streams, prompts, 90)
        nothing_left(stages)


@pytest.mark.usefixtures("eight_tokens_first")
@pytest.mark.parametrize("capacity", [12, 20, 31, 64, 65, 67])
def test_an_open_ended_answer_ends_when_a_stage_can_hold_no_more(capacity: int) -> None:
    with counting_stages(capacity_tokens=capacity) as stages, scheduling(stages) as scheduler:
        stream = submit(scheduler, [1, 2, 3, 4], 400, open_ended=True)
        assert tokens_of(stream) == counted([1, 2, 3, 4], capacity - 4)
        assert stream.finish_reason == "length"
        nothing_left(stages)


def test_an_open_ended_prompt_that_can_never_fit_is_refused() -> None:
    with counting_stages(capacity_tokens=50) as stages, scheduling(stages) as scheduler:
        with pytest.raises(InvalidRequest, match="more than a stage can ever hold"):
            tokens_of(submit(scheduler, [1] * 60, 400, open_ended=True))
        nothing_left(stages)
