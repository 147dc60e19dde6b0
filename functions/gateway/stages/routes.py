"""Routes: one instance for each stage, chosen by the gateway. Session affinity on stock Knative.

Not thread-safe: the scheduler's lock guards everything here.
"""

import math
import re
import time
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Final

from eventing.wire.control import MAX_PEERS
from functions.gateway.stages.instances import Endpoint, Instance
from functions.gateway.stages.where_held import NOTHING, Held

TOKENS_OF_A_ROUTE: Final = 512  # held by an instance, they are worth one route: it may carry one more than others
REBALANCE_AT: Final = 2  # an instance that carries so many routes more than another gives one away


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
