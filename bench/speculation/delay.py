"""A slow network between gateway and stages: relays that delay every byte, in both directions."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Final
from urllib.parse import urlsplit

from knative.local.proxies.network import EmulatedNetwork, Relay

_STOP_SECONDS: Final = 10.0


@contextlib.contextmanager
def delayed(urls: Sequence[str], seconds: float) -> Iterator[list[str]]:
    """URLs of relays to `urls`, all on this machine, with a delay of `seconds` each way."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="delays", daemon=True)
    thread.start()
    relays = [asyncio.run_coroutine_threadsafe(_relay(url, seconds), loop).result(_STOP_SECONDS) for url in urls]
    try:
        yield [f"http://127.0.0.1:{relay.port}" for relay in relays]
    finally:
        asyncio.run_coroutine_threadsafe(_end(relays), loop).result(_STOP_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_STOP_SECONDS)
        loop.close()


async def _relay(url: str, seconds: float) -> Relay:
    relay = Relay(EmulatedNetwork(delay_seconds=seconds))
    await relay.start(urlsplit(url).port or 80)
    return relay


async def _end(relays: Sequence[Relay]) -> None:
    for relay in relays:
        relay.close()
    own = asyncio.current_task()
    await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not own), return_exceptions=True)
    await asyncio.sleep(0)  # Transports close their sockets when the loop comes round.
