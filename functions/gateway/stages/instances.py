"""Instances of stages: what is known of each, whether it is used now, and the order in which prompt chunks enter it.

The scheduler's lock is held around what changes. `stage`, `url` and `prompts` never do, which is what the thread of a trip
reads (and `failures`, for how long it waits); a `Turnstile` and an `InFlight` have locks of their own.
"""

import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from eventing.http.framing import EventTemplate

FIRST_SUSPENSION_SECONDS: Final = 0.1
LONGEST_SUSPENSION_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is known of one instance from outside."""

    url: str
    revision: str = ""
    ready: bool = True
    terminating: bool = False


class Turnstile:
    """One at a time, in the order of `queue`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @property
    def idle(self) -> bool:
        return not self._queue

    def queue(self) -> threading.Event:
        """Set when it is one's turn; `leave` afterwards, always."""
        turn = threading.Event()
        with self._lock:
            if not self._queue:
                turn.set()
            self._queue.append(turn)
        return turn

    def leave(self) -> None:
        with self._lock:
            self._queue.popleft()
            if self._queue:
                self._queue[0].set()


class InFlight:
    """Counts events at an instance over time: this gateway's part of what Knative's autoscaler calls concurrency.

    A context manager around each event; thread-safe. Weighted by time, as queue-proxy counts requests (knative/serving
    pkg/http/stats).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events = 0
        self._seconds = 0.0
        self._since = time.monotonic()

    def __enter__(self) -> None:
        with self._lock:
            now = time.monotonic()
            self._seconds += self._events * (now - self._since)
            self._since = now
            self._events += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            now = time.monotonic()
            self._seconds += self._events * (now - self._since)
            self._since = now
            self._events -= 1

    def event_seconds(self) -> float:
        """Sum over all events so far. The difference of two readings, divided by the time between them, is the concurrency."""
        with self._lock:
            return self._seconds + self._events * (time.monotonic() - self._since)


@dataclass(eq=False, slots=True)
class Instance:
    """One instance of a stage, or a Service URL where there is no watch."""

    stage: int
    url: str
    revision: str = ""
    ready: bool = True
    terminating: bool = False
    is_service: bool = False
    """The Service URL stands in for instances that nobody watches."""
    awake: bool = True
    """False for a Service URL that has not replied since it last failed."""
    number: int = 0
    """Which one of its stage's it is, in the order in which this gateway learned of them, from 1 on."""
    routes: int = 0
    free_tokens: int | None = None
    """As its last reply said."""
    boot: str = ""
    """Who replied last, with a nonce of its boot."""
    prompts: Turnstile = field(default_factory=Turnstile)
    """One event with prompt chunks at a time, so that running decodes wait for at most one."""
    in_flight: InFlight = field(default_factory=InFlight)  # forward events of this gateway
    templates: dict[str, EventTemplate] = field(default_factory=dict)  # by event type; see StageClient
    failures: int = 0
    suspended_until: float = 0.0

    def suspended(self, now: float) -> bool:
        """It has just broken, and what is sent to it now would probably break too."""
        return now < self.suspended_until

    def usable(self, now: float) -> bool:
        return self.ready and self.awake and not self.terminating and not self.suspended(now)

    def replied(self, boot: str, free_tokens: int | None) -> None:
        self.failures = 0
        self.boot = boot
        if free_tokens is not None:
            self.free_tokens = free_tokens

    def suspend(self, now: float) -> None:
        """Left alone for a while, longer each time.

        What fails meanwhile was on its way already, and says nothing new: a pod may die with many events in hand and be back
        in no time.
        """
        if self.suspended(now):
            return
        pause = min(LONGEST_SUSPENSION_SECONDS, FIRST_SUSPENSION_SECONDS * 2 ** min(self.failures, 16))
        self.suspended_until = now + pause * random.uniform(0.75, 1.25)
        self.failures += 1
