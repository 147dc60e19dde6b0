"""What queue-proxy says of a function that is not there, and of one that broke: gateways tell the two apart by Go's words."""

import asyncio

import aiohttp

from knative.local.http.client import REFUSED
from knative.local.proxies.queue_proxy import QueueProxy, RequestLimits
from knative.local.proxies.timeouts import Timeouts
from tests.support.http_server import unused_port
from tests.support.knative.behind_queue_proxy import behind_queue_proxy


def test_nobody_listens_behind_it() -> None:
    """Neither after the platform has seen the end of the process, nor before."""

    async def scenario() -> list[tuple[int, str]]:
        proxy = QueueProxy(RequestLimits(0, Timeouts(10), False))
        await proxy.start()
        answers = []
        async with aiohttp.ClientSession() as session:
            for port in (None, unused_port()):
                proxy.connect(port)
                async with session.get(f"http://127.0.0.1:{proxy.port}") as reply:
                    answers.append((reply.status, await reply.text()))
        proxy.close()
        return answers

    for status, text in asyncio.run(scenario()):
        assert status == 502
        assert "dial tcp 127.0.0.1" in text
        assert REFUSED in text


def test_it_breaks_with_the_request_in_hand() -> None:
    async def dies(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async def scenario() -> tuple[int, str]:
        async with behind_queue_proxy(dies) as (session, url), session.get(url) as reply:
            return reply.status, await reply.text()

    status, text = asyncio.run(scenario())
    assert status == 502
    assert REFUSED not in text
