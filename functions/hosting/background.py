"""One thing beside another, in a thread that never keeps a process from ending."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def run_in_background(action: Callable[[], T], name: str) -> "Future[T]":
    """What `action` returns or raises. A ThreadPoolExecutor would be waited for at the process's end, whatever it hangs on."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
