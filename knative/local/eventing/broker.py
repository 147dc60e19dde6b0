"""A Broker and a Sequence at work: what takes an event in and starts its deliveries. Knows no HTTP."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from cloudevents.core.v1.event import CloudEvent

from knative.local.eventing.delivery import TTL, Spool, Subscription, with_attributes
from knative.local.eventing.filter import Filter
from knative.local.eventing.targets import Answer

_FIRST_TTL: Final = 255
_ACCEPTED: Final = Answer(HTTPStatus.ACCEPTED)


@dataclass(frozen=True, slots=True)
class Subscriber:
    """A Trigger."""

    name: str
    filter: Filter
    subscription: Subscription


class BrokerInbox:
    """A Target: each event goes to every Trigger whose filter it matches, each delivery on its own. name: its URL."""

    def __init__(self, name: str, spool: Spool) -> None:
        self.name = name
        self.subscribers: list[Subscriber] = []
        self.accepted = 0
        self._spool = spool

    async def deliver(self, event: CloudEvent, timeout_seconds: float | None = None) -> Answer:
        ttl = str(event.get_extension(TTL) or "")
        left = int(ttl) - 1 if ttl.isdecimal() else _FIRST_TTL
        if left <= 0:
            return Answer(
                HTTPStatus.BAD_REQUEST, b"the event came back too often: does a Trigger's reply match its own filter?"
            )
        marked = with_attributes(event, {TTL: str(left)})
        self.accepted += 1
        for subscriber in self.subscribers:
            if subscriber.filter(event):
                self._spool.start(subscriber.subscription.run(marked))
        return _ACCEPTED


class StepInbox:
    """A Target: the channel in front of one step of a Sequence, whose reply goes to the channel of the next. name: a URL."""

    def __init__(self, name: str, step: Subscription, spool: Spool) -> None:
        self.name = name
        self.step = step
        self._spool = spool

    async def deliver(self, event: CloudEvent, timeout_seconds: float | None = None) -> Answer:
        self._spool.start(self.step.run(event))
        return _ACCEPTED
