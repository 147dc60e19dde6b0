"""The tools of bench.coldstart: the rate that a proxy lets through, and what the report makes of figures."""

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

import pytest

from bench.coldstart.contenders import Loaded
from bench.coldstart.models import LARGE_LAYERS
from bench.coldstart.report import Results, markdown, verdicts
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
    command = [
        sys.executable,
        "-m",
        "bench.coldstart.throttle",
        "--upstream",
        "127.0.0.1:9",
        "--bytes-per-second",
        "1e6",
        "--count",
        "2",
    ]
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


def results(ours: float) -> Results:
    """With loading that takes `ours` seconds; all else well within its bounds."""
    loading = {"lamina": ours, "lamina_cached": 0.1, "plain_gets": 1.0, "boto3_download": 4.0, "runai_streamer": 4.0}
    cold = {stages: [run_of(3.0, 6.0 / stages, 300_000_000 // stages)] for stages in (1, 2, 3, 5)}
    monolith = [ColdStart(10.0, "The", ({"import": 4.0, "download": 9.0, "load": 9.5},), 300_000_000)]
    return Results(
        loading={name: [Loaded(seconds, 0.5, 10)] for name, seconds in loading.items()},
        loading_bytes=2**30,
        bytes_per_second=50e6,
        monolith=monolith,
        monolith_limited=monolith,
        stages=[run_of(0.9, 0.3, 100_000_000)],
        cached=[run_of(0.5, 0.1, 100_000_000)],
        limited=cold,
        imports={"import torch": [1.0], "native stage": [0.3], "gateway": [0.3]},
    )


def test_a_run_that_shows_what_it_must() -> None:
    assert all(verdict.holds for verdict in verdicts(results(ours=1.0)))
    text = markdown(results(ours=1.0))
    assert "**no**" not in text
    assert "| 3 | 100 | 2.00 | 2.00 | 1.00 × | 3.00 |" in text


def test_a_run_that_does_not() -> None:
    failed = [verdict.what for verdict in verdicts(results(ours=1.2)) if not verdict.holds]
    assert failed == ["loading, against plain ranged GETs into a buffer that is thrown away"]
    assert markdown(results(ours=1.2)).count("**no**") == 1


def test_the_large_stage_is_one_of_a_gibibyte() -> None:
    layer_bytes = 2 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 5632 * 2048)
    assert pytest.approx(2**30, rel=0.02) == LARGE_LAYERS * layer_bytes
