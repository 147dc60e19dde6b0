"""Who waits until there is room: requests in flight at a stage that is short of memory, which its autoscaler counts."""

import threading
from collections.abc import Callable
from typing import Final

MOST_WAITING: Final = 2
"""Above the autoscaler's target, and far enough below the usual containerConcurrency."""


class Room:
    """free_tokens: KV tokens that can be reserved; any thread may ask. most: who may wait, of all gateways together."""

    def __init__(self, free_tokens: Callable[[], int], most: int = MOST_WAITING) -> None:
        self._free_tokens = free_tokens
        self._most = most
        self._changed = threading.Condition()
        self._closed = False
        self.waiting = 0

    def wait(self, tokens: int, seconds: float) -> None:
        """Until so many can be reserved, for so long at most; not at all where enough wait already, or once closed."""
        with self._changed:
            if self.waiting >= self._most:
                return
            self.waiting += 1
            try:
                self._changed.wait_for(lambda: self._closed or self._free_tokens() >= tokens, max(0.0, seconds))
            finally:
                self.waiting -= 1

    def look(self) -> None:
        """Something may have been freed. Costs nothing where nobody waits."""
        if self.waiting:
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits here any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
