"""The proxy against the table of raw requests that the functions' server is held to, with that server behind it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.functions.http_cases import CASES, CLOSED, EITHER, Case, outcome
from tests.support.functions.java_client import ask_as_java, has_java
from tests.support.functions.server import Serving, serving
from tests.support.knative.proxy import proxy_to_port


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(4, tells=True) as running:
        yield running


@pytest.mark.parametrize("case", [case for case in CASES if case.proxied], ids=str)
async def test_the_proxy_reads_a_request_as_the_server_behind_it_does(server: Serving, case: Case) -> None:
    async with proxy_to_port(server.port) as proxy:
        replies, after = await asyncio.to_thread(outcome, case, proxy.port)
    assert replies == case.replies
    assert after == case.after or case.after == EITHER


@pytest.mark.parametrize("case", [case for case in CASES if not case.proxied], ids=str)
async def test_what_the_proxy_reads_otherwise_is_broken_off(server: Serving, case: Case) -> None:
    """It has passed on a head before it sees a wrong chunk, and serves no second request of the same packet."""
    async with proxy_to_port(server.port) as proxy:
        replies, after = await asyncio.to_thread(outcome, case, proxy.port)
    assert after == CLOSED
    if isinstance(case.replies[0], int):
        assert replies == () or isinstance(replies[0], int)
    else:
        assert replies == case.replies[:1]


@pytest.mark.skipif(not has_java(), reason="java is not installed")
async def test_javas_client_is_served_in_every_framing(server: Serving, tmp_path: Path) -> None:
    async with proxy_to_port(server.port) as proxy:
        seen = f"200 POST /a?b=c 127.0.0.1:{proxy.port} "
        assert await asyncio.to_thread(ask_as_java, f"{proxy.url}/a?b=c", tmp_path) == [seen, seen] + 4 * [f"{seen}hello"]
