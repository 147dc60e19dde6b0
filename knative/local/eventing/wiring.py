"""Objects of Eventing → what takes events in, each with its deliveries: the references between them resolved."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from urllib.parse import urljoin

import aiohttp
from cloudevents.core.v1.event import CloudEvent

from knative.local.errors import UnsupportedManifest
from knative.local.eventing.broker import BrokerInbox, StepInbox, Subscriber
from knative.local.eventing.delivery import Counts, Spool, Subscription
from knative.local.eventing.objects import (
    BROKER,
    SERVICE,
    Broker,
    Delivery,
    Destination,
    EventingObject,
    Sequence,
    Step,
    Trigger,
)
from knative.local.eventing.targets import Answer, FileTarget, HttpTarget, Target


@dataclass(frozen=True, slots=True)
class Connections:
    """What the objects are wired to."""

    base_url: str
    session: aiohttp.ClientSession
    spool: Spool
    find_service: Callable[[str, str], str | None]
    """URL of a Service on this machine, by namespace and name."""
    sinks: Path
    """Folder for the events that go to Services that are not here."""
    counts: defaultdict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))
    """Of each Trigger and step; they outlive a change of the objects."""


def broker_path(namespace: str, name: str) -> str:
    return f"/{namespace}/{name}"


def sequence_path(namespace: str, name: str, step: int = 0) -> str:
    return f"/sequences/{namespace}/{name}" + (f"/{step}" if step else "")


class Wiring:
    """inboxes: by path, what takes events in."""

    def __init__(self, objects: Iterable[EventingObject], around: Connections) -> None:
        """Raises UnsupportedManifest where an object names another that is not here."""
        self.inboxes: dict[str, BrokerInbox | StepInbox] = {}
        self._around = around
        objects = list(objects)
        self._brokers = {(each.namespace, each.name): each for each in objects if isinstance(each, Broker)}
        self._sequences = {(each.namespace, each.name) for each in objects if isinstance(each, Sequence)}
        self._http: dict[tuple[str, bool], HttpTarget] = {}
        for path in (broker_path(*key) for key in self._brokers):
            self.inboxes[path] = BrokerInbox(around.base_url + path, around.spool)
        for each in objects:
            if isinstance(each, Sequence):
                self._wire_sequence(each)
            elif isinstance(each, Trigger):
                self._wire_trigger(each)

    def _wire_sequence(self, sequence: Sequence) -> None:
        paths = [sequence_path(sequence.namespace, sequence.name, index) for index in range(len(sequence.steps))]
        replies = [self._inbox(following) for _, following in pairwise(paths)]
        last = None if sequence.reply is None else self._target(sequence.reply, f"Sequence {sequence.name}")
        for index, (step, path, reply) in enumerate(zip(sequence.steps, paths, [*replies, last], strict=True)):
            name = f"{sequence.namespace}/{sequence.name}[{index}]"
            subscription = self._subscription(name, step, reply, needs_event_replies=False)
            self.inboxes[path] = StepInbox(self._around.base_url + path, subscription, self._around.spool)

    def _wire_trigger(self, trigger: Trigger) -> None:
        broker = self._brokers.get((trigger.namespace, trigger.broker))
        if broker is None:
            raise UnsupportedManifest(f"Trigger {trigger.name}: there is no Broker {trigger.broker!r} in {trigger.namespace}")
        path = broker_path(broker.namespace, broker.name)
        name = f"{trigger.namespace}/{trigger.name}"
        step = Step(trigger.subscriber, _effective(trigger.delivery, broker.delivery))
        subscription = self._subscription(name, step, self._inbox(path), needs_event_replies=True)
        inbox = self.inboxes[path]
        assert isinstance(inbox, BrokerInbox)
        inbox.subscribers.append(Subscriber(name, trigger.filter, subscription))

    def _subscription(self, name: str, step: Step, reply: Target | None, *, needs_event_replies: bool) -> Subscription:
        sink = step.delivery.dead_letter_sink
        return Subscription(
            self._target(step.subscriber, name, needs_event_replies=needs_event_replies),
            reply,
            step.delivery,
            None if sink is None else self._target(sink, name),
            self._around.counts[name],
        )

    def _target(self, destination: Destination, of: str, *, needs_event_replies: bool = False) -> Target:
        key = (destination.namespace, destination.name)
        if destination.kind is None:
            return self._http_target(destination.uri or "", needs_event_replies)
        if destination.kind == SERVICE:
            url = self._around.find_service(*key)
            if url is None:
                return FileTarget(self._around.sinks / f"events-{destination.name}.jsonl")
            return self._http_target(urljoin(url, destination.uri or "/"), needs_event_replies)
        if key not in (self._brokers if destination.kind == BROKER else self._sequences):
            raise UnsupportedManifest(f"{of}: there is no {destination}")
        return self._inbox((broker_path if destination.kind == BROKER else sequence_path)(*key))

    def _http_target(self, url: str, needs_event_replies: bool) -> HttpTarget:
        """One for each URL, so that its limit holds for all who deliver there."""
        key = (url, needs_event_replies)
        if key not in self._http:
            self._http[key] = HttpTarget(self._around.session, url, needs_event_replies=needs_event_replies)
        return self._http[key]

    def _inbox(self, path: str) -> "_InboxReference":
        return _InboxReference(self._around.base_url + path, path, self.inboxes)


class _InboxReference:
    """A Target that is looked up when an event comes: objects may name each other in any order."""

    def __init__(self, name: str, path: str, inboxes: Mapping[str, Target]) -> None:
        self.name = name
        self._path = path
        self._inboxes = inboxes

    async def deliver(self, event: CloudEvent, timeout_seconds: float | None) -> Answer:
        return await self._inboxes[self._path].deliver(event, timeout_seconds)


def _effective(own: Delivery | None, brokers: Delivery | None) -> Delivery:
    """A Trigger's own delivery counts, but for a dead letter sink that only its Broker has."""
    if own is None or brokers is None or own.dead_letter_sink is not None:
        return own or brokers or Delivery()
    return Delivery(own.retry, own.policy, own.backoff_seconds, own.timeout_seconds, brokers.dead_letter_sink)
