"""Streamed answers through a queue-proxy that treats them as Go's does, and every one of them whole.

A real gateway and real stages as processes; eight conversations at a time. With `http-full-duplex` an answer may begin whenever
it likes; without it only a gateway that says nothing before its first token gets one through.
"""

import asyncio
import json

import aiohttp
import pytest

from knative.local.proxies.queue_proxy import QueueProxy, RequestLimits
from knative.local.proxies.timeouts import Timeouts
from tests.support.functions.functions import FunctionProcess
from tests.support.storage.published import Published

AT_ONCE = 8
TOKENS = 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("full_duplex", [True, False])
def test_streamed_answers_are_whole(gateway: FunctionProcess, published: Published, full_duplex: bool, wide: bool) -> None:
    answers = 1000 if wide else 100
    broken = asyncio.run(_ask_through_queue_proxy(gateway.port, published.manifest.name, full_duplex, answers))
    assert not broken, f"{len(broken)} of {answers}, such as {broken[0]!r}"


async def _ask_through_queue_proxy(port: int, model: str, full_duplex: bool, answers: int) -> list[Exception]:
    """What broke."""
    proxy = QueueProxy(RequestLimits(0, Timeouts(300), full_duplex))
    await proxy.start()
    proxy.connect(port)
    numbers, broken = iter(range(answers)), []
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{proxy.port}") as session:

            async def converse() -> None:
                for number in numbers:
                    try:
                        await _ask(session, model, number)
                    except (aiohttp.ClientError, AssertionError) as error:
                        broken.append(error)

            await asyncio.gather(*(converse() for _ in range(AT_ONCE)))
    finally:
        proxy.close()
    return broken


async def _ask(session: aiohttp.ClientSession, model: str, number: int) -> None:
    """Raises where the answer is not whole."""
    asked = {"model": model, "prompt": f"{number} is", "max_tokens": TOKENS, "temperature": 0, "stream": True}
    async with session.post("/v1/completions", json=asked) as reply:
        assert reply.status == 200, await reply.text()
        events = [line.removeprefix("data: ") for line in (await reply.text()).splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events
    finished = [choice["finish_reason"] for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert [reason for reason in finished if reason] in (["length"], ["stop"]), events
