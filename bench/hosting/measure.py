"""One look at one server: hops, throughput, large bodies, streams, and its processor time for each."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from statistics import median, quantiles
from typing import Final, TypeVar

import psutil

from bench.hosting.application import PIECES, STREAM_PATH

HOP_BYTES: Final = 2_300
"""A decode step of one sequence."""
BODY_BYTES: Final = 5_200_000
"""A chunk of a prompt."""
_HOPS: Final = 1_500
_BODIES: Final = 40
CONNECTIONS: Final = 16
_OF_EACH: Final = 200
STREAMS: Final = 200
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Figures:
    """Milliseconds and requests per second; processor time of the server's processes alone."""

    hop_p50: float
    hop_p99: float
    hop_cpu: float
    """Of one hop."""
    body_p50: float
    body_cpu: float
    requests_per_second: float
    """On CONNECTIONS connections."""
    piece_p50: float
    """From when a piece of a stream was written to when it is there, STREAMS streams at a time."""
    piece_p99: float
    piece_cpu: float
    broken: int
    """Streams that did not come to their end."""


def measure(pid: int, port: int) -> Figures:
    _hops(port, HOP_BYTES, 50)
    hops, hop_cpu = _with_cpu(pid, lambda: _hops(port, HOP_BYTES, _HOPS))
    bodies, body_cpu = _with_cpu(pid, lambda: _hops(port, BODY_BYTES, _BODIES))
    began = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as clients:
        list(clients.map(lambda _: _hops(port, HOP_BYTES, _OF_EACH), range(CONNECTIONS)))
    throughput = CONNECTIONS * _OF_EACH / (time.perf_counter() - began)
    (lags, broken), piece_cpu = _with_cpu(pid, lambda: asyncio.run(_streams(port)))
    return Figures(
        median(hops) * 1e3,
        quantiles(hops, n=100)[98] * 1e3,
        hop_cpu / _HOPS * 1e3,
        median(bodies) * 1e3,
        body_cpu / _BODIES * 1e3,
        throughput,
        median(lags) * 1e3,
        quantiles(lags, n=100)[98] * 1e3,
        piece_cpu / max(1, len(lags)) * 1e3,
        broken,
    )


def _hops(port: int, size: int, count: int) -> list[float]:
    """Seconds of each, one after the other on one connection."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    body, found = bytes(size), []
    for _ in range(count):
        began = time.perf_counter()
        connection.request("POST", "/", body)
        with connection.getresponse() as reply:
            if len(reply.read()) != size:
                raise RuntimeError("the echo is not what was sent")
        found.append(time.perf_counter() - began)
    connection.close()
    return found


async def _streams(port: int) -> tuple[list[float], int]:
    """Seconds that each piece was on its way, and streams that broke."""
    found = await asyncio.gather(*(_stream(port) for _ in range(STREAMS)), return_exceptions=True)
    whole = [lags for lags in found if not isinstance(lags, BaseException) and len(lags) == PIECES]
    return [lag for lags in whole for lag in lags], STREAMS - len(whole)


async def _stream(port: int) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {STREAM_PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    lags = []
    async with asyncio.timeout(60):
        while line := await reader.readline():
            if line.startswith(b"data: "):
                lags.append(time.monotonic() - float(line[6:]))
    writer.close()
    return lags


def _with_cpu(pid: int, work: Callable[[], T]) -> tuple[T, float]:
    before = _cpu_seconds(pid)
    result = work()
    return result, _cpu_seconds(pid) - before


def _cpu_seconds(pid: int) -> float:
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))
