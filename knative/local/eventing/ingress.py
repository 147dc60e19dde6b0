"""Events over HTTP into a Broker (`POST /namespace/broker`) or a Sequence (`POST /sequences/namespace/name`)."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from eventing.http.binding import from_http
from eventing.problems import Problem
from knative.local.eventing.delivery import Spool
from knative.local.eventing.targets import Target
from knative.local.http.messages import HttpError
from knative.local.http.server import Exchange

MAX_EVENT_BYTES: Final = 2**20
"""As a Kafka topic takes by default. What is larger waits in the store, see `eventing.claim_check`."""


class EventIngress:
    """find: the Target behind a path, if there is one. Answers 202 once an event is in the spool, 429 where that is full."""

    def __init__(self, find: Callable[[str], Target | None], spool: Spool) -> None:
        self._find = find
        self._spool = spool

    async def serve(self, exchange: Exchange) -> None:
        target = self._find(exchange.target.decode("latin-1").partition("?")[0].rstrip("/"))
        if target is None:
            raise HttpError(HTTPStatus.NOT_FOUND, "there is no such Broker or Sequence; python -m knative status lists them")
        if exchange.method != b"POST":
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "events come by POST")
        self._check_room()
        body = await _Body(exchange).read()
        headers = [(name.decode("latin-1"), value.decode("utf-8", "replace")) for name, value in exchange.headers]
        try:
            event = from_http(headers, body)
        except Problem as problem:
            raise HttpError(HTTPStatus.BAD_REQUEST, str(problem)) from problem
        self._check_room()
        answer = await target.deliver(event, None)
        exchange.respond(HTTPStatus(answer.status), answer.body)

    def _check_room(self) -> None:
        if self._spool.closed:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "the broker is stopping")
        if self._spool.full:
            raise HttpError(HTTPStatus.TOO_MANY_REQUESTS, f"{len(self._spool)} deliveries are in progress already; try later")


class _Body:
    """A BodySink that collects."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._data = bytearray()
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def read(self) -> bytes:
        """Raises HttpError, 413, where it is too long."""
        self._exchange.attach(self)
        await self._done
        return bytes(self._data)

    def write_body(self, data: bytes) -> None:
        if self._done.done():  # too long already
            return
        self._data += data
        if len(self._data) > MAX_EVENT_BYTES:
            text = f"an event has at most {MAX_EVENT_BYTES} bytes here; send a reference to more (dataref)"
            self._done.set_exception(HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text))

    def end_body(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass
