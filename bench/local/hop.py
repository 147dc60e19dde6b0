"""What the local platform adds to a request: `python -m bench.local.hop`.

One connection, one request at a time, to an echo function directly, through its queue-proxy, and through ingress and activator;
bodies of a decode step (2.3 KB) and of a prompt chunk (5.2 MB) each way. Prints p50 and p90 on this machine.
"""

import asyncio
import io
import tempfile
import time
from pathlib import Path
from typing import Final

import aiohttp

from tests.support.knative.platform import echo_service, fetch, revision, running_platform

_BODIES: Final = ((2_300, 2_000), (5_200_000, 60))
"""(bytes, requests)."""


async def measure(session: aiohttp.ClientSession, url: str, size: int, count: int) -> tuple[float, float]:
    """Milliseconds: p50 and p90."""
    body, seconds = b"x" * size, []
    for _ in range(count):
        began = time.perf_counter()
        async with session.post(url, data=io.BytesIO(body)) as reply:
            await reply.read()
        seconds.append(time.perf_counter() - began)
    seconds.sort()
    return seconds[count // 2] * 1000, seconds[count * 9 // 10] * 1000


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The echo answers a chunk before it reads the next.
        echo = echo_service(full_annotations={"features.knative.dev/http-full-duplex": "Enabled"})
        async with running_platform(Path(folder), echo) as platform, aiohttp.ClientSession() as session:
            await fetch(session, platform.url("echo") + "/pid")
            proxy = revision(platform).pods[0].proxy
            ways = {
                "function": f"http://127.0.0.1:{proxy.function_port}",
                "queue-proxy": f"http://127.0.0.1:{proxy.port}",
                "ingress and activator": platform.url("echo"),
            }
            for size, count in _BODIES:
                for way, url in ways.items():
                    p50, p90 = await measure(session, url, size, count)
                    print(f"{size:>9,} bytes  {way:<22} p50 {p50:6.2f} ms  p90 {p90:6.2f} ms")


if __name__ == "__main__":
    asyncio.run(main())
