"""Stages that fail: whatever happens to events and stages, no token is lost or repeated."""

import threading

import pytest

from eventing.problems import InvalidRequest, PipelineUnavailable, ReplaysExhausted
from eventing.wire.events import EventType, Status
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.stages.routes import Placement
from tests.support.functions.gateway import counted, nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.stage_server import Fault, Inspect, Seen, counting_stages

PROMPTS = [[(5 * sequence + token) % 90 for token in range(2 + 6 * sequence)] for sequence in range(8)]
POISON = 96


def run(scheduler: Scheduler, max_tokens: int = 12) -> int:
    """Eight answers, every token checked; how often sequences were replayed."""
    streams = [submit(scheduler, prompt, max_tokens) for prompt in PROMPTS]
    for stream, prompt in zip(streams, PROMPTS, strict=True):
        assert tokens_of(stream) == counted(prompt, max_tokens)
    return sum(stream.timings().replays for stream in streams)


def on_forwards(fault: Fault, *numbers: int) -> Inspect:
    """The fault befalls the forward events with these numbers, counted from 1."""
    count = 0

    def inspect(seen: Seen) -> Fault | None:
        nonlocal count
        count += seen.type == EventType.FORWARD
        return fault if seen.type == EventType.FORWARD and count in numbers else None

    return inspect


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


def test_a_stage_that_comes_back_later() -> None:
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        stages[1].inspect = on_forwards(Fault.KILLED, 10)
        back = threading.Timer(0.7, stages[1].start)
        back.start()
        run(scheduler)
        assert scheduler.stats().wake_ups >= 2
        back.join()


def test_a_stage_that_never_comes_back() -> None:
    with counting_stages() as stages, scheduling(stages, cold_start_timeout_seconds=0.8) as scheduler:
        stages[1].inspect = on_forwards(Fault.KILLED, 5)
        streams = [submit(scheduler, [1], 1000) for _ in range(4)]
        for stream in streams:
            with pytest.raises(PipelineUnavailable, match=r"no route for 0\.8 seconds; stages without an instance: 1"):
                tokens_of(stream)
        wait_until(lambda: not (stages[0].engine.sequences or stages[2].engine.sequences))


def test_a_restart_between_steps_costs_a_recomputation_up_to_that_stage() -> None:
    """The rows miss; nobody's attempt fails, and the stages behind keep what they hold."""
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        stream = submit(scheduler, [3] * 40, 30)
        restarted = False

        def restart_before_reply(seen: Seen) -> Fault | None:
            nonlocal restarted
            if seen.type == EventType.FORWARD and seen.rows[0].position == 50 and not restarted:
                restarted = True
                stages[1].kill()
                stages[1].start()
            return None

        stages[0].inspect = restart_before_reply
        assert tokens_of(stream) == counted([3] * 40, 30)
        rows = [[row for seen in stage.forwards for row in seen.rows] for stage in stages]
        assert {row.attempt for of_stage in rows for row in of_stage} == {0}
        assert [sum(row.position == 0 for row in of_stage) for of_stage in rows] == [2, 2, 1]
        assert stream.timings().replays == 1


def test_a_stage_that_forgets_idle_sequences() -> None:
    with counting_stages(idle_seconds=0.15) as stages, scheduling(stages) as scheduler:
        stream = submit(scheduler, [3] * 10, 12)
        held_up = False

        def hold_up(seen: Seen) -> Fault | None:
            nonlocal held_up
            if seen.type == EventType.FORWARD and seen.rows[0].position == 15 and not held_up:
                held_up = True
                wait_until(lambda: not stages[2].engine.sequences)
            return None

        stages[1].inspect = hold_up
        assert tokens_of(stream) == counted([3] * 10, 12)
        assert stream.timings().replays in (1, 2), "stage 1 may have forgotten it too"


@pytest.mark.parametrize("stage", [0, 2])
def test_a_stage_that_hangs_and_answers_late(stage: int) -> None:
    """The step times out; the late event then finds a newer attempt and touches nothing."""
    with counting_stages() as stages, scheduling(stages, step_timeout_seconds=0.3) as scheduler:
        resumed = threading.Event()
        inspect = on_forwards(Fault.TWICE, 6, 7)

        def hang(seen: Seen) -> Fault | None:
            if inspect(seen) is not None:
                resumed.wait(10)
            return None

        stages[stage].inspect = hang
        threading.Timer(0.8, resumed.set).start()
        assert run(scheduler) > 0
        assert scheduler.stats().replays["timeout"] > 0


def test_a_stopped_stage_costs_no_attempts() -> None:
    """While a stage answers nothing at all, only the first step of each sequence counts against it."""
    with counting_stages() as stages, scheduling(stages, step_timeout_seconds=0.15) as scheduler:
        stopped = threading.Event()
        resumed = threading.Event()

        def stop(seen: Seen) -> Fault | None:
            if stopped.is_set():
                resumed.wait(10)
            return None

        stages[1].inspect = stop
        stop_timer, resume_timer = threading.Timer(0.1, stopped.set), threading.Timer(1.5, resumed.set)
        stop_timer.start()
        resume_timer.start()
        run(scheduler, max_tokens=60)
        assert not scheduler.stats().sequences["replays-exhausted"]


def test_a_poisonous_sequence_ends_alone() -> None:
    """It kills every stage it touches; three times, then it ends with an error and all others have their answers."""
    with counting_stages() as stages, scheduling(stages, chunk_tokens=16) as scheduler:
        deaths = []

        def die(seen: Seen) -> Fault | None:
            if POISON not in seen.token_ids:
                return None
            deaths.append(seen)
            return Fault.KILLED_RESTARTED

        stages[1].inspect = die
        prompts = [[token, 2, 3] for token in range(90) if POISON not in counted([token, 2, 3], 30)][:20]
        streams = [submit(scheduler, prompt, 30) for prompt in prompts[:10]]
        poison = submit(scheduler, [1, POISON, 2], 5)
        streams += [submit(scheduler, prompt, 30) for prompt in prompts[10:]]
        with pytest.raises(ReplaysExhausted, match="gave up after 3 attempts"):
            tokens_of(poison)
        for stream, prompt in zip(streams, prompts, strict=True):
            assert tokens_of(stream) == counted(prompt, 30)
        assert len(deaths) == 3
        assert [len(seen.ids) for seen in deaths[1:]] == [1, 1]


def test_a_sequence_that_dies_of_its_own_answer() -> None:
    """Poison that appears only when it is generated ends that sequence, after all its tokens up to there."""
    prompt = next([first, second] for first in range(90) for second in range(90) if counted([first, second], 6)[4] == POISON)
    with counting_stages() as stages, scheduling(stages) as scheduler:
        stages[2].inspect = lambda seen: Fault.KILLED_RESTARTED if POISON in seen.token_ids else None
        stream = submit(scheduler, prompt, 20)
        with pytest.raises(ReplaysExhausted):
            tokens_of(stream)
        assert stream.token_ids == counted(prompt, 5)


def test_what_a_stage_says_of_rows_is_believed() -> None:
    """A stage that answers stale without end is no reason to go on for ever."""
    with counting_stages() as stages, scheduling(stages) as scheduler:
        real = stages[1].engine.handle
        stages[1].engine.handle = lambda batch, **more: _with_status(real(batch, **more), Status.STALE)  # type: ignore[method-assign]
        stream = submit(scheduler, [1, 2, 3], 5)
        with pytest.raises(ReplaysExhausted, match="answered stale again"):
            tokens_of(stream)
        stages[1].engine.handle = lambda batch, **more: _with_status(real(batch, **more), Status.INVALID)  # type: ignore[method-assign]
        stream = submit(scheduler, [1, 2, 3], 5)
        with pytest.raises(InvalidRequest, match="as the test wants it"):
            tokens_of(stream)


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
    assert f"bad-one ({refused.message.split()[0]})" in told.message, "the stage's line is found by the gateway's"


def test_a_stage_of_another_pipeline_is_no_route() -> None:
    with counting_stages() as stages:
        swapped = Placement([stage.url for stage in reversed(stages)], watched=False)
        with scheduling(stages, placement=swapped) as scheduler:
            stream = submit(scheduler, [1], 5)
            with pytest.raises(PipelineUnavailable, match=r"wrong-layer: the event wants layer 0 and this stage runs 2 to 2"):
                tokens_of(stream)


def _with_status(batch: object, status: Status) -> object:
    import msgspec

    rows = tuple(
        msgspec.structs.replace(row, status=status, length=0, reason="as the test wants it")
        for row in batch.rows  # type: ignore[attr-defined]
    )
    return msgspec.structs.replace(batch, rows=rows, token_ids=batch.token_ids[:0], hidden=None)  # type: ignore[attr-defined, type-var]
