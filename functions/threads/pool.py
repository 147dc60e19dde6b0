"""A pool of threads that end when they have nothing to do: what a burst needed is given back once it is over."""

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

IDLE_SECONDS: Final = 5.0
"""A thread with nothing to do for so long ends."""


@dataclass(slots=True)
class _Call:
    """One that was submitted."""

    future: "Future[Any]"
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.function(*self.arguments, **self.named)
        except BaseException as error:  # noqa: BLE001 - it is told to whoever waits for the future
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


@dataclass(slots=True, eq=False)
class _Idle:
    """A thread that waits for a call."""

    woken: threading.Lock = field(default_factory=threading.Lock)
    call: _Call | None = None

    def __post_init__(self) -> None:
        self.woken.acquire()


class ThreadPool(Executor):
    """At most `most` threads, started as they are needed.

    The library's `ThreadPoolExecutor` keeps for ever whatever it started, and is waited for when the process ends. Here the
    thread that was busy last is the first to be woken, so that those a burst was for become idle, and an idle one ends.
    """

    def __init__(self, most: int, name: str, idle_seconds: float = IDLE_SECONDS) -> None:
        self.most = most
        self._name = name
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._waiting: deque[_Call] = deque()
        self._idle: list[_Idle] = []
        """The one that became idle last is last."""
        self._threads = 0
        self._started = 0
        self._closed = False

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def waiting(self) -> int:
        """Calls that no thread has taken yet."""
        return len(self._waiting)

    @property
    def mostly_free(self) -> bool:
        """Whether half of the threads that may be have nothing to do, and nothing waits."""
        return (self._threads - len(self._idle) + len(self._waiting)) * 2 <= self.most

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Raises RuntimeError where the pool is closed. Where the machine gives no further thread, it waits for those there."""
        call = _Call(Future(), fn, args, kwargs)
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            if self._idle:
                idle = self._idle.pop()
                idle.call = call
                idle.woken.release()
            elif self._threads < self.most:
                self._start(call)
            else:
                self._waiting.append(call)
        return call.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no call any more; idle threads end. wait is not for this pool: nobody waits for its threads."""
        with self._lock:
            self._closed = True
            while cancel_futures and self._waiting:
                self._waiting.popleft().future.cancel()
            while self._idle:
                self._idle.pop().woken.release()

    def _start(self, call: _Call) -> None:
        """With the lock held."""
        self._threads += 1
        self._started += 1
        try:
            self._start_thread(call)
        except RuntimeError as error:
            _log.error("no thread more to %s than the %d there are: %s", self._name, self._threads - 1, error)
            self._threads -= 1
            self._waiting.append(call)

    def _start_thread(self, call: _Call) -> None:
        threading.Thread(target=self._run, args=(call,), name=f"{self._name}-{self._started}", daemon=True).start()

    def _run(self, call: _Call | None) -> None:
        while call is not None:
            call.run()
            del call  # What it was about is not held while the thread is idle.
            call = self._next()

    def _next(self) -> _Call | None:
        """None: this thread ends."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            if self._closed:
                self._threads -= 1
                return None
            idle = _Idle()
            self._idle.append(idle)
        if not idle.woken.acquire(timeout=self._idle_seconds):
            with self._lock:
                if idle in self._idle:
                    self._idle.remove(idle)
                    self._threads -= 1
                    return None
        if idle.call is None:  # Closed.
            with self._lock:
                self._threads -= 1
        return idle.call
