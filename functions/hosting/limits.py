"""What a client may make the server hold: time, connections, bytes. Waiting costs a connection, never a thread."""

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

from eventing.problems import Overloaded

MAX_HEAD_BYTES: Final = 2**16
"""Request line and headers. An event's attributes may have 4096 characters each, three bytes for some of them."""
MAX_HEADERS: Final = 128


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one server. A connection that overruns one of them is closed."""

    head_seconds: float = 10.0
    """From a request's first byte, or the connection's beginning, to the end of its headers."""
    transfer_seconds: float = 10.0
    """What a body, or a reply, may take besides what its bytes take at the slowest rate."""
    slowest_bytes_per_second: float = 32 * 1024
    keep_alive_seconds: float = 75.0
    """Longer than the senders keep an idle connection (eventing/http/connections), so that they close it and not the server."""
    linger_seconds: float = 2.0
    """For reading a refusal while sending still, and for a request that was on its way when the server stopped."""
    graceful_seconds: float = 600.0
    """Longest time after SIGTERM: Knative's upper limit of timeoutSeconds, behind which the platform kills."""
    waiting_connections: int = 1024
    """That have no whole request; for one more, the one that has waited longest is closed."""


class BodyBudget:
    """Bytes of bodies in memory, of all requests together. Thread-safe."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._held = 0
        self._given_back: deque[int] = deque()
        """And not yet taken off `_held`."""

    @property
    def held_bytes(self) -> int:
        with self._lock:
            self._settle()
            return self._held

    def take(self, count: int) -> None:
        """Raises Overloaded where that is more than is left."""
        with self._lock:
            self._settle()
            if self._held + count > self.most_bytes:
                raise Overloaded(
                    f"requests in hand have {self._held} bytes, the most is {self.most_bytes}; send it again a little later"
                )
            self._held += count

    def give_back(self, count: int) -> None:
        """Takes no lock: destructors call it, and the garbage collector runs those anywhere, in the middle of `take`, too."""
        self._given_back.append(count)

    def _settle(self) -> None:
        """With the lock held."""
        while self._given_back:
            self._held -= self._given_back.popleft()


SMALL_BODY_BYTES: Final = 2**14
"""What of each body counts for nothing, so that large ones do not shut out the small; connections are bounded, too."""


class Body(bytearray):
    """A request's body as it comes in. It counts until its memory is free, whoever has it by then."""

    _budget: BodyBudget | None = None
    _charged = 0

    def charge(self, budget: BodyBudget, received: int) -> None:
        """So many bytes have come in. Raises Overloaded."""
        due = received - SMALL_BODY_BYTES - self._charged
        if due > 0:
            budget.take(due)
            self._budget = budget
            self._charged += due

    def __del__(self) -> None:
        if self._budget is not None:
            self._budget.give_back(self._charged)
