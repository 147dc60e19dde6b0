"""A pool whose threads end when they are idle, so that the threads of a burst do not stay."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, Final, ParamSpec, TypeVar

_log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

IDLE_SECONDS: Final = 5.0  # a thread that is idle for so long ends


@dataclass(slots=True)
class _Call:
    future: "Future[Any]"
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.function(*self.arguments, **self.named)
        except BaseException as error:  # noqa: BLE001 - the future passes it on
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


@dataclass(slots=True, eq=False)
class _Idle:
    """An idle thread. It waits for `woken` and then runs `call`. If `call` is None, the thread ends."""

    woken: threading.Lock = field(default_factory=threading.Lock)  # held until then
    call: _Call | None = None


class ThreadPool(Executor):
    """Runs calls in at most `max_threads` threads, which are started when needed and end after IDLE_SECONDS without a call.

    The standard library's ThreadPoolExecutor keeps its threads for ever, and the process waits for them when it ends. Here the
    thread that was busy last is woken first, so that the threads of a burst stay idle and end.
    """

    def __init__(self, max_threads: int, name: str, idle_seconds: float = IDLE_SECONDS) -> None:
        self._max_threads = max_threads
        self._name = name
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self.waiting: deque[_Call] = deque()  # for a thread
        self._idle: list[_Idle] = []  # most recently used last
        self.threads = 0  # now
        self._started = 0
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Runs a call in an idle or new thread. If `max_threads` threads are busy, the call is queued.

        The call is also queued if a thread cannot be started. Raises RuntimeError if the pool is closed.
        """
        call = _Call(Future(), fn, args, kwargs)
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            if self._idle:
                idle = self._idle.pop()
                idle.call = call
                idle.woken.release()
            elif self.threads < self._max_threads:
                self._start(call)
            else:
                self.waiting.append(call)
        return call.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuses further calls and ends idle threads. `wait` has no effect: it never waits for threads."""
        with self._lock:
            self._closed = True
            while cancel_futures and self.waiting:
                self.waiting.popleft().future.cancel()
            while self._idle:
                self._idle.pop().woken.release()

    def _start(self, call: _Call) -> None:
        """Starts a thread that runs `call`. If that fails, queues the call. The caller must hold the lock."""
        self._started += 1
        first = [call]  # taken out by the thread, which would otherwise keep its arguments until it ends
        thread = threading.Thread(target=self._run, args=(first,), name=f"{self._name}-{self._started}", daemon=True)
        self.threads += 1
        try:
            thread.start()
        except RuntimeError as error:
            self.threads -= 1
            _log.error("the pool %s cannot start a thread beside its %d: %s", self._name, self.threads, error)
            self.waiting.append(call)

    def _run(self, first: list[_Call]) -> None:
        call: _Call | None = first.pop()
        while call is not None:
            call.run()
            del call  # an idle thread must not keep its arguments alive
            call = self._next()

    def _next(self) -> _Call | None:
        """Waits for a thread's next call. Returns None if the thread must end: it was idle too long, or the pool was closed."""
        with self._lock:
            if self.waiting:
                return self.waiting.popleft()
            if self._closed:
                self.threads -= 1
                return None
            idle = _Idle()
            idle.woken.acquire()
            self._idle.append(idle)
        if not idle.woken.acquire(timeout=self._idle_seconds):
            with self._lock:
                if idle in self._idle:
                    self._idle.remove(idle)
                    self.threads -= 1
                    return None
        if idle.call is None:  # the pool was closed
            with self._lock:
                self.threads -= 1
        return idle.call
