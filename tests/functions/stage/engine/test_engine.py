"""The engine's thread: merging, order, expiry, poisoned events, drain, and being alive."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import pytest

from eventing.problems import EventExpired, NotReady
from eventing.wire.control import ReleaseRow, ReserveRow
from eventing.wire.events import Batch, Row, Status, Want
from functions.stage.engine.engine import Engine, PassStatistics
from functions.stage.engine.event_queue import EventQueue, ForwardEvent
from functions.stage.models.floats import Array
from functions.stage.models.layer_group import Segment
from tests.support.functions.counting_group import CountingGroup, Poisoned
from tests.support.functions.stage_pipeline import batch, drawn, engines, reserved, wait_for

GATEWAY = "gateway"
DEADLINE_SECONDS = 30


@pytest.fixture(autouse=True, params=[False, True], ids=["engine thread", "calling thread"])
def who_computes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountingGroup, "shares_work", request.param)


class Crowd:
    """Sends events from many threads while the group is held in a first pass, so that tests know which events wait."""

    def __init__(self, engine: Engine, group: CountingGroup) -> None:
        self.engine = engine
        self.group = group
        self.pool = ThreadPoolExecutor(max_workers=32)

    def send(self, *rows: Row, tokens: Sequence[int] | None = None, **arguments: Any) -> "Future[Batch]":
        """Returns once the event waits at the stage."""
        ids = [1] * sum(row.length for row in rows) if tokens is None else tokens
        before = self._at_stage()
        future = self.pool.submit(self.engine.handle, batch(rows, ids), source=GATEWAY, **arguments)
        wait_for(lambda: self._at_stage() > before or future.done())
        return future

    @contextmanager
    def held(self) -> Iterator[None]:
        """While inside, a pass with a sequence named "holder" is running."""
        self.group.gate.clear()
        self.group.began.clear()
        holder = self.send(step("holder", 0, 1, reserve=2))
        assert self.group.began.wait(DEADLINE_SECONDS)
        try:
            yield
        finally:
            self.group.gate.set()
            assert holder.result(DEADLINE_SECONDS).rows[0].status is Status.OK

    def _at_stage(self) -> int:
        return sum(len(steps) for steps in self.engine._queue._steps.copy().values())


def step(id_: str, position: int, length: int, attempt: int = 0, reserve: int | None = None) -> Row:
    return Row(id_, attempt, position, length, Want.TOKEN, reserve_tokens=reserve)


def answer(future: "Future[Batch]") -> Row:
    (row,) = future.result(DEADLINE_SECONDS).rows
    return row


def token(future: "Future[Batch]") -> int:
    return drawn(answer(future))[0]


@contextmanager
def crowd(capacity_tokens: int = 1000, max_positions: int = 64, **settings: Any) -> Iterator[Crowd]:
    group = CountingGroup(capacity_tokens=capacity_tokens, max_positions=max_positions)
    with engines([group], **settings) as (engine,):
        people = Crowd(engine, group)
        try:
            yield people
        finally:
            group.gate.set()
            people.pool.shutdown()


def test_waiting_events_are_merged_and_their_replies_split() -> None:
    seen: list[PassStatistics] = []
    began = time.perf_counter()
    with crowd(max_merge=8, on_pass=seen.append) as people:
        with people.held():
            futures = [people.send(step(str(n), 0, n, reserve=10), tokens=[n] * n) for n in (2, 3, 4, 5)]
        assert [token(future) for future in futures] == [4, 9, 16, 25]
        assert people.group.passes == [[1], [2, 3, 4, 5]]
        wait_for(lambda: len(seen) == 2)
    assert [len(statistics.queue_seconds) for statistics in seen] == [1, 4]
    assert seen[1].tokens == 14
    assert seen[1].rows == (Status.OK,) * 4
    assert min(seen[1].queue_seconds) > 0
    assert seen[1].queue_seconds[0] == max(seen[1].queue_seconds) < time.perf_counter() - began


@pytest.mark.parametrize(("num_stages", "max_merge", "first_pass"), [(1, 8, 8), (3, 8, 3), (3, 2, 2), (8, 8, 1), (1, 1, 1)])
def test_a_pass_merges_at_most_the_stages_share_of_waiting_events(num_stages: int, max_merge: int, first_pass: int) -> None:
    with crowd(num_stages=num_stages, max_merge=max_merge) as people:
        with people.held():
            futures = [people.send(step(str(n), 0, 1, reserve=5)) for n in range(8)]
        wait(futures, DEADLINE_SECONDS)
        assert len(people.group.passes[1]) == first_pass


def test_large_events_are_not_merged() -> None:
    with crowd(capacity_tokens=2000, max_positions=1000, num_stages=1, max_merge=8) as people:
        with people.held():
            futures = [people.send(step(str(n), 0, 300, reserve=300)) for n in range(2)]
            futures += [people.send(step("small", 0, 1, reserve=1))]
        wait(futures, DEADLINE_SECONDS)
        assert people.group.passes == [[1], [300, 1], [300]]


def test_two_steps_of_a_sequence_are_not_merged_and_keep_their_order() -> None:
    with crowd(num_stages=1, max_merge=8) as people:
        with people.held():
            first = people.send(step("a", 0, 2, reserve=10), step("b", 0, 1, reserve=10), tokens=[1, 2, 3])
            second = people.send(step("a", 2, 1), step("c", 0, 1, reserve=10), tokens=[3, 9])
            third = people.send(step("c", 1, 1), tokens=[1])
            apart = people.send(step("d", 0, 1, reserve=10), tokens=[5])
        assert [row.result and row.result.tokens for row in first.result().rows] == [(3,), (3,)]
        assert [row.result and row.result.tokens for row in second.result().rows] == [(6,), (9,)]
        assert (token(third), token(apart)) == (10, 5)
        assert people.group.passes == [[1], [2, 1, 1], [1, 1], [1]]


def test_a_duplicate_of_a_waiting_step_is_answered_after_it() -> None:
    with crowd() as people:
        with people.held():
            both = [people.send(step("a", 0, 2, reserve=10), tokens=[1, 2]) for _ in range(2)]
        assert [token(future) for future in both] == [3, 3]


def test_a_row_older_than_the_step_in_progress_is_stale() -> None:
    with crowd() as people:
        assert token(people.send(step("a", 0, 3, reserve=10), tokens=[1, 2, 3])) == 6
        with people.held():
            current = people.send(step("a", 3, 1), tokens=[6])
            late = people.send(step("a", 0, 3, reserve=10), tokens=[1, 2, 3])
        assert token(current) == 12
        assert (answer(late).status, answer(late).result) == (Status.STALE, None)
        assert token(people.send(step("a", 4, 1), tokens=[12])) == 24


def test_an_older_attempt_is_stale_even_while_the_newer_one_waits() -> None:
    with crowd() as people:
        assert token(people.send(step("a", 0, 1, reserve=10))) == 1
        with people.held():
            newer = people.send(step("a", 0, 1, attempt=1, reserve=10))
            older = people.send(step("a", 1, 1, attempt=0))
        assert token(newer) == 1
        assert answer(older).status is Status.STALE


def test_a_release_makes_waiting_rows_stale() -> None:
    with crowd(capacity_tokens=100) as people:
        with people.held():
            waiting = people.send(step("a", 0, 1, reserve=10), step("b", 0, 1, reserve=10))
            with ThreadPoolExecutor() as pool:
                releasing = pool.submit(people.engine.release, [ReleaseRow("a", 0)], source=GATEWAY)
                wait_for(lambda: len(people.engine._queue._calls) == 1)
                people.group.gate.set()
                assert releasing.result(DEADLINE_SECONDS) == 0
        assert [row.status for row in waiting.result().rows] == [Status.STALE, Status.OK]
        assert people.engine.cache.free_tokens == 100 - 2 - 10


def test_a_poisoned_event_fails_alone() -> None:
    with crowd(num_stages=1, max_merge=8) as people:
        people.group.poison = 13
        assert token(people.send(step("a", 0, 2, reserve=10), tokens=[1, 2])) == 3
        with people.held():
            good = people.send(step("a", 2, 1), tokens=[3])
            poisoned = people.send(step("b", 0, 1, reserve=10), step("c", 0, 1, reserve=10), tokens=[13, 1])
            too = people.send(step("d", 0, 1, reserve=10), tokens=[4])
        assert (token(good), token(too)) == (6, 4)
        with pytest.raises(Poisoned, match="token 13"):
            poisoned.result()
        assert token(people.send(step("a", 3, 1), tokens=[6])) == 12
        assert answer(people.send(step("b", 1, 1))).held == 0
        assert people.engine.alive(stuck_after_seconds=10)


def test_an_expired_event_is_dropped_before_it_is_computed() -> None:
    now = [1000.0]
    with crowd(clock=lambda: now[0]) as people:
        with people.held():
            expired = people.send(step("a", 0, 1, reserve=10), expires_at=1005.0)
            timely = people.send(step("b", 0, 1, reserve=10), expires_at=1020.0)
            now[0] = 1010.0
        with pytest.raises(EventExpired):
            expired.result()
        assert token(timely) == 1
        assert len(people.engine.sequences.by_id) == 2


def test_idle_sequences_expire_and_active_ones_do_not() -> None:
    now = [1000.0]
    with crowd(capacity_tokens=100, clock=lambda: now[0], idle_sequence_seconds=60.0) as people:
        for id_ in ("a", "b"):
            assert token(people.send(step(id_, 0, 1, reserve=10))) == 1
        now[0] += 50
        assert token(people.send(step("a", 1, 1))) == 2
        now[0] += 20
        assert reserved(people.engine, [ReserveRow("c", 0, 90)], source=GATEWAY) == [Status.OK]
        assert people.engine.cache.free_tokens == 0
        assert answer(people.send(step("b", 1, 1))).status is Status.MISS


def test_a_thousand_abandoned_sequences_are_all_freed() -> None:
    group = CountingGroup(capacity_tokens=10_000)
    with engines([group], idle_sequence_seconds=0.2) as (engine,):
        for first in range(0, 1000, 100):
            rows = [step(str(n), 0, 1, reserve=10) for n in range(first, first + 100)]
            assert {row.status for row in engine.handle(batch(rows, [1] * 100), source=GATEWAY).rows} == {Status.OK}
        wait_for(lambda: engine.cache.free_tokens == 10_000)
        assert len(engine.sequences.by_id) == 0
        assert not engine._queue._steps


def test_draining_answers_waiting_events_and_takes_no_more() -> None:
    with crowd() as people:
        with people.held():
            waiting = people.send(step("a", 0, 1, reserve=10))
            stopping = threading.Thread(target=people.engine.stop)
            stopping.start()
            wait_for(lambda: people.engine._queue._closed)
            with pytest.raises(NotReady, match="shutting down"):
                people.engine.handle(batch([step("b", 0, 1, reserve=10)], [1]), source=GATEWAY)
            with pytest.raises(NotReady, match="shutting down"):
                people.engine.release([ReleaseRow("a", 0)], source=GATEWAY)
        assert token(waiting) == 1
        stopping.join(DEADLINE_SECONDS)
        assert not people.engine.alive(stuck_after_seconds=10)


def test_stopping_without_draining_answers_not_ready() -> None:
    with crowd() as people:
        with people.held():
            waiting = people.send(step("a", 0, 1, reserve=10))
            stopping = threading.Thread(target=people.engine.stop, kwargs={"drain": False})
            stopping.start()
            with pytest.raises(NotReady, match="stopped before"):
                waiting.result(DEADLINE_SECONDS)
        stopping.join(DEADLINE_SECONDS)


def test_a_stuck_pass_is_reported() -> None:
    with crowd() as people:
        assert people.engine.alive(stuck_after_seconds=0.01)
        with people.held():
            assert people.engine.alive(stuck_after_seconds=60)
            wait_for(lambda: not people.engine.alive(stuck_after_seconds=0.01))
        wait_for(lambda: people.engine.alive(stuck_after_seconds=0.01))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_thread_is_reported_and_fails_all_waiting_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    with crowd() as people:
        with people.held():
            monkeypatch.setattr(people.group, "forward", die)
            futures = [people.send(step(id_, 0, 1, reserve=10)) for id_ in "ab"]
        for future in futures:
            with pytest.raises(NotReady, match="stopped before"):
                future.result(DEADLINE_SECONDS)
        wait_for(lambda: not people.engine.alive(stuck_after_seconds=10))
        with pytest.raises(NotReady, match="shutting down"):
            people.engine.reserve([ReserveRow("a", 0, 1)], source=GATEWAY)


def test_warm_up_holds_no_memory() -> None:
    groups = [CountingGroup(0, 2, 6), CountingGroup(2, 4, 6), CountingGroup(4, 6, 6)]
    with engines(groups) as stages:
        for engine in stages:
            engine.warm_up()
        assert [engine.cache.free_tokens for engine in stages] == [100] * 3
    assert [group.passes for group in groups] == [[[1]]] * 3


def test_an_empty_queue_gives_nothing() -> None:
    queue = EventQueue(num_stages=1, max_merge=1)
    assert queue.wait(0.001)
    assert queue.take() == ([], [])
    queue.close()
    assert not queue.wait(0.001)
    with pytest.raises(NotReady):
        queue.put(ForwardEvent(batch([step("a", 0, 1)], [1]), GATEWAY))


def test_the_thread_that_brings_an_event_computes_it_if_the_turn_is_free(who_computes: None) -> None:
    class Noting(CountingGroup):
        def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
            threads.append(threading.current_thread().name)
            return super().forward(inputs, segments)

    threads: list[str] = []
    with engines([Noting()]) as (engine,):
        for position in range(3):
            engine.handle(batch([step("a", position, 1, reserve=None if position else 10)], [1]), source=GATEWAY)
    assert threads == [threading.current_thread().name if Noting.shares_work else "engine"] * 3


def test_many_threads_at_once_get_their_own_answers() -> None:
    group = CountingGroup(capacity_tokens=100_000)
    with engines([group], num_stages=2) as (engine,), ThreadPoolExecutor(max_workers=16) as pool:

        def converse(n: int) -> list[int]:
            steps = [step(str(n), position, 1, reserve=None if position else 20) for position in range(10)]
            replies = [engine.handle(batch([row], [n]), source=GATEWAY) for row in steps]
            engine.release([ReleaseRow(str(n), 0)], source=GATEWAY)
            return [drawn(reply.rows[0])[0] for reply in replies]

        for n, tokens in enumerate(pool.map(converse, range(90))):
            assert tokens == [n * k % 97 for k in range(1, 11)]
        assert engine.cache.free_tokens == 100_000


def queue_of(*events: tuple[str, int]) -> EventQueue:
    """A queue with these events, each of one row: id, and new tokens."""
    queue = EventQueue(num_stages=4, max_merge=4)
    for id_, length in events:
        queue.put(ForwardEvent(Batch((Row(id_, 0, 1, length, Want.TOKEN),), memoryview(b"")), GATEWAY))
    return queue


def taken(queue: EventQueue) -> list[list[str]]:
    """The ids in each further pass, until the queue is empty."""
    passes = []
    while events := queue.take()[1]:
        passes.append([event.batch.rows[0].id for event in events])
    return passes


def test_a_decode_step_joins_the_chunk_of_a_prompt_that_is_before_it() -> None:
    """In all other orders a pass takes one of so few events, so that micro-batches do not travel as one convoy."""
    assert taken(queue_of(("chunk", 64), ("a", 1), ("b", 1))) == [["chunk", "a"], ["b"]]
    assert taken(queue_of(("chunk", 64), ("other", 64), ("a", 1))) == [["chunk", "a"], ["other"]]
    assert taken(queue_of(("chunk", 64), ("other", 64))) == [["chunk"], ["other"]]
    assert taken(queue_of(("a", 1), ("b", 1))) == [["a"], ["b"]]


def test_a_chunk_of_a_prompt_overtakes_each_decode_step_that_waits_once_at_most() -> None:
    assert taken(queue_of(("a", 1), ("b", 1), ("chunk", 64))) == [["chunk", "a"], ["b"]]
    assert taken(queue_of(("a", 1), ("b", 1), ("chunk", 64), ("c", 1), ("other", 64))) == [
        ["chunk", "a"],
        ["b"],
        ["other", "c"],
    ]
    queue = queue_of(("a", 1), ("b", 1), ("c", 1), ("chunk", 64))
    assert [event.batch.rows[0].id for event in queue.take()[1]] == ["chunk", "a"]
    queue.put(ForwardEvent(Batch((Row("other", 0, 1, 64, Want.TOKEN),), memoryview(b"")), GATEWAY))
    assert taken(queue) == [["b"], ["c"], ["other"]], "both were overtaken before"


def test_a_chunk_overtakes_no_other_chunk_and_no_event_of_its_own_sequence() -> None:
    assert taken(queue_of(("first", 64), ("second", 64))) == [["first"], ["second"]]
    assert taken(queue_of(("own", 1), ("other", 1), ("own", 64))) == [["own"], ["own", "other"]]
