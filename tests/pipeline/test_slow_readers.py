"""Concurrent streams, a fifth of whose clients do not read: the other clients do not wait for them.

The stages sleep instead of computing, so that the pace does not depend on this machine.
"""

import asyncio
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest

from eventing.http.binding import to_binary_http
from eventing.wire.cloud_event import json_event
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateRequest
from knative.local.kubelet.processes import memory_bytes
from tests.support.functions.functions import FunctionProcess, gateway_environment, running_stages
from tests.support.storage.published import Published

ROUNDS = 2
MORE_BYTES = 16 * 2**20
_SEGMENT_BYTES = 536  # the minimum; a loopback segment has 64 KiB, so the kernel would hold a whole answer of a slow reader


@dataclass(frozen=True)
class Load:
    streams: int
    tokens: int  # of an answer
    slower: float  # that other clients may be


@dataclass
class Round:
    load: Load
    slow: int
    seconds: list[float] = field(default_factory=list)  # of each answer that was read as it came
    broken: int = 0
    unsent_bytes: int = 0  # to slow readers, in the kernel when all others were done
    most_memory: int = 0


@pytest.fixture(scope="module")
def gateway(published: Published) -> Iterator[FunctionProcess]:
    sleeping = {"LAMINA_LAYER_GROUP": "sleep", "LAMINA_SLEEP_SECONDS": "0.06", "LAMINA_KV_CACHE_BYTES": "200000000"}
    with running_stages(published, **sleeping) as stages:
        urls = [stage.url for stage in stages]
        told = {"LAMINA_MICRO_BATCH_SEQUENCES": "128", "LAMINA_DRAFT_TOKENS": "0", "LAMINA_ACCESS_LOG": "off"}
        with FunctionProcess(gateway_environment(published, urls, **told)) as gateway:
            yield gateway.wait_ready()


def test_slow_readers_delay_no_other_client_and_cost_little_memory(gateway: FunctionProcess, wide: bool) -> None:
    load = Load(200, 60, 1.10) if wide else Load(50, 30, 1.5)
    slow_readers = load.streams // 5
    asyncio.run(_round(gateway, load, 0))  # warm-up
    rounds = [asyncio.run(_round(gateway, load, slow)) for _ in range(ROUNDS) for slow in (0, slow_readers)]
    assert all(not each.broken and len(each.seconds) == load.streams - each.slow for each in rounds)
    assert all((each.unsent_bytes > 0) == (each.slow > 0) for each in rounds), "slow readers are slow"
    ordinary, beside_slow = ([each for each in rounds if each.slow == slow] for slow in (0, slow_readers))
    for of_all in (median, max):
        before = min(of_all(each.seconds) for each in ordinary)
        beside = min(of_all(each.seconds) for each in beside_slow)
        assert beside <= load.slower * before, (of_all, before, beside)
    assert rounds[-1].most_memory - rounds[0].most_memory <= MORE_BYTES
    assert rounds[-1].most_memory - rounds[-2].most_memory <= MORE_BYTES, "unread answers are small"


async def _round(gateway: FunctionProcess, load: Load, slow: int) -> Round:
    seen = Round(load, slow)
    slow_ones = [await _slow_reader(gateway.port, load.tokens) for _ in range(slow)]
    watching = asyncio.create_task(_watch(gateway.process.pid, seen))
    await asyncio.gather(*(_read(gateway.port, seen) for _ in range(load.streams - slow)))
    seen.unsent_bytes = _unsent_bytes(gateway.port)
    watching.cancel()
    for sock in slow_ones:
        sock.close()
    return seen


async def _slow_reader(port: int, tokens: int) -> socket.socket:
    """A connection whose client reads nothing; its kernel buffers some bytes."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, _request(tokens))
    return sock


async def _read(port: int, seen: Round) -> None:
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(seen.load.tokens))
    answer = await reader.read()
    writer.close()
    if answer.count(EventType.TOKEN.encode()) == seen.load.tokens and answer.count(EventType.GENERATE_RESPONSE.encode()) == 1:
        seen.seconds.append(time.monotonic() - began)
    else:
        seen.broken += 1


def _request(tokens: int) -> bytes:
    """A request for a stream with an event for each token."""
    event = json_event(EventType.GENERATE_REQUEST, "/test", GenerateRequest("Hi", max_tokens=tokens, ignore_eos=True))
    headers, pieces = to_binary_http(event)
    body = b"".join(pieces)
    told = {"host": "a", "connection": "close", "accept": "text/event-stream", "content-length": len(body), **headers}
    lines = ["POST / HTTP/1.1", *(f"{name}: {value}" for name, value in told.items()), "", ""]
    return "\r\n".join(lines).encode() + body


async def _watch(pid: int, seen: Round) -> None:
    while True:
        seen.most_memory = max(seen.most_memory, memory_bytes(pid))
        await asyncio.sleep(0.25)


def _unsent_bytes(port: int) -> int:
    """Send queues of connections to the port. proc(5): local address, remote address, state, send queue."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(line[4].partition(":")[0], 16) for line in lines if int(line[1].partition(":")[2], 16) == port)
