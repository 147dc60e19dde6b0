"""The proxy of knative/local in front of one port, as activator and queue-proxy use it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from knative.local.http.client import UpstreamFailed, UpstreamPool
from knative.local.http.messages import HttpError
from knative.local.http.server import Exchange, HttpServer


@asynccontextmanager
async def proxy_to_port(port: int) -> AsyncIterator[HttpServer]:
    """A running proxy to a server on 127.0.0.1, which answers 502 if that fails."""
    pool = UpstreamPool(port)

    async def handler(exchange: Exchange) -> None:
        try:
            await pool.forward(exchange)
        except UpstreamFailed as error:
            raise HttpError(HTTPStatus.BAD_GATEWAY, str(error)) from error

    proxy = HttpServer(handler)
    await proxy.start()
    try:
        yield proxy
    finally:
        proxy.close()
        pool.close()
