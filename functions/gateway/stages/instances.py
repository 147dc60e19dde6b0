"""Instances of stages: what is known of each, whether it is used now, and the order in which prompt chunks enter it.

The scheduler's lock protects what changes. Threads of trips read `stage`, `url` and `prompts`, which do not change, and
`failures` for a timeout. `Turnstile` and `InFlight` have locks of their own.
"""

import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from eventing.http.delivery import RequestTemplate

FIRST_SUSPENSION_SECONDS: Final = 0.1
LONGEST_SUSPENSION_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One instance as Kubernetes describes it."""

    url: str
    revision: str = ""
    ready: bool = True
    terminating: bool = False


class Turnstile:
    """Admits one event at a time, in the order of `queue`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @property
    def idle(self) -> bool:
        return not self._queue

    def queue(self) -> threading.Event:
        """The event is set when the caller may enter. Call `leave` afterwards, always."""
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
    """One instance of a stage, or its Service URL if instances are not watched."""

    stage: int
    url: str
    revision: str = ""
    ready: bool = True
    terminating: bool = False
    is_service: bool = False  # it is a Service URL
    awake: bool = True  # False for a Service URL that has not replied since it last failed
    number: int = 0  # from 1 on, in the order in which this gateway learned of the stage's instances
    routes: int = 0
    free_tokens: int | None = None  # in its last reply
    boot: str = ""  # name with a nonce of its boot, in its last reply
    prompts: Turnstile = field(default_factory=Turnstile)  # one event with prompt chunks, so that decodes wait for at most one
    in_flight: InFlight = field(default_factory=InFlight)  # forward events of this gateway
    templates: dict[str, RequestTemplate] = field(default_factory=dict)  # by event type; see StageClient
    failures: int = 0
    suspended_until: float = 0.0

    def suspended(self, now: float) -> bool:
        """Whether it failed so recently that events to it would probably fail too."""
        return now < self.suspended_until

    def usable(self, now: float) -> bool:
        return self.ready and self.awake and not self.terminating and not self.suspended(now)

    def replied(self, boot: str, free_tokens: int | None) -> None:
        self.failures = 0
        self.boot = boot
        if free_tokens is not None:
            self.free_tokens = free_tokens

    def suspend(self, now: float) -> None:
        """Suspends it for a while, longer after each failure.

        Failures during a suspension are not counted: these events were under way already. A pod may die with many events in
        hand and be back at once.
        """
        if self.suspended(now):
            return
        pause = min(LONGEST_SUSPENSION_SECONDS, FIRST_SUSPENSION_SECONDS * 2 ** min(self.failures, 16))
        self.suspended_until = now + pause * random.uniform(0.75, 1.25)
        self.failures += 1
