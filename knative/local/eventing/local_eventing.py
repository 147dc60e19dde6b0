"""Knative Eventing on one machine: the Brokers, Triggers and Sequences of a cluster, from the same YAML.

Everything is in memory, as with Eventing's InMemoryChannel and whatever channel a manifest names: what is on its way when the
platform stops is gone. A Service that is not on this machine is taken for a sink, and what goes there is written into a file.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import aiohttp

from knative.local.eventing.broker import BrokerInbox, StepInbox
from knative.local.eventing.delivery import Spool, Subscription
from knative.local.eventing.ingress import EventIngress
from knative.local.eventing.objects import EventingObject, read_eventing_object
from knative.local.eventing.targets import Target
from knative.local.eventing.wiring import Connections, Wiring, broker_path
from knative.local.http.server import HttpServer

_log = logging.getLogger(__name__)

MAX_DELIVERIES: Final = 1000
"""In progress at once; events from outside are refused with 429 beyond it."""


class LocalEventing:
    """find_service: URL of a Service on this machine by namespace and name. sinks: folder for events that go to others."""

    def __init__(
        self, find_service: Callable[[str, str], str | None], sinks: Path, max_deliveries: int = MAX_DELIVERIES
    ) -> None:
        self._find_service = find_service
        self._sinks = sinks
        self._spool = Spool(max_deliveries)
        self._server = HttpServer(EventIngress(self._find, self._spool).serve)
        self._around: Connections | None = None
        self._wiring: Wiring | None = None
        self._objects: dict[tuple[type, str, str], EventingObject] = {}

    async def apply(self, manifests: Iterable[Mapping[str, Any]]) -> None:
        """Creates or changes what is an object of Eventing; the ingress listens from the first one on.

        Raises UnsupportedManifest, which names object and field.
        """
        found = [each for each in map(read_eventing_object, manifests) if each is not None]
        if not found:
            return
        around = self._around or await self._open()
        objects = self._objects | {(type(each), each.namespace, each.name): each for each in found}
        self._wiring = Wiring(objects.values(), around)
        self._objects = objects

    async def stop(self) -> None:
        """Takes nothing more, and drops what has not been delivered."""
        dropped = await self._spool.close()
        if dropped:
            _log.warning("%d deliveries were still in progress and are gone", dropped)
        self._server.close()
        if self._around is not None:
            await self._around.session.close()

    def broker_url(self, name: str, namespace: str = "default") -> str:
        return f"http://127.0.0.1:{self._server.port}{broker_path(namespace, name)}"

    def status(self) -> dict[str, Any]:
        """Nothing where no object was applied."""
        if self._wiring is None:
            return {}
        inboxes = self._wiring.inboxes.values()
        return {
            "in_progress": len(self._spool),
            "brokers": [_broker_status(each) for each in inboxes if isinstance(each, BrokerInbox)],
            "steps": [{"url": each.name, **_status(each.step)} for each in inboxes if isinstance(each, StepInbox)],
        }

    async def _open(self) -> Connections:
        await self._server.start()
        # As many connections as there are deliveries: HttpTarget limits them for each URL.
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
        self._around = Connections(
            f"http://127.0.0.1:{self._server.port}", session, self._spool, self._find_service, self._sinks
        )
        return self._around

    def _find(self, path: str) -> Target | None:
        return None if self._wiring is None else self._wiring.inboxes.get(path)


def _broker_status(broker: BrokerInbox) -> dict[str, Any]:
    triggers = [{"name": each.name, **_status(each.subscription)} for each in broker.subscribers]
    return {"url": broker.name, "accepted": broker.accepted, "triggers": triggers}


def _status(subscription: Subscription) -> dict[str, Any]:
    return {"subscriber": subscription.subscriber.name, **asdict(subscription.counts)}
