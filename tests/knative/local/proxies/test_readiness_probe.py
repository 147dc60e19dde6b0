"""A pod's queue-proxy says whether it is ready to whoever asks as the activator does, and counts no such request."""

import aiohttp

from knative.local.proxies.queue_proxy import QueueProxy, RequestLimits
from knative.local.proxies.timeouts import Timeouts


async def test_readiness_is_told_by_queue_proxy_itself_and_counts_as_no_request() -> None:
    ready = False
    proxy = QueueProxy(RequestLimits(1, Timeouts(10)), lambda: ready)
    await proxy.start()
    url, began = f"http://127.0.0.1:{proxy.port}/healthz", proxy.all.last_arrival
    try:
        async with aiohttp.ClientSession() as session:
            asked = {"K-Network-Probe": "queue"}
            async with session.get(url, headers=asked) as answer:
                assert (answer.status, await answer.read()) == (503, b"")
            ready = True
            async with session.get(url, headers=asked) as answer:
                assert (answer.status, await answer.read()) == (200, b"queue")
            assert proxy.all.last_arrival == began
            async with session.get(url) as answer:
                assert answer.status == 502, "it is a request like any other, and no function runs"
            assert proxy.all.last_arrival > began
    finally:
        proxy.close()
