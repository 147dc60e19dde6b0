"""The tools of bench.coldstart: the rate of its proxies, and the targets and tables of its report."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.coldstart.report import Results, draw, markdown, verdicts
from bench.coldstart.runs import ColdStart
from bench.coldstart.throttle import Throttle
from tests.support.paths import ROOT

RATE = 4_000_000.0


@contextmanager
def sending(count: int) -> Iterator[tuple[str, int]]:
    """A server that sends so many bytes to everybody, once it has been spoken to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection:
                assert connection.recv(5) == b"hello"
                connection.sendall(os.urandom(1) * count)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)


async def received(port: int) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello")
    data = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    return len(data)


@pytest.mark.parametrize("connections", [1, 4])
def test_all_connections_of_a_pod_share_its_rate(connections: int) -> None:
    each = 2_000_000 // connections

    async def run(upstream: tuple[str, int]) -> float:
        async with Throttle(upstream, RATE) as port:
            began = time.monotonic()
            assert await asyncio.gather(*(received(port) for _ in range(connections))) == [each] * connections
            return time.monotonic() - began

    with sending(each) as upstream:
        seconds = asyncio.run(run(upstream))
    assert seconds >= 0.9 * 2_000_000 / RATE  # never faster; how much slower is the machine's


def test_pods_do_not_share_a_rate() -> None:
    async def run(upstream: tuple[str, int]) -> float:
        async with Throttle(upstream, RATE) as first, Throttle(upstream, RATE) as second, Throttle(upstream, RATE) as third:
            began = time.monotonic()
            await asyncio.gather(received(first), received(second), received(third))
            return time.monotonic() - began

    with sending(1_000_000) as upstream:
        assert asyncio.run(run(upstream)) < 0.9 * 3 * 1_000_000 / RATE


def test_the_proxy_program_ends_with_its_stdin() -> None:
    options = ["--upstream", "127.0.0.1:9", "--bytes-per-second", "1e6", "--count", "2"]
    command = [sys.executable, "-m", "bench.coldstart.throttle", *options]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as proxies:
        assert proxies.stdin is not None
        assert proxies.stdout is not None
        assert len(json.loads(proxies.stdout.readline())) == 2
        proxies.stdin.close()
        assert proxies.wait(10) == 0


def run_of(first_token: float, load: float, largest: int) -> ColdStart:
    phases = {
        "process": 0.1,
        "import": 1.0,
        "connect": 0.2,
        "first_byte": 0.3,
        "last_byte": 0.2 + load,
        "place": 1.1,
        "warm_up": 1.2,
    }
    return ColdStart(first_token, "The", (phases,), largest)


def results(first_token_seconds: float) -> Results:
    """Three stages without a limit take `first_token_seconds`; all else is well within its bounds."""
    cold = {stages: [run_of(3.0, 6.0 / stages, 300_000_000 // stages)] for stages in (1, 2, 3, 5)}
    monolith = [ColdStart(10.0, "The", ({"import": 4.0, "download": 9.0, "load": 9.5},), 300_000_000)]
    stages, cached = [run_of(first_token_seconds, 0.3, 100_000_000)], [run_of(0.5, 0.1, 100_000_000)]
    return Results(50e6, monolith, list(monolith), stages, cached, cold)


def test_targets_are_judged_and_tabulated(tmp_path: Path) -> None:
    assert all(verdict.met for verdict in verdicts(results(0.9)))
    text = markdown(results(0.9))
    assert "missed" not in text
    assert "| 3 | 100 | 2.00 | 2.00 | 1.00 × | 3.00 |" in text
    assert [verdict.what for verdict in verdicts(results(1.2)) if not verdict.met] == ["first token of 3 stages"]
    assert "| first token of 3 stages | ≤ 1.10 s | 1.20 s | missed |" in markdown(results(1.2))
    draw(results(0.9), tmp_path / "coldstart.png")
    assert (tmp_path / "coldstart.png").stat().st_size > 1000
