"""Knative Eventing on one machine: the Brokers, Triggers and Sequences of a cluster, from the same YAML.

Everything is in memory, as with Eventing's InMemoryChannel, whatever channel a manifest names: deliveries in progress when the
platform stops are lost. Events to a Service that is not on this machine are written into a file.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import aiohttp

from eventing.http.binding import from_http
from eventing.problems import Problem
from knative.local.eventing.delivery import Spool, Subscription
from knative.local.eventing.objects import EventingObject, read_eventing_object
from knative.local.eventing.wiring import BrokerInbox, EventingContext, StepInbox, Wiring, broker_path
from knative.local.http.messages import HttpError
from knative.local.http.server import Exchange, HttpServer, read_body

_log = logging.getLogger(__name__)

MAX_EVENT_BYTES: Final = 2**20  # as a Kafka topic's default; larger payloads go by reference, see `eventing.claim_check`
MAX_DELIVERIES: Final = 1000  # in progress at once; beyond it events from outside are refused with 429


class LocalEventing:
    """Runs Brokers, Triggers and Sequences on one HTTP port, in one event loop.

    Clients send events by `POST /namespace/broker` and `POST /sequences/namespace/name`. The answer is 202 as soon as a
    delivery has begun. find_service: maps (namespace, name) to the URL of a Service on this machine, None if there is none.
    sinks: folder in which events to other Services are written. max_deliveries: more at once are refused with 429.
    """

    def __init__(
        self, find_service: Callable[[str, str], str | None], sinks: Path, max_deliveries: int = MAX_DELIVERIES
    ) -> None:
        self._find_service = find_service
        self._sinks = sinks
        self._max_deliveries = max_deliveries
        self._spool = Spool()
        self._server = HttpServer(self._serve)
        self._context: EventingContext | None = None
        self._wiring: Wiring | None = None
        self._objects: dict[tuple[type, str, str], EventingObject] = {}

    async def apply(self, manifests: Iterable[Mapping[str, Any]]) -> None:
        """Creates or changes Brokers, Triggers and Sequences; other kinds are ignored. The port opens with the first of them.

        Raises UnsupportedManifest, which names object and field.
        """
        found = [each for each in map(read_eventing_object, manifests) if each is not None]
        if not found:
            return
        if self._context is None:
            await self._server.start()
            # HttpTarget limits the connections to each URL.
            session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
            self._context = EventingContext(self._server.url, session, self._spool, self._find_service, self._sinks)
        objects = self._objects | {(type(each), each.namespace, each.name): each for each in found}
        self._wiring = Wiring(objects.values(), self._context)
        self._objects = objects

    async def stop(self) -> None:
        """Refuses new events and drops the deliveries in progress."""
        dropped = await self._spool.close()
        if dropped:
            _log.warning("%d deliveries were still in progress and are lost", dropped)
        self._server.close()
        if self._context is not None:
            await self._context.session.close()

    def broker_url(self, name: str, namespace: str = "default") -> str:
        return self._server.url + broker_path(namespace, name)

    def status(self) -> dict[str, Any]:
        """Deliveries in progress, counts of every Broker, Trigger and step, for `/status`. Empty before the first `apply`."""
        if self._wiring is None:
            return {}
        brokers, steps = [], []
        for inbox in self._wiring.inboxes.values():
            if isinstance(inbox, StepInbox):
                steps.append({"url": inbox.name, **_subscription_status(inbox.step)})
            else:
                triggers = [{"name": each.name, **_subscription_status(each.subscription)} for each in inbox.subscribers]
                brokers.append({"url": inbox.name, "accepted": inbox.accepted, "triggers": triggers})
        return {"in_progress": len(self._spool), "brokers": brokers, "steps": steps}

    async def _serve(self, exchange: Exchange) -> None:
        path = exchange.target.decode("latin-1").partition("?")[0].rstrip("/")
        inbox: BrokerInbox | StepInbox | None = None if self._wiring is None else self._wiring.inboxes.get(path)
        if inbox is None:
            raise HttpError(HTTPStatus.NOT_FOUND, "there is no such Broker or Sequence; python -m knative status lists them")
        if exchange.method != b"POST":
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "events come by POST")
        self._check_capacity()
        too_long = f"an event has at most {MAX_EVENT_BYTES} bytes here; send a reference to more (dataref)"
        body = await read_body(exchange, MAX_EVENT_BYTES, too_long)
        headers = [(name.decode("latin-1"), value.decode("utf-8", "replace")) for name, value in exchange.headers]
        try:
            event = from_http(headers, body)
        except Problem as problem:
            raise HttpError(HTTPStatus.BAD_REQUEST, str(problem)) from problem
        self._check_capacity()
        reply = await inbox.deliver(event, None)
        exchange.respond(HTTPStatus(reply.status), reply.body)

    def _check_capacity(self) -> None:
        if self._spool.closed:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "the broker is stopping")
        # Replies and steps are never refused: each follows an event that was in progress.
        if len(self._spool) >= self._max_deliveries:
            raise HttpError(HTTPStatus.TOO_MANY_REQUESTS, f"{len(self._spool)} deliveries are in progress already; try later")


def _subscription_status(subscription: Subscription) -> dict[str, Any]:
    return {"subscriber": subscription.subscriber.name, **asdict(subscription.counts)}
