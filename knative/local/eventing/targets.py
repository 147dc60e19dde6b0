"""Targets of a delivery: a URL, or a file in place of a sink that is only on a cluster."""

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
from eventing.wire.cloud_event import attribute_text, data_buffers
from eventing.wire.framing import is_json

# Deliveries to one URL at the same time. Knative has no such limit; here it keeps a backlog out of the functions' own queues.
_CONCURRENT_DELIVERIES: Final = 64


@dataclass(frozen=True, slots=True)
class TargetReply:
    """The reply to one delivery."""

    status: int
    body: bytes = b""
    event: CloudEvent | None = None  # None: the reply carries no event


class NoReply(Exception):
    """A delivery got no complete reply: refused, broken off, or too late. Whether the event arrived is unknown."""


class Target(Protocol):
    name: str  # its URL, which dead letters name in `knativeerrordest`

    async def deliver(self, event: CloudEvent, timeout_seconds: float | None, *, prefer_reply: bool) -> TargetReply:
        """Delivers the event once and returns the reply. Raises NoReply.

        timeout_seconds: time until the whole reply has arrived, or None for no limit.
        prefer_reply: whether the target is asked to reply with an event. Only subscribers are.
        """


class HttpTarget:
    """A URL to which events are posted, a limited number at a time.

    needs_event_replies: whether a reply that is neither empty nor an event is a failure, as for a Broker's Triggers. If not, as
    in a Sequence, such a reply counts as empty.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, *, needs_event_replies: bool) -> None:
        self.name = url
        self._session = session
        self._needs_event_replies = needs_event_replies
        self._slots = asyncio.Semaphore(_CONCURRENT_DELIVERIES)

    async def deliver(self, event: CloudEvent, timeout_seconds: float | None, *, prefer_reply: bool) -> TargetReply:
        headers, buffers = to_binary_http(event)
        async with self._slots:
            try:
                async with self._session.post(
                    self.name,
                    data=b"".join(buffers),
                    headers={**headers, "Prefer": "reply"} if prefer_reply else headers,
                    skip_auto_headers=("Content-Type", "User-Agent"),
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=timeout_seconds),
                ) as reply:
                    return self._read(reply.status, reply.headers, await reply.read())
            except TimeoutError as error:
                raise NoReply(f"{self.name}: no whole answer within {timeout_seconds} s") from error
            except aiohttp.ClientError as error:
                raise NoReply(f"{self.name}: {error or type(error).__name__}") from error

    def _read(self, status: int, headers: Mapping[str, str], body: bytes) -> TargetReply:
        if not 200 <= status < 300:
            return TargetReply(status, body)
        is_event = "ce-specversion" in headers or headers.get("Content-Type", "").startswith("application/cloudevents")
        if not is_event:
            if body and self._needs_event_replies:
                return TargetReply(HTTPStatus.BAD_GATEWAY, b"the reply is neither empty nor a CloudEvent")
            return TargetReply(status)
        try:
            return TargetReply(status, event=from_http(dict(headers), body))
        except Problem as problem:
            return TargetReply(HTTPStatus.BAD_GATEWAY, f"the reply is no CloudEvent: {problem}".encode())


class FileTarget:
    """A file in place of a Service that is not on this machine. Each event is appended as a line of JSON in structured mode."""

    def __init__(self, path: Path) -> None:
        self.name = path.as_uri()
        self._path = path

    async def deliver(self, event: CloudEvent, timeout_seconds: float | None, *, prefer_reply: bool) -> TargetReply:
        members: dict[str, object] = {name: attribute_text(value) for name, value in event.get_attributes().items()}
        data = b"".join(data_buffers(event))
        try:
            parsed = {"data": json.loads(data)} if is_json(event.get_datacontenttype() or "") else None
        except ValueError:
            parsed = None  # a dead letter may be about data that is no JSON
        if parsed is None:
            parsed = {"data_base64": base64.b64encode(data).decode()} if data else {}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(members | parsed) + "\n")
        return TargetReply(HTTPStatus.ACCEPTED)
