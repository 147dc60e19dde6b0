"""Instances of stages, and routes: one instance for each stage, chosen by the gateway. Session affinity on stock Knative.

The scheduler's lock protects what changes. Threads of trips read an instance's `stage`, `url` and `prompts`, which do not
change, and `failures` for a timeout. `Turnstile` and `InFlight` have locks of their own.
"""

import math
import random
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from eventing.http.delivery import RequestTemplate
from eventing.wire.control import MAX_PEERS

FIRST_SUSPENSION_SECONDS: Final = 0.1
LONGEST_SUSPENSION_SECONDS: Final = 5.0
TOKENS_OF_A_ROUTE: Final = 512  # held by an instance, they are worth one route: it may carry one more than others
REBALANCE_AT: Final = 2  # an instance that carries so many routes more than another gives one away


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


@dataclass(frozen=True, slots=True)
class Held:
    """A number of tokens of a chain that one instance of each stage probably holds."""

    tokens: int = 0
    instances: tuple[Instance, ...] = ()

    def at(self, instance: Instance) -> int:
        """Tokens that `instance` probably need not compute."""
        return self.tokens if self.instances and self.instances[instance.stage] is instance else 0

    def on(self, instances: Sequence[Instance]) -> float:
        """The mean of `at` over the instances of a route."""
        return sum(map(self.at, instances)) / len(instances)


NOTHING: Final = Held()


def uneven(most_routes: int, least_routes: int) -> bool:
    """Whether the instance of a stage with the most routes gives one to the instance with the least."""
    return most_routes - least_routes >= REBALANCE_AT


class Route:
    """One instance per stage, counted at each of them until the route is closed."""

    def __init__(self, instances: Iterable[Instance]) -> None:
        self.instances = tuple(instances)
        for instance in self.instances:
            instance.routes += 1

    def replace(self, instance: Instance) -> Instance:
        """Goes through `instance` from now on. Returns the instance of the same stage that it left."""
        left = self.instances[instance.stage]
        left.routes -= 1
        instance.routes += 1
        self.instances = (*self.instances[: instance.stage], instance, *self.instances[instance.stage + 1 :])
        return left

    def suspended(self, now: float) -> bool:
        """Some instance has just failed."""
        return max([instance.suspended_until for instance in self.instances]) > now

    def lacks(self, reserve_tokens: int) -> bool:
        """By its last reply, some instance has less memory."""
        return any(_lacks(instance, reserve_tokens) for instance in self.instances)

    def close(self) -> None:
        for instance in self.instances:
            instance.routes -= 1


class Placement:
    """The instances of all stages, and which of them a route shall use."""

    def __init__(self, service_urls: Sequence[str], *, watched: bool) -> None:
        """service_urls: per stage. Without a watch they are the instances themselves, asleep until they reply."""
        self.service_urls = tuple(service_urls)
        self.num_stages = len(service_urls)
        self._stages: list[dict[str, Instance]] = [{} for _ in service_urls]  # by URL
        self._current: list[list[Instance]] = [[] for _ in service_urls]  # ready, of the newest revision that has any
        self._numbers = [count(1) for _ in service_urls]
        for stage in () if watched else range(len(service_urls)):
            self.unwatched(stage)

    def update(self, stage: int, endpoints: Iterable[Endpoint]) -> None:
        """Takes over what the watch knows of `stage`. Instances that it no longer knows are gone: routes leave them."""
        known = self._stages[stage]
        seen = {endpoint.url: endpoint for endpoint in endpoints}
        for url in known.keys() - seen.keys():
            instance = known.pop(url)
            instance.ready, instance.terminating = False, True
        for url, endpoint in seen.items():
            instance = known.get(url) or self._add(stage, Instance(stage, url))
            instance.revision = endpoint.revision
            instance.ready, instance.terminating = endpoint.ready, endpoint.terminating
        self._choose_current(stage)

    def unwatched(self, stage: int) -> None:
        """The instances of `stage` cannot be known: routes use its Service URL until `update` knows better."""
        url = self.service_urls[stage]
        if url not in self._stages[stage]:
            self._add(stage, Instance(stage, url, is_service=True, awake=False))
            self._choose_current(stage)

    def instances(self, stage: int) -> list[Instance]:
        """All known instances of `stage`, whether they take work or not."""
        return list(self._stages[stage].values())

    def usable(self, stage: int) -> list[Instance]:
        """Instances that may be given work now."""
        now = time.monotonic()
        return [instance for instance in self._current[stage] if instance.usable(now)]

    def ready_counts(self) -> list[int]:
        """Per stage, the instances of the current revision that take work; 0: unknown, because there is no watch."""
        return [len([each for each in current if not each.is_service]) for current in self._current]

    def cold(self) -> list[int]:
        """Stages that must be woken: none of their instances is ready and awake."""
        return [stage for stage, current in enumerate(self._current) if not any(each.awake for each in current)]

    def woken(self, stage: int) -> None:
        """The Service URL of `stage` replied."""
        for instance in self._stages[stage].values():
            if instance.is_service:
                instance.awake, instance.failures, instance.suspended_until = True, 0, 0.0

    def avoid(self, instance: Instance) -> None:
        """A request to `instance` failed. A Service URL has to be woken again; an instance is suspended for a while."""
        instance.suspend(time.monotonic())
        instance.awake = not instance.is_service

    def place(self, reserve_tokens: int, held: Held = NOTHING) -> Route | None:
        """A new route over the least used instances, those with memory first. None: a stage has no usable instance now.

        held: tokens that some instances need not compute. They weigh at most as much as one route, for with two more than
        another instance the route would be moved away again.
        """
        chosen = [self.least_used(stage, reserve_tokens, held) for stage in range(self.num_stages)]
        instances = [instance for instance in chosen if instance is not None]
        return Route(instances) if len(instances) == self.num_stages else None

    def least_used(self, stage: int, reserve_tokens: int = 0, held: Held = NOTHING) -> Instance | None:
        def load(instance: Instance) -> tuple[bool, float, bool]:
            saved = held.at(instance)
            return _lacks(instance, reserve_tokens), instance.routes - min(1.0, saved / TOKENS_OF_A_ROUTE), not saved

        return min(self.usable(stage), key=load, default=None)

    def has_memory(self, stage: int, reserve_tokens: int) -> bool:
        """By its last reply, some usable instance of `stage` has so much memory."""
        return any(not _lacks(instance, reserve_tokens) for instance in self.usable(stage))

    def must_leave(self, route: Route) -> Instance | None:
        """The instance that `route` shall take instead of one that terminates or is not ready. None: none, or it must stay."""
        for instance in route.instances:
            if instance.terminating or not instance.ready:
                target = self.least_used(instance.stage)
                if target is not None and target is not instance:
                    return target
        return None

    def leaving(self, instance: Instance) -> tuple[str, ...]:
        """URLs of other instances of the same stage that terminate and still answer."""
        others = self._stages[instance.stage].values()
        urls = [other.url for other in others if other.terminating and not other.is_service and other is not instance]
        return tuple(urls[:MAX_PEERS])

    def strands(self, route: Route) -> bool:
        """An instance of `route` terminates and its stage has no other: the stage has to be woken."""
        return bool([each for each in route.instances if each.terminating and not self._current[each.stage]])

    def outdated(self, route: Route) -> bool:
        """Instances of a newer revision take work in place of one of the route's."""
        for instance in route.instances:
            current = self._current[instance.stage]
            if instance.ready and current and instance not in current:
                return True
        return False

    def unbalanced(self) -> tuple[Instance, Instance] | None:
        """(from, to): an instance with so many more routes than another that one shall migrate. None: balanced."""
        for stage, current in enumerate(self._current):
            usable = self.usable(stage) if len(current) > 1 else ()
            if len(usable) > 1:
                least = min(usable, key=lambda instance: instance.routes)
                most = max(usable, key=lambda instance: instance.routes)
                if uneven(most.routes, least.routes):
                    return most, least
        return None

    def next_resumption(self, now: float) -> float:
        """When the next suspension ends, in time.monotonic(); infinity if none is pending."""
        ends = [each.suspended_until for known in self._stages for each in known.values() if each.suspended_until > now]
        return min(ends, default=math.inf)

    def _add(self, stage: int, instance: Instance) -> Instance:
        instance.number = next(self._numbers[stage])
        self._stages[stage][instance.url] = instance
        return instance

    def _choose_current(self, stage: int) -> None:
        ready = [instance for instance in self._stages[stage].values() if instance.ready and not instance.terminating]
        newest = max([_revision_order(instance.revision) for instance in ready], default=None)
        self._current[stage] = [instance for instance in ready if _revision_order(instance.revision) == newest]


def _lacks(instance: Instance, reserve_tokens: int) -> bool:
    return instance.free_tokens is not None and instance.free_tokens < reserve_tokens


def _revision_order(revision: str) -> tuple[int, str]:
    """Knative numbers revisions: `stage-0-00002`."""
    number = re.search(r"-(\d+)$", revision)
    return (int(number[1]) if number else 0, revision)
