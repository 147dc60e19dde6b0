"""The pool of threads: it grows with concurrent calls and ends idle threads."""

import gc
import threading
import weakref
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest

from functions.threads.pool import ThreadPool
from tests.support.functions.functions import wait_until


def _burst(pool: ThreadPool, count: int) -> None:
    """Makes `count` concurrent calls."""
    together = threading.Barrier(count)
    wait([pool.submit(together.wait, 20) for _ in range(count)])


def test_futures_have_results_and_failures() -> None:
    pool = ThreadPool(2, "test")
    assert pool.submit(divmod, 7, 2).result(120) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 7, 0).result(120)
    pool.shutdown()


def test_a_burst_is_taken_at_once_and_its_threads_end_when_it_is_over() -> None:
    pool = ThreadPool(64, "test", idle_seconds=0.2)
    _burst(pool, 64)
    assert pool.threads == 64
    wait_until(lambda: pool.threads == 0)
    wait_until(lambda: not [each for each in threading.enumerate() if each.name.startswith("test-")])
    assert pool.submit(int, "7").result(120) == 7


@pytest.mark.slow
def test_little_work_keeps_few_threads_however_steady_it_is() -> None:
    """A pool that woke its threads in turn would keep all of them alive."""
    pool = ThreadPool(64, "test", idle_seconds=0.5)
    _burst(pool, 64)

    def worked() -> bool:
        pool.submit(int).result(120)
        return pool.threads <= 2

    wait_until(worked)
    pool.shutdown()


def test_more_calls_than_threads_wait_for_their_turn() -> None:
    pool = ThreadPool(2, "test")
    go = threading.Event()
    futures = [pool.submit(go.wait, 20) for _ in range(6)]
    assert (pool.threads, len(pool.waiting)) == (2, 4)
    go.set()
    assert all(future.result(120) for future in futures)
    pool.shutdown()


@pytest.mark.slow
def test_no_call_is_lost_between_a_thread_that_ends_and_one_that_begins() -> None:
    pool = ThreadPool(4, "test", idle_seconds=0.0005)
    pause = threading.Event()
    for number in range(500):
        assert pool.submit(int, number).result(120) == number
        pause.wait(0.0005 * (number % 3))
    wait_until(lambda: pool.threads == 0)


def test_calls_wait_for_other_threads_if_none_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ThreadPool(2, "test")
    go = threading.Event()
    first = pool.submit(go.wait, 20)

    def refused(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    second = pool.submit(int, "7")
    assert (pool.threads, len(pool.waiting)) == (1, 1)
    go.set()
    assert first.result(120)
    assert second.result(120) == 7
    pool.shutdown()


def test_an_idle_thread_keeps_no_argument_alive() -> None:
    class Large:
        pass

    pool = ThreadPool(1, "test", idle_seconds=3600)
    gc.disable()
    try:
        for _ in range(2):  # a thread's first call and a later one
            large = Large()
            seen = weakref.ref(large)
            future = pool.submit(id, large)
            future.result(120)
            del large, future
            wait_until(lambda: seen() is None)  # noqa: B023 - called at once
    finally:
        gc.enable()
    pool.shutdown()


def test_a_closed_pool_refuses_calls_and_its_threads_end() -> None:
    pool = ThreadPool(1, "test", idle_seconds=3600)
    go = threading.Event()
    running, waiting = pool.submit(go.wait, 20), pool.submit(int)
    pool.shutdown(cancel_futures=True)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(int)
    with pytest.raises(CancelledError):
        waiting.result(120)
    go.set()
    assert running.result(120)
    wait_until(lambda: pool.threads == 0)

    idle = ThreadPool(1, "test", idle_seconds=3600)
    idle.submit(int).result(120)
    idle.shutdown()
    wait_until(lambda: idle.threads == 0)
