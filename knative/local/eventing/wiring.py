"""Connects Brokers, Triggers and Sequences: an inbox receives events at a URL, and subscriptions deliver them to subscribers.

Each Broker and each step of a Sequence has an inbox, which stands for its ingress or channel in Knative. Each Trigger and each
step has a subscription.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final
from urllib.parse import urljoin

import aiohttp
from cloudevents.core.v1.event import CloudEvent

from knative.local.errors import UnsupportedManifest
from knative.local.eventing.delivery import TTL, Counts, Spool, Subscription, with_attributes
from knative.local.eventing.objects import (
    BROKER,
    SERVICE,
    Broker,
    Delivery,
    Destination,
    EventingObject,
    EventSequence,
    Filter,
    Trigger,
)
from knative.local.eventing.targets import FileTarget, HttpTarget, Target, TargetReply

_FIRST_TTL: Final = 255
_ACCEPTED: Final = TargetReply(HTTPStatus.ACCEPTED)


@dataclass(frozen=True, slots=True)
class Subscriber:
    """A Trigger as its Broker uses it: a filter, and the subscription that delivers matching events."""

    name: str
    filter: Filter
    subscription: Subscription


class BrokerInbox:
    """The Target that stands for one Broker: receives events and starts a delivery for each Trigger with a matching filter."""

    def __init__(self, url: str, spool: Spool) -> None:
        self.name = url
        self.subscribers: list[Subscriber] = []
        self.accepted = 0
        self._spool = spool

    async def deliver(
        self, event: CloudEvent, timeout_seconds: float | None = None, *, prefer_reply: bool = False
    ) -> TargetReply:
        ttl = str(event.get_extension(TTL) or "")
        left = int(ttl) - 1 if ttl.isdecimal() else _FIRST_TTL
        if left <= 0:
            return TargetReply(
                HTTPStatus.BAD_REQUEST, b"the event came back too often: does a Trigger's reply match its own filter?"
            )
        marked = with_attributes(event, {TTL: str(left)})
        self.accepted += 1
        for subscriber in self.subscribers:
            if subscriber.filter(event):
                self._spool.start(subscriber.subscription.run(marked))
        return _ACCEPTED


class StepInbox:
    """Receives the events of one step of a Sequence, in place of Knative's channel, and starts their delivery. It is a Target.

    The step's reply goes to the inbox of the next step.
    """

    def __init__(self, url: str, spool: Spool) -> None:
        self.name = url
        self.step: Subscription  # set before the first event comes
        self._spool = spool

    async def deliver(
        self, event: CloudEvent, timeout_seconds: float | None = None, *, prefer_reply: bool = False
    ) -> TargetReply:
        self._spool.start(self.step.run(event))
        return _ACCEPTED


@dataclass(frozen=True, slots=True)
class EventingContext:
    """What all Brokers, Triggers and Sequences of a platform share."""

    base_url: str
    session: aiohttp.ClientSession
    spool: Spool
    find_service: Callable[[str, str], str | None]  # (namespace, name) → URL of a Service on this machine, None: not here
    sinks: Path  # folder for events to Services that are not on this machine
    # By the name of a Trigger or step; they go on when objects change.
    counts: defaultdict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))


def broker_path(namespace: str, name: str) -> str:
    return f"/{namespace}/{name}"


def sequence_path(namespace: str, name: str, step: int = 0) -> str:
    return f"/sequences/{namespace}/{name}" + (f"/{step}" if step else "")


class Wiring:
    """Connects all Brokers, Triggers and Sequences of a platform to each other and to their subscribers.

    `inboxes` maps the path of each URL that takes events to what receives them there: a Broker or a step of a Sequence.
    """

    def __init__(self, objects: Iterable[EventingObject], context: EventingContext) -> None:
        """objects: every Broker, Trigger and Sequence, because a new Wiring takes nothing from an older one.

        Raises UnsupportedManifest if one refers to a Broker or Sequence that is missing.
        """
        self.inboxes: dict[str, BrokerInbox | StepInbox] = {}
        self._context = context
        objects = list(objects)
        self._brokers = {(each.namespace, each.name): each for each in objects if isinstance(each, Broker)}
        self._http: dict[tuple[str, bool], HttpTarget] = {}
        for path in (broker_path(*key) for key in self._brokers):
            self.inboxes[path] = BrokerInbox(context.base_url + path, context.spool)
        for sequence in (each for each in objects if isinstance(each, EventSequence)):
            for index in range(len(sequence.steps)):
                path = sequence_path(sequence.namespace, sequence.name, index)
                self.inboxes[path] = StepInbox(context.base_url + path, context.spool)
        for each in objects:
            if isinstance(each, EventSequence):
                self._wire_sequence(each)
            elif isinstance(each, Trigger):
                self._wire_trigger(each)

    def _wire_sequence(self, sequence: EventSequence) -> None:
        key, count = (sequence.namespace, sequence.name), len(sequence.steps)
        inboxes = [self.inboxes[sequence_path(*key, index)] for index in range(count)]
        last = None if sequence.reply is None else self._target(sequence.reply, f"Sequence {sequence.name}")
        for index, (step, inbox, reply) in enumerate(zip(sequence.steps, inboxes, [*inboxes[1:], last], strict=True)):
            name = f"{sequence.namespace}/{sequence.name}[{index}]"
            assert isinstance(inbox, StepInbox)
            inbox.step = self._subscription(name, step.subscriber, step.delivery, reply, needs_event_replies=False)

    def _wire_trigger(self, trigger: Trigger) -> None:
        broker = self._brokers.get((trigger.namespace, trigger.broker))
        if broker is None:
            raise UnsupportedManifest(f"Trigger {trigger.name}: there is no Broker {trigger.broker!r} in {trigger.namespace}")
        name, inbox = f"{trigger.namespace}/{trigger.name}", self.inboxes[broker_path(broker.namespace, broker.name)]
        delivery = _effective(trigger.delivery, broker.delivery)
        subscription = self._subscription(name, trigger.subscriber, delivery, inbox, needs_event_replies=True)
        assert isinstance(inbox, BrokerInbox)
        inbox.subscribers.append(Subscriber(name, trigger.filter, subscription))

    def _subscription(
        self, name: str, subscriber: Destination, delivery: Delivery, reply: Target | None, *, needs_event_replies: bool
    ) -> Subscription:
        sink = delivery.dead_letter_sink
        return Subscription(
            self._target(subscriber, name, needs_event_replies=needs_event_replies),
            reply,
            delivery,
            None if sink is None else self._target(sink, name),
            self._context.counts[name],
        )

    def _target(self, destination: Destination, of: str, *, needs_event_replies: bool = False) -> Target:
        key = (destination.namespace, destination.name)
        if destination.kind is None:
            return self._http_target(destination.uri or "", needs_event_replies)
        if destination.kind == SERVICE:
            url = self._context.find_service(*key)
            if url is None:
                return FileTarget(self._context.sinks / f"events-{destination.name}.jsonl")
            return self._http_target(urljoin(url, destination.uri or "/"), needs_event_replies)
        inbox = self.inboxes.get((broker_path if destination.kind == BROKER else sequence_path)(*key))
        if inbox is None:
            raise UnsupportedManifest(f"{of}: there is no {destination}")
        return inbox

    def _http_target(self, url: str, needs_event_replies: bool) -> HttpTarget:
        """The only target for a URL, so that its limit on concurrent deliveries holds for all senders together."""
        key = (url, needs_event_replies)
        if key not in self._http:
            self._http[key] = HttpTarget(self._context.session, url, needs_event_replies=needs_event_replies)
        return self._http[key]


def _effective(own: Delivery | None, brokers: Delivery | None) -> Delivery:
    """The rules of delivery for a Trigger: those of the Trigger, else those of its Broker.

    Rules of a Trigger that name no dead letter sink get the Broker's.
    """
    if own is None or brokers is None or own.dead_letter_sink is not None:
        return own or brokers or Delivery()
    return Delivery(own.retry, own.policy, own.backoff_seconds, own.timeout_seconds, brokers.dead_letter_sink)
