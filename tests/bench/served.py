"""A server for clients of benchmarks, and events as a gateway streams them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from eventing.http.binding import to_structured_http
from eventing.http.sse import encode_sse
from eventing.wire.cloud_event import json_event
from eventing.wire.events import EventType


@asynccontextmanager
async def serving(*routes: web.RouteDef) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def message(kind: EventType, data: Any) -> bytes:
    return encode_sse(b"".join(to_structured_http(json_event(kind, "test", data))[1]))
