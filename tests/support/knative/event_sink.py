"""A subscriber over real HTTP in the running event loop: keeps its events and answers as a test says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from cloudevents.core.v1.event import CloudEvent

from eventing.http.binding import from_http, to_binary_http


@dataclass(frozen=True)
class Reply:
    status: int = 202
    event: CloudEvent | None = None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    after_seconds: float = 0.0


@dataclass
class EventSink:
    url: str
    answer: Callable[[CloudEvent], Reply] = lambda _: Reply()
    events: list[CloudEvent] = field(default_factory=list)  # in order of arrival, repetitions too
    headers: list[dict[str, str]] = field(default_factory=list)  # of each request, names in lower case

    def ids(self) -> list[str]:
        return [event.get_id() for event in self.events]

    def once(self) -> dict[tuple[str, str], CloudEvent]:
        """(source, id) → event: the events of a sink that drops repetitions."""
        known: dict[tuple[str, str], CloudEvent] = {}
        for event in self.events:
            known.setdefault((event.get_source(), event.get_id()), event)
        return known

    async def receive(self, request: web.Request) -> web.Response:
        event = from_http(list(request.headers.items()), await request.read())
        self.events.append(event)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        reply = self.answer(event)
        await asyncio.sleep(reply.after_seconds)
        if reply.event is None:
            return web.Response(status=reply.status, body=reply.body, headers=reply.headers)
        headers, buffers = to_binary_http(reply.event)
        return web.Response(status=200, body=b"".join(buffers), headers=headers)


@asynccontextmanager
async def event_sink(answer: Callable[[CloudEvent], Reply] = lambda _: Reply()) -> AsyncIterator[EventSink]:
    sink = EventSink("", answer)
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/{path:.*}", sink.receive)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    sink.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield sink
    finally:
        await runner.cleanup()


async def post(session: aiohttp.ClientSession, url: str, event: CloudEvent) -> tuple[int, str]:
    headers, buffers = to_binary_http(event)
    async with session.post(url, data=b"".join(buffers), headers=headers) as reply:
        return reply.status, await reply.text()
