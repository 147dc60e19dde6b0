"""What nobody expects happens inside the gateway: the answers in question end with an error, others go on, nothing leaks."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from eventing.problems import Problem
from eventing.wire.events import EventType
from functions.gateway.scheduling import apply, decide
from functions.gateway.scheduling import scheduler as scheduler_module
from functions.gateway.stages import client
from functions.gateway.stages.client import StageClient
from functions.gateway.stages.instances import Endpoint
from tests.support.functions.gateway import answers_of, nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import Seen, StageServer, counting_stages
from tests.support.functions.watched import watched


def fails_once(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch, after: int = 0, while_: Callable[[], bool] = lambda: True
) -> None:
    """The call behind the next `after` ones raises what nobody expects; counted are those `while_` holds."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def call(*given: Any, **named: Any) -> Any:
        nonlocal calls
        if while_():
            calls += 1
            if calls == after + 1:
                raise RuntimeError("as the test wants it")
        return real(*given, **named)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (StageClient, "reserve"),
        (StageClient, "forward"),
        (scheduler_module, "reservation_over"),
        (scheduler_module, "stage_replied"),
        (apply, "_chunk_over"),
        (decide, "begin_decode_steps"),
        (decide, "_begin"),
        (decide, "admit"),
        (decide, "migrate"),
    ],
)
def test_it_ends_what_it_was_about_and_everybody_else_goes_on(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with counting_stages() as stages, scheduling(stages, stages_at_once=1) as scheduler:
        answers_of(scheduler, [[1, 2]], max_tokens=2)
        nothing_left(stages)
        # It still decides now and then, about nobody: what fails then ends nothing.
        fails_once(owner, name, monkeypatch, while_=lambda: bool(scheduler._state.sequences))
        stream = submit(scheduler, [1, 2, 3], 8, request_id="the-request")
        with pytest.raises(Problem, match="the gateway failed"):
            tokens_of(stream)
        assert "as the test wants it" in caplog.text
        assert "the-request" in caplog.text
        answers_of(scheduler, [[1, 2], [3]], max_tokens=5)
        nothing_left(stages)
        wait_until(lambda: not scheduler.stats().trips and not scheduler.stats().running)
        assert scheduler.sick() is None


def test_chunks_that_were_on_their_way_hold_no_memory_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=8) as scheduler:
        stages[1].seconds = 0.02
        fails_once(scheduler_module, "stage_replied", monkeypatch, after=4)
        with pytest.raises(Problem, match="the gateway failed"):
            tokens_of(submit(scheduler, [1] * 100, 8))
        answers_of(scheduler, [[1] * 30, [3]], max_tokens=5)
        nothing_left(stages)


def test_a_round_of_warm_ups_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        fails_once(scheduler._client, "warm_up", monkeypatch)
        answers_of(scheduler, [[1, 2]], max_tokens=2)


def test_where_no_further_thread_can_start_those_that_are_there_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        answers_of(scheduler, [[1, 2], [3]], max_tokens=2)
        fails_once(scheduler._trips, "_start_thread", monkeypatch)
        answers_of(scheduler, [[1, 2], [3]], max_tokens=5)
        nothing_left(stages)


def test_no_deadline_is_too_far_for_the_clock() -> None:
    with counting_stages(1) as stages, scheduling(stages) as scheduler:
        stages[0].seconds = 0.01
        stream = submit(scheduler, [1, 2], 3, deadline_seconds=1e10)
        assert len(tokens_of(stream)) == 3
        later = submit(scheduler, [1, 2], 10_000, deadline_seconds=0.3)
        with pytest.raises(Problem, match=r"within 0\.3 seconds"):
            tokens_of(later)
        assert scheduler.sick() is None


def test_a_scheduler_says_what_is_wrong_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_stages(1) as stages, scheduling(stages) as scheduler:
        assert scheduler.sick() is None
        with scheduler._changed:
            scheduler._clock_looked_at = time.monotonic() - 1000
            assert "stuck for 1000 s" in str(scheduler.sick())
        wait_until(lambda: scheduler.sick() is None, "the clock's next look")
        with monkeypatch.context() as patched:
            patched.setattr(decide, "migrate", lambda *_: 1 / 0)
            for _ in range(3):
                with pytest.raises(Problem, match="the gateway failed"):
                    tokens_of(submit(scheduler, [1], 1))
            assert "fails whenever it decides" in str(scheduler.sick())
        answers_of(scheduler, [[1]], max_tokens=2)
        assert scheduler.sick() is None
        ended = threading.Thread(target=lambda: None)
        with monkeypatch.context() as patched:
            patched.setattr(scheduler, "_clock", ended)
            assert scheduler.sick() == "the scheduler's clock has ended"


@pytest.mark.parametrize("type_", [EventType.RESERVE, EventType.FORWARD, EventType.WARMUP])
def test_closing_waits_for_no_stage_that_hangs(type_: EventType) -> None:
    closed, waited = threading.Event(), threading.Event()

    def hang(seen: Seen) -> None:
        if seen.type == type_ and not closed.wait(40):
            waited.set()

    with counting_stages() as stages:
        with scheduling(stages, step_timeout_seconds=600) as scheduler:
            stages[1].inspect = hang
            submit(scheduler, [1, 2], 5)
            wait_until(lambda: any(seen.type == type_ for seen in stages[1].seen), "the event that hangs")
        assert not waited.is_set()
        closed.set()
        wait_until(lambda: not _threads(), "the end of the scheduler's threads")


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("trip", "call", "scheduler"))]


def hang_until(event: threading.Event, stage: StageServer) -> None:
    stage.inspect = lambda seen: None if seen.type != EventType.FORWARD else event.wait(20) and None


def test_an_instance_that_says_nothing_to_a_reservation_is_left_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the time of a step is over."""
    monkeypatch.setattr(client, "RESERVATION_SECONDS", 0.2)
    resumed = threading.Event()
    with watched(step_timeout_seconds=600) as pipeline:
        hung, other = pipeline.instances
        hung.inspect = lambda seen: None if seen.type != EventType.RESERVE else resumed.wait(20) and None
        pipeline.publish_ends()
        pipeline.publish(Endpoint(hung.url))
        streams = pipeline.run(1, 5)
        wait_until(lambda: any(seen.type == EventType.RESERVE for seen in hung.seen), "the reservation that hangs")
        pipeline.publish(Endpoint(hung.url), Endpoint(other.url))
        pipeline.check(streams, 5)
        assert not resumed.is_set()
        resumed.set()


def test_a_deadline_of_the_client_says_nothing_of_the_stage() -> None:
    resumed = threading.Event()
    with counting_stages() as stages, scheduling(stages) as scheduler:
        answers_of(scheduler, [[1, 2]], max_tokens=2)
        hang_until(resumed, stages[1])
        with pytest.raises(Problem, match=r"within 0\.2 seconds"):
            tokens_of(submit(scheduler, [1, 2], 5, deadline_seconds=0.2))
        wait_until(lambda: not scheduler.stats().trips, "the end of the event")
        resumed.set()
        instances = [instance for of_stage in scheduler._state.placement._stages for instance in of_stage.values()]
        assert [instance.failures for instance in instances] == [0, 0, 0]
        assert all(instance.awake for instance in instances)
        answers_of(scheduler, [[1, 2]], max_tokens=2)
        assert not scheduler.stats().replays
