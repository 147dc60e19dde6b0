"""Failures of stages and events lose and repeat no token, and cost attempts of a bounded retry budget."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from eventing.problems import InvalidRequest, PipelineUnavailable, ReplaysExhausted
from eventing.wire.events import Batch, Status
from functions.gateway.scheduling import sequence
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.sequence import Chunk, RetryBudget
from functions.gateway.stages.routes import Placement
from functions.stage.engine.event_queue import ForwardEvent
from tests.support.functions.gateway import check, counted, nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import Fault, Seen, counting_stages, inspecting, on_forward_from, on_forwards

PROMPTS = [[(5 * sequence + token) % 90 for token in range(2 + 6 * sequence)] for sequence in range(8)]
POISON = 96


def run(scheduler: Scheduler, max_tokens: int = 12) -> int:
    """Eight answers, every token checked; how often sequences were replayed."""
    streams = [submit(scheduler, prompt, max_tokens) for prompt in PROMPTS]
    check(streams, PROMPTS, max_tokens)
    return sum(stream.timings().replays for stream in streams)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    "fault",
    [Fault.REFUSED, Fault.REPLY_LOST, Fault.UNAVAILABLE, Fault.TWICE, Fault.KILLED_RESTARTED],
    ids=lambda fault: fault.name,
)
def test_no_token_is_lost_or_repeated(fault: Fault, stage: int) -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        stages[stage].inspect = on_forwards(fault, 3, 17)
        replays = run(scheduler)
        assert (replays > 0) == (fault is not Fault.TWICE)
        nothing_left(stages)


def test_a_replay_counts_if_another_chunk_is_in_flight_when_the_route_breaks() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        stages[2].inspect = on_forwards(Fault.REPLY_LOST, 1)
        # The next chunk returns after the failure.
        stages[1].inspect = on_forward_from(16, lambda: wait_until(lambda: scheduler._state.last_failure))
        prompt = list(range(40))
        stream = submit(scheduler, prompt, 4)
        assert tokens_of(stream) == counted(prompt, 4)
        assert stream.timings().replays == scheduler.stats().replays["broken"] == 1


@pytest.mark.slow
def test_a_stage_that_comes_back_later() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:

        def come_back() -> None:
            wait_until(lambda: stages[1].is_down)
            time.sleep(0.7)
            stages[1].start()

        stages[1].inspect = on_forwards(Fault.KILLED, 10)
        back = threading.Thread(target=come_back)
        back.start()
        run(scheduler)
        assert scheduler.stats().wake_ups >= 2
        back.join()


@pytest.mark.slow
def test_a_stage_that_never_comes_back() -> None:
    with counting_stages() as stages, scheduling(stages, cold_start_timeout_seconds=3.0) as scheduler:
        stages[1].inspect = on_forwards(Fault.KILLED, 5)
        streams = [submit(scheduler, [1], 1000) for _ in range(4)]
        for stream in streams:
            with pytest.raises(PipelineUnavailable, match=r"no route for 3 .*: 1; the last failure: .* no connection"):
                tokens_of(stream)
        wait_until(lambda: not (stages[0].engine.sequences.by_id or stages[2].engine.sequences.by_id))


def test_a_restart_between_steps_costs_a_recomputation_up_to_that_stage() -> None:
    """The rows miss. No attempt fails, and later stages keep what they hold."""
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:

        def restart() -> None:
            stages[1].kill()
            stages[1].start()

        stages[0].inspect = on_forward_from(50, restart)
        stream = submit(scheduler, [3] * 40, 30)
        assert tokens_of(stream) == counted([3] * 40, 30)
        rows = [[row for seen in stage.forwards for row in seen.rows] for stage in stages]
        assert {row.attempt for of_stage in rows for row in of_stage} == {0}
        assert [sum(row.position == 0 for row in of_stage) for of_stage in rows] == [2, 2, 1]
        assert stream.timings().replays == 1


def test_a_stage_that_drops_idle_sequences_costs_a_recomputation() -> None:
    with counting_stages(idle_seconds=600.0) as stages, scheduling(stages) as scheduler:

        def idle() -> None:
            stages[2].clock = lambda: time.time() + 601.0
            wait_until(lambda: not stages[2].engine.sequences.by_id)
            stages[2].clock = time.time

        stages[1].inspect = on_forward_from(15, idle)
        stream = submit(scheduler, [3] * 10, 12)
        assert tokens_of(stream) == counted([3] * 10, 12)
        assert stream.timings().replays == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_stage_that_hangs_and_answers_late(stage: int) -> None:
    """The step times out. The late event then finds a newer attempt and changes nothing."""
    with counting_stages() as stages, scheduling(stages, step_timeout_seconds=1.0) as scheduler:
        stages[stage].inspect = on_forwards(lambda: wait_until(lambda: scheduler.stats().replays["timeout"]), 6, 7)
        assert run(scheduler) > 0
        assert scheduler.stats().replays["timeout"] > 0


@pytest.mark.slow
def test_a_stopped_stage_costs_no_attempts() -> None:
    """While a stage answers nothing at all, only the first step of each sequence counts against it."""
    with counting_stages() as stages, scheduling(stages, step_timeout_seconds=1.0) as scheduler:
        stopped, resumed = threading.Event(), threading.Event()
        stages[1].inspect = inspecting(lambda seen: stopped.is_set() or 30 in {row.position for row in seen.rows}, resumed.wait)

        def stop() -> None:
            """For as long as four steps may take, from the first event that hangs."""
            wait_until(lambda: any(row.position == 30 for seen in stages[1].seen for row in seen.rows))
            stopped.set()
            wait_until(lambda: scheduler.stats().replays["timeout"])
            time.sleep(3.0)
            resumed.set()

        stopping = threading.Thread(target=stop)
        stopping.start()
        run(scheduler, max_tokens=60)
        stopping.join()
        assert not scheduler.stats().sequences["replays-exhausted"]


def is_poisonous(seen: Seen) -> bool:
    return POISON in seen.token_ids


@pytest.mark.slow
def test_a_sequence_that_kills_stages_ends_alone() -> None:
    """After its third kill it ends with an error, and all others have their answers."""
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        stages[1].inspect = inspecting(is_poisonous, Fault.KILLED_RESTARTED)
        prompts = [[token, 2, 3] for token in range(90) if POISON not in counted([token, 2, 3], 30)][:20]
        streams = [submit(scheduler, prompt, 30) for prompt in prompts[:10]]
        poison = submit(scheduler, [1, POISON, 2], 5)
        streams += [submit(scheduler, prompt, 30) for prompt in prompts[10:]]
        with pytest.raises(ReplaysExhausted, match="gave up after 3 attempts"):
            tokens_of(poison)
        check(streams, prompts, 30)
        deaths = list(filter(is_poisonous, stages[1].seen))
        assert len(deaths) == 3
        assert [len(seen.ids) for seen in deaths[1:]] == [1, 1], "it travelled alone"


@pytest.mark.slow
def test_a_sequence_whose_answer_kills_stages_ends_after_all_tokens_before() -> None:
    prompt = next([first, second] for first in range(90) for second in range(90) if counted([first, second], 6)[4] == POISON)
    with counting_stages() as stages, scheduling(stages) as scheduler:
        stages[2].inspect = inspecting(is_poisonous, Fault.KILLED_RESTARTED)
        stream = submit(scheduler, prompt, 20)
        with pytest.raises(ReplaysExhausted):
            tokens_of(stream)
        assert stream.token_ids == counted(prompt, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "problem", "message"),
    [(Status.STALE, ReplaysExhausted, "answered stale again"), (Status.INVALID, InvalidRequest, "as the test wants it")],
)
def test_a_stage_that_refuses_all_rows_ends_the_answer(status: Status, problem: type[Exception], message: str) -> None:
    def refused(batch: Batch, **more: Any) -> ForwardEvent:
        event = real(batch, **more)
        reply = event.result()
        reason = "as the test wants it"
        rows = tuple(msgspec.structs.replace(row, status=status, length=0, reason=reason) for row in reply.rows)
        answered = ForwardEvent(event.batch, event.source)
        answered.answer(msgspec.structs.replace(reply, rows=rows, token_ids=reply.token_ids[:0], hidden=None))
        return answered

    with counting_stages() as stages, scheduling(stages) as scheduler:
        real = stages[1].engine.compute
        stages[1].engine.compute = refused  # type: ignore[method-assign]
        with pytest.raises(problem, match=message):
            tokens_of(submit(scheduler, [1, 2, 3], 5))


def test_an_invalid_row_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with counting_stages() as stages, scheduling(stages) as scheduler:
        good = [submit(scheduler, [5, 0], 5)]
        bad = submit(scheduler, [5, 1_000_000], 5, request_id="bad-one")
        good += [submit(scheduler, [5, number], 5) for number in range(1, 4)]
        with pytest.raises(InvalidRequest, match="token id 1000000 is outside the vocabulary"):
            tokens_of(bad)
        for number, stream in enumerate(good):
            assert tokens_of(stream) == counted([5, number], 5)
        nothing_left(stages)
    (refused,) = (record for record in caplog.records if "is refused" in record.message)
    (told,) = (record for record in caplog.records if "refuses it" in record.message)
    assert refused.name.startswith("functions.stage")
    assert f"bad-one ({refused.message.split()[0]})" in told.message, "the gateway's line names the id in the stage's"


@pytest.mark.slow
def test_a_stage_with_other_layers_is_no_route() -> None:
    with counting_stages() as stages:
        swapped = Placement([stage.url for stage in reversed(stages)], watched=False)
        with scheduling(stages, placement=swapped) as scheduler:
            stream = submit(scheduler, [1], 5)
            with pytest.raises(PipelineUnavailable, match=r"wrong-layer: the event wants layer 0 and this stage runs 2 to 2"):
                tokens_of(stream)


# The retry budget.


def test_failures_at_one_place_exhaust_the_budget_sooner_than_accidents() -> None:
    accident, poison = RetryBudget(), RetryBudget()
    for stage, position in ((0, 0), (1, 0), (1, 64), (0, 64), (2, 64), (1, 0)):
        accident.failed_at(stage, Chunk(position, 64, 2))
        assert accident.failures_here == 1
    for position in (0, 32, 60):
        poison.failed_at(1, Chunk(position, 64, 2))
    assert poison.failures_here == 3
    assert poison.exhausted
    assert not accident.exhausted
    for stage in (0, 1, 0):
        accident.failed_at(stage, Chunk(0, 64, 2))
    assert accident.exhausted, "nothing is tried for ever"
    accident.reset()
    assert not accident.exhausted


def test_each_back_off_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "time", SimpleNamespace(monotonic=lambda: 0.0))
    suspect = RetryBudget()
    pauses = []
    for _ in range(3):
        suspect.failed_at(1, Chunk(0, 64, 2))
        pauses.append(suspect.retry_at)
    assert pauses == sorted(pauses)
    assert pauses[0] > 0
