"""X-Forwarded-For: each proxy adds who spoke to it, and what a client wrote stays in front of that."""

import asyncio
from pathlib import Path

import pytest

from tests.support.knative.behind_queue_proxy import behind_queue_proxy
from tests.support.knative.platform import client, echo_service, fetch, revision, running_platform


async def tell(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the header as it came, every line of it."""
    lines = [line.partition(b": ")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"x-forwarded-for:")]
    body = b" | ".join(lines)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ([], "127.0.0.1"),
        (["203.0.113.9"], "203.0.113.9, 127.0.0.1"),
        (["203.0.113.9, 198.51.100.2"], "203.0.113.9, 198.51.100.2, 127.0.0.1"),
        (["203.0.113.9", "198.51.100.2"], "203.0.113.9, 198.51.100.2, 127.0.0.1"),
    ],
)
async def test_queue_proxy_adds_who_spoke_to_it(written: list[str], seen: str) -> None:
    headers = [("X-Forwarded-For", value) for value in written]
    async with behind_queue_proxy(tell) as (session, url), session.get(url, headers=headers) as reply:
        assert await reply.text() == seen


async def test_ingress_and_activator_are_proxies_as_well(tmp_path: Path) -> None:
    """Three add to it while the activator is in the path, two when it is not, as on a cluster."""
    async with running_platform(tmp_path, echo_service()) as platform, client() as session:
        url = platform.url("echo") + "/header?X-Forwarded-For"
        assert revision(platform).activator.in_path
        assert await fetch(session, url) == (200, "127.0.0.1, 127.0.0.1, 127.0.0.1")
        revision(platform).activator.in_path = False
        assert await fetch(session, url) == (200, "127.0.0.1, 127.0.0.1")
