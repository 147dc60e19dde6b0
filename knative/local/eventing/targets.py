"""Where an event can be delivered to from here: over HTTP, or into a file where the sink is on a cluster only."""

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final, Protocol

import aiohttp
from cloudevents.core.v1.event import CloudEvent

from eventing.http.binding import from_http, to_binary_http
from eventing.problems import Problem
from eventing.wire.cloud_event import attribute_text, data_buffers, is_json

_AT_ONCE: Final = 64
"""Deliveries to one URL. Knative has no such limit; on one machine it keeps a backlog out of the functions' own queues."""


@dataclass(frozen=True, slots=True)
class Answer:
    """To one delivery."""

    status: int
    body: bytes = b""
    event: CloudEvent | None = None
    """The reply, if there is one."""


class NoAnswer(Exception):
    """Refused, broken or too late: nobody knows whether the event arrived."""


class Target(Protocol):
    name: str
    """Its URL, as dead letters say it in `knativeerrordest`."""

    async def deliver(self, event: CloudEvent, timeout_seconds: float | None) -> Answer:
        """Raises NoAnswer."""


class HttpTarget:
    """needs_event_replies: a reply that is neither empty nor an event is a failure, as for a Broker's Triggers; in a Sequence
    it counts as empty."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, needs_event_replies: bool) -> None:
        self.name = url
        self._session = session
        self._needs_event_replies = needs_event_replies
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def deliver(self, event: CloudEvent, timeout_seconds: float | None) -> Answer:
        headers, buffers = to_binary_http(event)
        async with self._slots:
            try:
                async with self._session.post(
                    self.name,
                    data=b"".join(buffers),
                    headers={**headers, "Prefer": "reply"},
                    skip_auto_headers=("Content-Type", "User-Agent"),
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=timeout_seconds),
                ) as reply:
                    return self._answer(reply.status, reply.headers, await reply.read())
            except TimeoutError as error:
                raise NoAnswer(f"{self.name}: no whole answer within {timeout_seconds} s") from error
            except aiohttp.ClientError as error:
                raise NoAnswer(f"{self.name}: {error or type(error).__name__}") from error

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> Answer:
        if not 200 <= status < 300:
            return Answer(status, body)
        is_event = "ce-specversion" in headers or headers.get("Content-Type", "").startswith("application/cloudevents")
        if not is_event:
            if body and self._needs_event_replies:
                return Answer(HTTPStatus.BAD_GATEWAY, b"the reply is neither empty nor a CloudEvent")
            return Answer(status)
        try:
            return Answer(status, event=from_http(dict(headers), body))
        except Problem as problem:
            return Answer(HTTPStatus.BAD_GATEWAY, f"the reply is no CloudEvent: {problem}".encode())


class FileTarget:
    """An event a line, as JSON in structured mode."""

    def __init__(self, path: Path) -> None:
        self.name = path.as_uri()
        self._path = path

    async def deliver(self, event: CloudEvent, timeout_seconds: float | None) -> Answer:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(event) + "\n")
        return Answer(HTTPStatus.ACCEPTED)


def _line(event: CloudEvent) -> str:
    members: dict[str, object] = {name: attribute_text(value) for name, value in event.get_attributes().items()}
    data = b"".join(data_buffers(event))
    try:
        if is_json(event.get_datacontenttype() or ""):
            return json.dumps(members | {"data": json.loads(data)})
    except ValueError:
        pass  # what a dead letter is about may be that it is no JSON
    return json.dumps(members | ({"data_base64": base64.b64encode(data).decode()} if data else {}))
