"""Routes: one instance for each stage, chosen by the gateway. Session affinity on stock Knative.

Not thread-safe: the scheduler's lock is held around everything here.
"""

import re
import time
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Final

from eventing.wire.control import MOST_PEERS
from functions.gateway.stages.instances import Endpoint, Instance
from functions.gateway.stages.where_held import NOTHING, Held

TOKENS_OF_A_ROUTE: Final = 512
"""Held at an instance they are worth one route: it may carry one more than others."""
REBALANCE_AT: Final = 2
"""An instance that carries so many routes more than another gives one away."""


def uneven(most_routes: int, least_routes: int) -> bool:
    """At two instances of a stage: the one with the most gives one away to the one with the least."""
    return most_routes - least_routes >= REBALANCE_AT


class Route:
    """One instance per stage, counted at each of them until it is closed."""

    def __init__(self, instances: Iterable[Instance]) -> None:
        self.instances = tuple(instances)
        for instance in self.instances:
            instance.routes += 1

    def replace(self, instance: Instance) -> Instance:
        """Goes through `instance` from now on; returns the one that it left."""
        left = self.instances[instance.stage]
        left.routes -= 1
        instance.routes += 1
        self.instances = (*self.instances[: instance.stage], instance, *self.instances[instance.stage + 1 :])
        return left

    def suspended(self, now: float) -> bool:
        """Some instance is."""
        return any(instance.suspended(now) for instance in self.instances)

    def lacks(self, reserve_tokens: int) -> bool:
        """Some instance has said that it has not so much memory."""
        return any(_lacks(instance, reserve_tokens) for instance in self.instances)

    def close(self) -> None:
        for instance in self.instances:
            instance.routes -= 1


class Placement:
    """The instances of all stages, and which of them a route shall use."""

    def __init__(self, service_urls: Sequence[str], *, watched: bool) -> None:
        """service_urls: per stage. Without a watch they are the instances themselves, asleep until they reply."""
        self.service_urls = tuple(service_urls)
        self._stages: list[dict[str, Instance]] = [{} for _ in service_urls]
        self._numbers = [count(1) for _ in service_urls]
        for stage in () if watched else range(len(service_urls)):
            self.unwatched(stage)

    @property
    def num_stages(self) -> int:
        return len(self._stages)

    def update(self, stage: int, endpoints: Iterable[Endpoint]) -> None:
        """All that the watch knows of `stage`. Instances that it no longer knows are gone: routes leave them."""
        known = self._stages[stage]
        seen = {endpoint.url: endpoint for endpoint in endpoints}
        for url in known.keys() - seen.keys():
            instance = known.pop(url)
            instance.ready, instance.terminating = False, True
        for url, endpoint in seen.items():
            instance = known.get(url) or self._add(stage, Instance(stage, url))
            instance.revision = endpoint.revision
            instance.ready, instance.terminating = endpoint.ready, endpoint.terminating

    def unwatched(self, stage: int) -> None:
        """Nobody may watch `stage`, or nobody can: routes go by what its Service URL says, until `update` knows better."""
        url = self.service_urls[stage]
        if url not in self._stages[stage]:
            self._add(stage, Instance(stage, url, is_service=True, awake=False))

    def instances(self, stage: int) -> list[Instance]:
        """All that are known of `stage`, whether they take work or not."""
        return list(self._stages[stage].values())

    def ready_counts(self) -> list[int]:
        """Per stage: instances of the current revision that take work; 0 where there is no watch, so that it is unknown."""
        return [sum(not i.is_service for i in self._current(stage)) for stage in range(self.num_stages)]

    def cold(self) -> list[int]:
        """Stages that must be woken: none of their instances is ready and awake."""
        return [stage for stage in range(self.num_stages) if not any(i.awake for i in self._current(stage))]

    def woken(self, stage: int) -> None:
        """The Service URL of `stage` replied."""
        for instance in self._stages[stage].values():
            if instance.is_service:
                instance.awake, instance.failures, instance.suspended_until = True, 0, 0.0

    def avoid(self, instance: Instance) -> None:
        """A request to `instance` failed. A Service URL has to be woken again, an instance is suspended for a while."""
        instance.suspend(time.monotonic())
        instance.awake = not instance.is_service

    def place(self, reserve_tokens: int, held: Held = NOTHING) -> Route | None:
        """A new route over the instances with the fewest routes, those with memory first; None where a stage has none now.

        held: what there is less to compute at. It weighs as much as one route more, at most: a second one would be moved away.
        """
        chosen = [self.least_used(stage, reserve_tokens, held) for stage in range(self.num_stages)]
        instances = [instance for instance in chosen if instance is not None]
        return Route(instances) if len(instances) == self.num_stages else None

    def least_used(self, stage: int, reserve_tokens: int = 0, held: Held = NOTHING) -> Instance | None:
        def load(instance: Instance) -> tuple[bool, float, bool]:
            saved = held.at(instance)
            return _lacks(instance, reserve_tokens), instance.routes - min(1.0, saved / TOKENS_OF_A_ROUTE), not saved

        return min(self.usable(stage), key=load, default=None)

    def has_room(self, stage: int, reserve_tokens: int) -> bool:
        """Some instance of `stage` has not said that it has less memory."""
        return any(not _lacks(instance, reserve_tokens) for instance in self.usable(stage))

    def must_leave(self, route: Route) -> Instance | None:
        """Where `route` shall go instead of an instance that is terminating or no longer ready; None: it can stay, or must."""
        for instance in route.instances:
            if instance.terminating or not instance.ready:
                target = self.least_used(instance.stage)
                if target is not None and target is not instance:
                    return target
        return None

    def leaving(self, instance: Instance) -> tuple[str, ...]:
        """URLs of instances of the same stage that are on their way out and still answer."""
        others = self._stages[instance.stage].values()
        urls = [other.url for other in others if other.terminating and not other.is_service and other is not instance]
        return tuple(urls[:MOST_PEERS])

    def strands(self, route: Route) -> bool:
        """An instance of `route` is on its way out and nobody stands by: the stage has to be woken."""
        return any(instance.terminating and not self._current(instance.stage) for instance in route.instances)

    def outdated(self, route: Route) -> bool:
        """A newer revision takes work in place of one of its instances."""
        return any(
            bool(current := self._current(instance.stage)) and instance not in current
            for instance in route.instances
            if instance.ready
        )

    def unbalanced(self) -> tuple[Instance, Instance] | None:
        """(from, to): an instance with so many routes more than another that one should move; None where all is well."""
        for stage in range(self.num_stages):
            usable = self.usable(stage)
            if len(usable) > 1:
                least = min(usable, key=lambda instance: instance.routes)
                most = max(usable, key=lambda instance: instance.routes)
                if uneven(most.routes, least.routes):
                    return most, least
        return None

    def next_resumption(self) -> float | None:
        """When the next suspension ends, in time.monotonic(); None where none is pending."""
        now = time.monotonic()
        ends = (i.suspended_until for known in self._stages for i in known.values() if i.suspended(now))
        return min(ends, default=None)

    def _add(self, stage: int, instance: Instance) -> Instance:
        instance.number = next(self._numbers[stage])
        self._stages[stage][instance.url] = instance
        return instance

    def usable(self, stage: int) -> list[Instance]:
        """Those that may be given work now."""
        now = time.monotonic()
        return [instance for instance in self._current(stage) if instance.usable(now)]

    def _current(self, stage: int) -> list[Instance]:
        """The ready instances of the newest revision that has any."""
        ready = [instance for instance in self._stages[stage].values() if instance.ready and not instance.terminating]
        newest = max((_revision_order(instance.revision) for instance in ready), default=None)
        return [instance for instance in ready if _revision_order(instance.revision) == newest]


def _lacks(instance: Instance, reserve_tokens: int) -> bool:
    return instance.free_tokens is not None and instance.free_tokens < reserve_tokens


def _revision_order(revision: str) -> tuple[int, str]:
    """Knative numbers revisions: `stage-0-00002`."""
    number = re.search(r"-(\d+)$", revision)
    return (int(number[1]) if number else 0, revision)
