"""What the platform tells about itself over HTTP: EndpointSlices as the Kubernetes API serves them, and its status."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from knative.local.http.messages import HttpError
from knative.local.http.server import Exchange, HttpServer
from knative.local.serving.endpoint_slices import EndpointSlices

_PREFIX = "/apis/discovery.k8s.io/v1/namespaces/"
_JSON = b"application/json"


class Admin:
    """One port on 127.0.0.1: `/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices`, `/status`, `/metrics`."""

    def __init__(self, slices: EndpointSlices, status: Callable[[], dict[str, Any]], metrics: Callable[[], bytes]) -> None:
        self._slices = slices
        self._status = status
        self._metrics = metrics
        self._server = HttpServer(self._serve)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    async def start(self) -> None:
        await self._server.start()

    def close(self) -> None:
        self._server.close()

    async def _serve(self, exchange: Exchange) -> None:
        parts = urlsplit(exchange.target.decode("latin-1"))
        if exchange.method != b"GET":
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is served here")
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        answer = self._route(parts.path)
        if answer is None:
            raise HttpError(HTTPStatus.NOT_FOUND, f"{parts.path} is not served here")
        await answer(exchange, query)

    def _route(self, path: str) -> Callable[[Exchange, dict[str, str]], Awaitable[None]] | None:
        if path == "/status":
            return self._serve_status
        if path == "/metrics":
            return self._serve_metrics
        namespace, _, kind = path.removeprefix(_PREFIX).partition("/")
        if path.startswith(_PREFIX) and kind == "endpointslices":
            return lambda exchange, query: self._serve_slices(exchange, unquote(namespace), query)
        return None

    async def _serve_status(self, exchange: Exchange, query: dict[str, str]) -> None:
        exchange.respond(HTTPStatus.OK, json.dumps(self._status()).encode(), _JSON)

    async def _serve_metrics(self, exchange: Exchange, query: dict[str, str]) -> None:
        exchange.respond(HTTPStatus.OK, self._metrics(), b"text/plain; version=0.0.4; charset=utf-8")

    async def _serve_slices(self, exchange: Exchange, namespace: str, query: dict[str, str]) -> None:
        selector = query.get("labelSelector", "")
        if query.get("watch", "") not in ("1", "true"):
            exchange.respond(HTTPStatus.OK, json.dumps(self._slices.list(namespace, selector)).encode(), _JSON)
            return
        since, bookmarks = query.get("resourceVersion", ""), query.get("allowWatchBookmarks", "") in ("1", "true")
        seconds = query.get("timeoutSeconds", "")
        async with contextlib.aclosing(self._slices.watch(namespace, selector, since, bookmarks)) as lines:
            exchange.write(exchange.start(200, b"OK", [(b"Content-Type", _JSON)]))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(int(seconds) if seconds.isdigit() and int(seconds) else None):
                    async for line in lines:
                        exchange.write(exchange.framed(line))
        exchange.end()
