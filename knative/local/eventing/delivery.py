"""Delivers an event to its subscriber as Knative's dispatcher does: with retries, then the reply, or a dead letter.

A delivery is retried after 404, 408, 409, 429, 5xx or no reply; every other status except 2xx is final. A dead letter is the
original event with `knativeerrordest`, `knativeerrorcode` and `knativeerrordata`, the last reply's body in base64 and cut off.
"""

import asyncio
import base64
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from cloudevents.core.v1.event import CloudEvent

from eventing.wire.cloud_event import checked_event
from knative.local.eventing.objects import Delivery
from knative.local.eventing.targets import NoReply, Target, TargetReply

# Attribute that counts how often replies to an event may still return to a Broker; subscribers do not see it.
TTL: Final = "knativebrokerttl"
_RETRIED: Final = frozenset({404, 408, 409, 429})
_MAX_ERROR_DATA: Final = 1024

_log = logging.getLogger(__name__)


class Undeliverable(Exception):
    """A delivery failed at its last attempt, or with a final status. `attributes`: those that the dead letter adds."""

    def __init__(self, destination: str, status: int, body: bytes) -> None:
        super().__init__(f"{destination} answered {status}: {body[:200].decode(errors='replace')}")
        self.attributes = {
            "knativeerrordest": destination,
            "knativeerrorcode": str(status),
            "knativeerrordata": base64.b64encode(body).decode()[:_MAX_ERROR_DATA],
        }


@dataclass(slots=True)
class Counts:
    """How the deliveries of one Trigger, or of one step of a Sequence, have ended. Counts of events, except for retries."""

    delivered: int = 0
    retries: int = 0  # attempts, not events
    dead_letters: int = 0
    lost: int = 0  # undeliverable, and there was no dead letter sink or the delivery to it failed too


class Subscription:
    """The subscriber of a Trigger or of a step of a Sequence, the target of its replies, and the rules of delivery."""

    def __init__(
        self, subscriber: Target, reply: Target | None, delivery: Delivery, dead_letter_sink: Target | None, counts: Counts
    ) -> None:
        self.subscriber = subscriber
        self.counts = counts
        self._reply = reply
        self._delivery = delivery
        self._dead_letter_sink = dead_letter_sink

    async def run(self, event: CloudEvent) -> None:
        """Delivers the event to the subscriber and the subscriber's reply to its target, or a dead letter if one of them fails.

        Returns when the last of these is delivered or lost. Failures are counted and logged, not raised.
        """
        ttl = event.get_extension(TTL)
        try:
            reply = await self._deliver(with_attributes(event, {TTL: None}), self.subscriber, prefer_reply=True)
            if reply is not None and self._reply is not None:
                await self._deliver(reply if ttl is None else with_attributes(reply, {TTL: str(ttl)}), self._reply)
            self.counts.delivered += 1
        except Undeliverable as error:
            await self._send_dead_letter(event, error)

    async def _deliver(self, event: CloudEvent, target: Target, *, prefer_reply: bool = False) -> CloudEvent | None:
        """Delivers with retries. Returns the event in the target's reply, None if the reply has none. Raises Undeliverable."""
        for retry in range(self._delivery.retry + 1):
            try:
                reply = await target.deliver(event, self._delivery.timeout_seconds, prefer_reply=prefer_reply)
            except NoReply as error:
                reply = TargetReply(HTTPStatus.INTERNAL_SERVER_ERROR, f"dispatch error: {error}".encode())
            if 200 <= reply.status < 300:
                return reply.event
            if retry == self._delivery.retry or not (reply.status >= 500 or reply.status in _RETRIED):
                break
            self.counts.retries += 1
            await asyncio.sleep(self._delivery.pause_seconds(retry))
        raise Undeliverable(target.name, reply.status, reply.body)

    async def _send_dead_letter(self, event: CloudEvent, cause: Undeliverable) -> None:
        if self._dead_letter_sink is not None:
            try:
                await self._deliver(with_attributes(event, cause.attributes), self._dead_letter_sink)
                self.counts.dead_letters += 1
                return
            except Undeliverable as error:
                _log.error("%s %s and its dead letter: %s", event.get_type(), event.get_id(), error)
        self.counts.lost += 1
        _log.error("%s %s is lost: %s", event.get_type(), event.get_id(), cause)


class Spool:
    """All deliveries in progress. They are in memory only: a stop of the platform drops them."""

    def __init__(self) -> None:
        self.closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a delivery failed", exc_info=error)

    async def close(self) -> int:
        """Cancels all deliveries and sets `closed`. Returns how many were in progress."""
        self.closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)


def with_attributes(event: CloudEvent, changes: Mapping[str, str | None]) -> CloudEvent:
    """A copy of the event, sharing its data's memory, with the attributes in `changes` set, or removed if None."""
    attributes = {**event.get_attributes(), **changes}
    return checked_event({name: value for name, value in attributes.items() if value is not None}, event.get_data())
