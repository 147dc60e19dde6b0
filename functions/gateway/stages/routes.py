"""Instances of stages, and routes. A route is one instance for each stage, chosen by the gateway.

Routes give session affinity on stock Knative. The scheduler's lock protects what changes. Threads of trips read an instance's
`stage`, `url` and `prompts`, which do not change, and `failures` for a timeout. `FifoLock` and `InFlight` have locks of their
own.
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

FIRST_SUSPENSION_SECONDS: Final = 0.1
LONGEST_SUSPENSION_SECONDS: Final = 5.0
TOKENS_OF_A_ROUTE: Final = 512  # held by an instance, they are worth one route: it may carry one more than others
REBALANCE_AT: Final = 2  # an instance that carries so many routes more than another gives one away
SLOW_FROM: Final = 2.0  # an instance whose passes take so many times as long as its quickest peer's gets less work
_QUICK_BELOW: Final = 1.5  # a slow one is quick again below this
_MOST_SLOWNESS: Final = 4.0  # of one pass: a pause of the process does not make an instance slow
_PACE_DECAY: Final = 0.95  # share of the sums that is kept with each pass: they are of the last twenty
_PACE_SECONDS: Final = 30.0  # an instance whose last pass is older gets a try
_FIRST_PASSES: Final = 10  # with which a new instance counts as quick
_SHORT_PASS_SECONDS: Final = 0.002  # added to both sides of a comparison: jitter of short passes does not count
_MOST_LINEAGES: Final = 16  # that are remembered of an instance


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address of a stage's pod, as its EndpointSlice describes it."""

    url: str
    revision: str = ""
    ready: bool = True
    terminating: bool = False
    serving: bool = True  # it answers, also while it terminates


class FifoLock:
    """A lock that callers get in the order in which they queued. Any thread may leave it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @property
    def idle(self) -> bool:
        return not self._queue

    def queue(self) -> threading.Event:
        """Queues the caller, and returns an event that is set when the caller may enter.

        The caller must always call `leave` afterwards.
        """
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
    """Measures this gateway's part of what Knative's autoscaler calls the concurrency of an instance.

    Use it as a context manager around each event. Thread-safe. The number of events is weighted by time, as queue-proxy counts
    requests (knative/serving pkg/http/stats).
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
        """Returns the sum over all events so far of the seconds that each was in flight.

        The difference of two readings, divided by the time between them, is the concurrency.
        """
        with self._lock:
            return self._seconds + self._events * (time.monotonic() - self._since)


@dataclass(eq=False, slots=True)
class Instance:
    """One instance of a stage, as this gateway knows it: its address, state and load.

    If the gateway does not watch EndpointSlices, the URL of the stage's Service takes the place of all its instances.
    """

    stage: int
    url: str
    revision: str = ""
    ready: bool = True
    terminating: bool = False
    is_service: bool = False  # it is a Service URL
    awake: bool = True  # False for a Service URL that has not replied since it last failed
    number: int = 0  # from 1 on, in the order in which this gateway learned of the stage's instances
    routes: int = 0  # open routes that use it
    free_tokens: int | None = None  # KV tokens that can be reserved there, by its last reply; None: unknown
    boot: str = ""  # name with a nonce of its boot, by its last reply
    # What its boot makes of lineages: of the input (empty at the first stage) → of its KV and the hidden states that it sends.
    lineages: dict[str, str] = field(default_factory=dict)
    prompts: FifoLock = field(default_factory=FifoLock)  # for events with prompt chunks: a decode waits for at most one
    in_flight: InFlight = field(default_factory=InFlight)  # forward events of this gateway
    templates: dict[str, RequestTemplate] = field(default_factory=dict)  # by event type; see StageClient
    failures: int = 0  # since its last reply
    suspended_until: float = 0.0  # in time.monotonic()
    # Decaying sums over its passes: their seconds, and those of the stage's quickest passes of that size.
    pass_seconds: float = 0.0
    quickest_seconds: float = 0.0
    paced_at: float = 0.0  # its last pass, in time.monotonic()
    slow: bool = False  # its pace has reached SLOW_FROM, and has not fallen below _QUICK_BELOW since

    def suspended(self, now: float) -> bool:
        """Whether events to the instance would probably fail, because it failed recently. `now` is in time.monotonic()."""
        return now < self.suspended_until

    def usable(self, now: float) -> bool:
        return self.ready and self.awake and not self.terminating and not self.suspended(now)

    def lacks(self, reserve_tokens: int) -> bool:
        """Whether the instance, by its last reply, has fewer free KV tokens than `reserve_tokens`."""
        return self.free_tokens is not None and self.free_tokens < reserve_tokens

    def replied(self, boot: str, free_tokens: int | None, before: str = "", lineage: str = "") -> None:
        """Records a reply of the instance.

        `before` is the lineage of the input, and `lineage` that of what was computed from it. If `lineage` is empty, the reply
        did not state it.
        """
        self.failures = 0
        if boot != self.boot or len(self.lineages) > _MOST_LINEAGES:
            self.lineages.clear()
        self.boot = boot
        if lineage:
            self.lineages[before] = lineage
        if free_tokens is not None:
            self.free_tokens = free_tokens

    def passed(self, seconds: float, quickest_seconds: float, now: float) -> None:
        """Records a forward pass that took `seconds`, and updates `slow`.

        `quickest_seconds` is the time of a pass of that size at the stage's quickest instance. `now` is in time.monotonic().
        """
        if now - self.paced_at > _PACE_SECONDS:
            self.pass_seconds = self.quickest_seconds = _FIRST_PASSES * quickest_seconds
            self.slow = False
        self.pass_seconds = _PACE_DECAY * self.pass_seconds + min(seconds, _MOST_SLOWNESS * quickest_seconds)
        self.quickest_seconds = _PACE_DECAY * self.quickest_seconds + quickest_seconds
        self.paced_at = now
        self.slow = self.pace >= (_QUICK_BELOW if self.slow else SLOW_FROM)

    @property
    def pace(self) -> float:
        """How many times as long the last passes took as the stage's quickest passes of their sizes.

        Jitter of short passes hardly counts.
        """
        passes = _SHORT_PASS_SECONDS / (1 - _PACE_DECAY)
        return (self.pass_seconds + passes) / (self.quickest_seconds + passes)

    def suspend(self, now: float) -> None:
        """Gives the instance no work for a while. The time gets longer with each failure.

        Failures during a suspension are not counted, because these events were under way already. A pod may die with many
        events in hand and be back at once.
        """
        if self.suspended(now):
            return
        pause = min(LONGEST_SUSPENSION_SECONDS, FIRST_SUSPENSION_SECONDS * 2 ** min(self.failures, 16))
        self.suspended_until = now + pause * random.uniform(0.75, 1.25)
        self.failures += 1


@dataclass(frozen=True, slots=True)
class Held:
    """How many tokens of a prefix chain are probably cached, and at which instance of each stage."""

    tokens: int = 0
    instances: tuple[Instance, ...] = ()

    def at(self, instance: Instance) -> int:
        """Returns how many tokens of the prefix `instance` has probably cached."""
        return self.tokens if self.instances and self.instances[instance.stage] is instance else 0


NOTHING: Final = Held()


class Route:
    """One instance per stage. Each instance counts the routes that use it until they are closed."""

    def __init__(self, instances: Iterable[Instance]) -> None:
        self.instances = tuple(instances)
        for instance in self.instances:
            instance.routes += 1

    def replace(self, instance: Instance) -> Instance:
        """Puts `instance` on the route in place of the present instance of its stage. Returns the replaced instance."""
        left = self.instances[instance.stage]
        left.routes -= 1
        instance.routes += 1
        self.instances = (*self.instances[: instance.stage], instance, *self.instances[instance.stage + 1 :])
        return left

    def close(self) -> None:
        for instance in self.instances:
            instance.routes -= 1


class Placement:
    """Knows the instances of all stages, and chooses routes over them."""

    def __init__(self, service_urls: Sequence[str], *, watched: bool, pods_only: bool = False) -> None:
        """`service_urls` has the URL of one Service per stage.

        If `watched`, an EndpointsWatch will report instances by `update`. If not, the Service URLs stand for the instances,
        asleep until they reply. If `pods_only`, Service URLs never stand for instances, because requests to them are not
        encrypted.
        """
        self.service_urls = tuple(service_urls)
        self._pods_only = pods_only
        self.num_stages = len(service_urls)
        self.stages: list[dict[str, Instance]] = [{} for _ in service_urls]  # all known instances of each, by URL
        self._current: list[list[Instance]] = [[] for _ in service_urls]  # ready, of the newest revision that has any
        self._numbers = [count(1) for _ in service_urls]
        for stage in () if watched else range(len(service_urls)):
            self.unwatched(stage)

    def update(self, stage: int, endpoints: Iterable[Endpoint]) -> None:
        """Replaces the known instances of `stage` by those that the watch reports.

        Instances that the watch no longer reports count as terminating, so that routes leave them.
        """
        known = self.stages[stage]
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
        """Makes routes use the Service URL of `stage` until `update` is called. Call it if the instances cannot be known.

        If `pods_only`, the stage has no instances instead.
        """
        url = self.service_urls[stage]
        if self._pods_only:
            self.stages[stage].clear()
            self._choose_current(stage)
        elif url not in self.stages[stage]:
            self._add(stage, Instance(stage, url, is_service=True, awake=False))
            self._choose_current(stage)

    def usable(self, stage: int) -> list[Instance]:
        """Returns the instances of `stage` that may be given work now."""
        now = time.monotonic()
        return [instance for instance in self._current[stage] if instance.usable(now)]

    def ready_counts(self) -> list[int]:
        """Returns per stage how many ready instances of the newest revision it has. 0 if the stage is not watched."""
        return [len([each for each in current if not each.is_service]) for current in self._current]

    def cold(self) -> list[int]:
        """Returns the stages that must be woken: none of their instances is ready and awake."""
        return [stage for stage, current in enumerate(self._current) if not any(each.awake for each in current)]

    def woken(self, stage: int) -> None:
        """Records that the Service URL of `stage` replied, so that routes may use it."""
        for instance in self.stages[stage].values():
            if instance.is_service:
                instance.awake, instance.failures, instance.suspended_until = True, 0, 0.0

    def avoid(self, instance: Instance) -> None:
        """Suspends an instance after a failed request. A Service URL also has to be woken again before it is used."""
        instance.suspend(time.monotonic())
        instance.awake = not instance.is_service

    def place(self, reserve_tokens: int, held: Held = NOTHING) -> Route | None:
        """Returns a new route over the least used instances, or None if a stage has no usable instance.

        Instances with enough memory come first. An instance that is n times as slow as its peers gets a route when they have n
        times as many. Of equals, the one that is known for longest is chosen, because the others leave first (a ReplicaSet
        deletes its youngest pods).

        `held` says which instances have cached tokens. Cached tokens weigh at most as much as one route: an instance with two
        routes more than another would give one away again.
        """
        chosen = [self.least_used(stage, reserve_tokens, held) for stage in range(self.num_stages)]
        instances = [instance for instance in chosen if instance is not None]
        return Route(instances) if len(instances) == self.num_stages else None

    def least_used(self, stage: int, reserve_tokens: int = 0, held: Held = NOTHING) -> Instance | None:
        usable = self.usable(stage)
        slowness = slowness_of(usable)

        def load(instance: Instance) -> tuple[bool, float, bool]:
            saved = held.at(instance)
            routes = (instance.routes + 1) * slowness.get(instance.url, 1.0)
            return instance.lacks(reserve_tokens), routes - min(1.0, saved / TOKENS_OF_A_ROUTE), not saved

        return min(usable, key=load, default=None)

    def free_tokens(self) -> float:
        """Returns the largest reservation, in tokens, for which each stage has a usable instance, by the last replies.

        Infinity if that is unknown.
        """
        free = [[instance.free_tokens for instance in self.usable(stage)] for stage in range(self.num_stages)]
        return min(max((math.inf if tokens is None else tokens for tokens in stage), default=0) for stage in free)

    def must_leave(self, route: Route) -> Instance | None:
        """Returns the instance that shall replace an instance of `route` that terminates or is not ready.

        None if the route has no such instance, or its stage has no other.
        """
        for instance in route.instances:
            if instance.terminating or not instance.ready:
                target = self.least_used(instance.stage)
                if target is not None and target is not instance:
                    return target
        return None

    def strands(self, route: Route) -> bool:
        """Whether an instance of `route` terminates and its stage has no other ready instance. That stage has to be woken."""
        return bool([each for each in route.instances if each.terminating and not self._current[each.stage]])

    def outdated(self, route: Route) -> bool:
        """Whether a stage has instances of a newer revision that take work, and `route` still uses an older one."""
        for instance in route.instances:
            current = self._current[instance.stage]
            if instance.ready and current and instance not in current:
                return True
        return False

    def unbalanced(self, stage: int) -> tuple[Instance, Instance] | None:
        """Returns two instances of `stage` of which the first has so many more routes that it should give one to the second.

        None if the stage is balanced. Giving one route away never makes them unbalanced the other way round.
        """
        usable = self.usable(stage) if len(self._current[stage]) > 1 else ()
        if len(usable) > 1:
            slowness = slowness_of(usable)
            least = min(usable, key=lambda each: (each.routes + 1) * slowness.get(each.url, 1.0))
            most = max(usable, key=lambda each: each.routes * slowness.get(each.url, 1.0))
            more, less = most.routes * slowness.get(most.url, 1.0), (least.routes + 1) * slowness.get(least.url, 1.0)
            if more - less >= REBALANCE_AT - 1:
                return most, least
        return None

    def slowness(self, route: Route) -> float:
        """Returns how slow the route's slowest instance is: its pass time divided by that of its stage's quickest instance.

        Returns 1 if no instance of the route is slow.
        """
        if not any(instance.slow for instance in route.instances):
            return 1.0
        return max([slowness_of(self._current[each.stage]).get(each.url, 1.0) for each in route.instances])

    def next_resumption(self, now: float) -> float:
        """Returns when the next suspension of an instance ends, in time.monotonic(). Infinity if no instance is suspended."""
        ends = [each.suspended_until for known in self.stages for each in known.values() if each.suspended_until > now]
        return min(ends, default=math.inf)

    def _add(self, stage: int, instance: Instance) -> Instance:
        instance.number = next(self._numbers[stage])
        self.stages[stage][instance.url] = instance
        return instance

    def _choose_current(self, stage: int) -> None:
        ready = [instance for instance in self.stages[stage].values() if instance.ready and not instance.terminating]
        newest = max([_revision_order(instance.revision) for instance in ready], default=None)
        self._current[stage] = [instance for instance in ready if _revision_order(instance.revision) == newest]


def slowness_of(instances: Sequence[Instance]) -> dict[str, float]:
    """Returns for each slow instance, by URL, its pass time divided by that of the quickest of these instances of a stage."""
    if not any(instance.slow for instance in instances):
        return {}
    since = time.monotonic() - _PACE_SECONDS
    measured = [instance for instance in instances if instance.paced_at >= since]
    quickest = min((instance.pace for instance in measured), default=1.0)
    paces = {instance.url: instance.pace / quickest for instance in measured if instance.slow}
    return {url: pace for url, pace in paces.items() if pace >= _QUICK_BELOW}


def _revision_order(revision: str) -> tuple[int, str]:
    """Returns a key that sorts revisions from old to new, by the number at the end of Knative's names (`stage-0-00002`)."""
    number = re.search(r"-(\d+)$", revision)
    return (int(number[1]) if number else 0, revision)
