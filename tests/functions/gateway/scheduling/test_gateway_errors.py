"""Unexpected errors in the gateway end the answers that they concern; others go on, and nothing leaks."""

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
from tests.support.functions.gateway import answers_of, nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import counting_stages, inspecting, is_type
from tests.support.functions.watched import watched


def fails_once(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch, after: int = 0, while_: Callable[..., bool] = lambda *_: True
) -> None:
    """Makes one call raise: the call after `after` others, counting calls for which `while_` holds."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def call(*given: Any, **named: Any) -> Any:
        nonlocal calls
        if while_(*given):
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
def test_an_unexpected_error_ends_the_answers_that_it_concerns(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with counting_stages() as stages, scheduling(stages, stages_at_once=1) as scheduler:
        answers_of(scheduler, [[1, 2]], max_tokens=2)
        nothing_left(stages)
        # Decisions without sequences are not counted: an error in one of them would end nothing.
        fails_once(owner, name, monkeypatch, while_=lambda *_: bool(scheduler._state.sequences))
        stream = submit(scheduler, [1, 2, 3], 8, request_id="the-request")
        with pytest.raises(Problem, match="the gateway failed"):
            tokens_of(stream)
        assert "as the test wants it" in caplog.text
        assert "the-request" in caplog.text
        answers_of(scheduler, [[1, 2], [3]], max_tokens=5)
        nothing_left(stages)
        wait_until(lambda: not scheduler.stats().trips and not scheduler.stats().running)
        assert scheduler.sick() is None


def test_chunks_that_were_in_flight_leave_no_memory_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=8) as scheduler:
        stages[1].seconds = 0.02
        fails_once(scheduler_module, "stage_replied", monkeypatch, after=4)
        with pytest.raises(Problem, match="the gateway failed"):
            tokens_of(submit(scheduler, [1] * 100, 8))
        answers_of(scheduler, [[1] * 30, [3]], max_tokens=5)
        nothing_left(stages)


@pytest.mark.slow
def test_warm_up_events_are_sent_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        fails_once(scheduler._client, "warm_up", monkeypatch)
        answers_of(scheduler, [[1, 2]], max_tokens=2)


def test_if_no_thread_can_start_the_others_do_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_stages() as stages, scheduling(stages) as scheduler:
        answers_of(scheduler, [[1, 2], [3]], max_tokens=2)
        fails_once(threading.Thread, "start", monkeypatch, while_=lambda thread: thread.name.startswith("trip"))
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


@pytest.mark.slow
def test_a_scheduler_reports_what_is_wrong_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_stages(1) as stages, scheduling(stages) as scheduler:
        assert scheduler.sick() is None
        with scheduler._changed:
            scheduler._clock_looked_at = time.monotonic() - 1000
            assert "stuck for 10" in str(scheduler.sick())
        wait_until(lambda: scheduler.sick() is None, "the clock's next look")
        with monkeypatch.context() as patched:
            patched.setattr(decide, "migrate", lambda *_: 1 / 0)
            for _ in range(3):
                with pytest.raises(Problem, match="the gateway failed"):
                    tokens_of(submit(scheduler, [1], 1))
            assert "fails whenever it decides" in str(scheduler.sick())
        answers_of(scheduler, [[1]], max_tokens=2)
        assert scheduler.sick() is None
        with monkeypatch.context() as patched:
            patched.setattr(scheduler, "_clock", threading.Thread(target=lambda: None))
            assert scheduler.sick() == "the scheduler's clock has ended"


@pytest.mark.slow
@pytest.mark.parametrize("type_", [EventType.RESERVE, EventType.FORWARD, EventType.WARMUP])
def test_closing_waits_for_no_stage_that_hangs(type_: EventType) -> None:
    closed, waited = threading.Event(), threading.Event()
    with counting_stages() as stages:
        with scheduling(stages, step_timeout_seconds=600) as scheduler:
            stages[1].inspect = inspecting(is_type(type_), lambda: closed.wait(40) or waited.set())
            submit(scheduler, [1, 2], 5)
            wait_until(lambda: any(map(is_type(type_), stages[1].seen)), "the event that hangs")
        assert not waited.is_set()
        closed.set()
        wait_until(
            lambda: not [each for each in threading.enumerate() if each.name.startswith(("trip", "call", "scheduler"))],
            "the end of the scheduler's threads",
        )


def test_an_instance_that_does_not_reply_to_a_reservation_is_left_before_a_steps_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "RESERVATION_SECONDS", 1.0)
    resumed = threading.Event()
    with watched(step_timeout_seconds=600) as pipeline:
        hung, other = pipeline.instances
        hung.inspect = inspecting(is_type(EventType.RESERVE), resumed.wait)
        pipeline.publish_ready(hung)
        streams = pipeline.run(1, 5)
        wait_until(lambda: any(map(is_type(EventType.RESERVE), hung.seen)), "the reservation that hangs")
        pipeline.publish_ready(hung, other)
        pipeline.check(streams, 5)
        resumed.set()


def test_a_clients_deadline_counts_against_no_stage() -> None:
    resumed = threading.Event()
    with counting_stages() as stages, scheduling(stages) as scheduler:
        answers_of(scheduler, [[1, 2]], max_tokens=2)
        stages[1].inspect = inspecting(is_type(EventType.FORWARD), resumed.wait)
        with pytest.raises(Problem, match=r"within 0\.2 seconds"):
            tokens_of(submit(scheduler, [1, 2], 5, deadline_seconds=0.2))
        wait_until(lambda: not scheduler.stats().trips, "the end of the event")
        resumed.set()
        instances = [next(iter(known.values())) for known in scheduler._state.placement.stages]
        assert [instance.failures for instance in instances] == [0, 0, 0]
        assert all(instance.awake for instance in instances)
        answers_of(scheduler, [[1, 2]], max_tokens=2)
        assert not scheduler.stats().replays
