"""What benchmarks ask gateways and peers with: the OpenAI API over aiohttp, as many connections as requests."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

import aiohttp
import msgspec

_TIMEOUT: Final = aiohttp.ClientTimeout(total=600)
_DATA: Final = b"data: {"


def connections() -> aiohttp.ClientSession:
    """Raises aiohttp.ClientError for any status from 400 on."""
    return aiohttp.ClientSession(timeout=_TIMEOUT, raise_for_status=True, connector=aiohttp.TCPConnector(limit=0))


async def streamed(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The documents of a streamed answer. Closing the generator cancels the answer. Raises RuntimeError for a broken one."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with session.post(url, json=asked) as reply:
        async for line in reply.content:
            if line.startswith(_DATA):
                document = msgspec.json.decode(line.removeprefix(b"data: "), type=dict[str, Any])
                if "error" in document:
                    raise RuntimeError(f"the answer broke off: {document['error']}")
                yield document


async def answered(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The document of an answer that is not streamed."""
    async with session.post(url, json=body) as reply:
        document: dict[str, Any] = await reply.json()
        return document
