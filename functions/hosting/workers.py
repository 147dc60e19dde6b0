"""Threads that answer whole requests: started as they are needed, kept, and never what a process waits for at its end."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Workers(Generic[T]):
    """At most `most` threads, which call `work` with each item that is submitted. `work` raises nothing."""

    def __init__(self, most: int, work: Callable[[T], None], name: str) -> None:
        self.most = most
        self._work = work
        self._name = name
        self._items: SimpleQueue[T] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._submitted = 0

    @property
    def waiting(self) -> int:
        """Items that no thread has taken yet."""
        return self._items.qsize()

    @property
    def mostly_free(self) -> bool:
        """Whether half of the threads at least have nothing to do and nothing waiting."""
        return self._submitted * 2 <= self.most

    def submit(self, item: T) -> None:
        with self._lock:
            self._submitted += 1
            starts = self._submitted > self._threads and self._threads < self.most
            self._threads += starts
            number = self._threads
        self._items.put(item)
        if starts:
            threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work(self._items.get())
            with self._lock:
                self._submitted -= 1
