"""A slow network for benchmarks: relays with a delay and a limited rate, in a process of their own.

The process has a session of its own: Linux shares processors out by sessions, and a stand-in for a network must not share one.

    python -m bench.network DELAY_SECONDS BYTES_PER_SECOND PORT…    prints a JSON list of its own ports; ends with its stdin
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from bench.report import ROOT
from knative.local.proxies.network import EmulatedNetwork, Relay


@contextmanager
def relayed(urls: Sequence[str], network: EmulatedNetwork) -> Iterator[list[str]]:
    """URLs of relays to `urls` of this machine. Each has a link of its own, which all of its connections share."""
    ports = [str(urlsplit(url).port or 80) for url in urls]
    link = [str(network.delay_seconds), str(network.bytes_per_second or 0)]
    command = [sys.executable, "-m", "bench.network", *link, *ports]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as relays:
        assert relays.stdin is not None
        assert relays.stdout is not None
        try:
            yield [f"http://127.0.0.1:{port}" for port in json.loads(relays.stdout.readline())]
        finally:
            relays.stdin.close()


async def _run(network: EmulatedNetwork, ports: Sequence[int]) -> None:
    relays = [Relay(network) for _ in ports]
    for relay, port in zip(relays, ports, strict=True):
        await relay.start(port)
    print(json.dumps([relay.port for relay in relays]), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for relay in relays:
        relay.close()
    own = asyncio.current_task()
    await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not own), return_exceptions=True)


if __name__ == "__main__":
    delay, rate, *destinations = sys.argv[1:]
    asyncio.run(_run(EmulatedNetwork(float(delay), float(rate) or None), [int(port) for port in destinations]))
