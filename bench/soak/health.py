"""Asks every process for `/healthz`, twice a second, like a kubelet, from a process of its own.

`python -m bench.soak.health PLAN`, until it is terminated.
"""

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from bench.records import Recorder
from bench.soak.records import Health, Plan
from bench.soak.target import function_ports

_EVERY_SECONDS: Final = 0.5
_PATIENCE_SECONDS: Final = 10.0
_GONE: Final = (aiohttp.ClientError, OSError, TimeoutError)


async def watch(plan: Plan, recorder: Recorder) -> None:
    """Asks processes independently: one that hangs must not delay the others."""
    timeout = aiohttp.ClientTimeout(total=_PATIENCE_SECONDS)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as watches:
        for service in plan.services:
            watches.create_task(_watch(session, plan, service, recorder))


async def _watch(session: aiohttp.ClientSession, plan: Plan, service: str, recorder: Recorder) -> None:
    while True:
        began = recorder.now
        port = None
        with contextlib.suppress(*_GONE):
            async with session.get(f"{plan.admin_url}/status") as reply:
                port = function_ports(await reply.json(), plan.services).get(service)
        await _ask(session, service, port, recorder)
        await asyncio.sleep(max(0.0, began + _EVERY_SECONDS - recorder.now))


async def _ask(session: aiohttp.ClientSession, service: str, port: int | None, recorder: Recorder) -> None:
    asked, status = recorder.now, 0
    with contextlib.suppress(*_GONE):
        if port is not None:
            async with session.get(f"http://127.0.0.1:{port}/healthz") as reply:
                status = reply.status
    recorder.write(Health(asked, service, status, round(recorder.now - asked, 4)))


async def until_told(plan: Plan, recorder: Recorder) -> None:
    watching = asyncio.create_task(watch(plan, recorder))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, watching.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await watching


def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    with Recorder(Path(plan.records), plan.started) as recorder:
        asyncio.run(until_told(plan, recorder))


if __name__ == "__main__":
    main()
