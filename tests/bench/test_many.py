"""The benchmark of many conversations: its reading of streams and its verdicts."""

import asyncio
from dataclasses import replace

import pytest

from bench.many.conversations import converse
from bench.many.report import Load, LoadFindings, markdown, verdicts

ONE = LoadFindings(
    errors=(), tokens=10_000, seconds=10.0, gaps=[0.1] * 99 + [0.2], gateway_cpu_seconds=8.0, other_cpu_seconds=4.0,
    bytes_per_conversation=64 * 1024, busy_cores=1.2, cores=8,
)  # fmt: skip


def words(**two: float) -> list[str]:
    return [verdict.word for verdict in verdicts({Load(1000, 1): ONE, Load(1000, 2): replace(ONE, **two)})]


def test_two_gateways_are_judged_only_if_cores_were_free() -> None:
    assert words(seconds=5.0) == ["met", "met", "met"]
    assert words(seconds=9.0) == ["met", "met", "missed"]
    assert words(seconds=9.0, cores=2, busy_cores=1.8) == ["met", "met", "not measurable"]


def test_errors_and_late_tokens_are_missed() -> None:
    late = replace(ONE, errors=["503"], gaps=[0.1] * 90 + [0.4] * 10)
    assert [verdict.word for verdict in verdicts({Load(64, 1): late})] == ["missed", "missed"]
    assert "| 64 | 1 | 1000 | 800 µs | 400 µs | 1.20 of 8 | 64 KiB | 100, 400 ms (4.00 ×) | 1 |" in markdown(
        {Load(64, 1): late}, "facts"
    )
    assert "it ends at 1250 tokens a second" in markdown({Load(64, 1): late}, "facts")


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("200 OK", ""),
        ("429 Too Many Requests", "HTTP/1.1 429 Too Many Requests"),
        ("200 cut", "the answer broke off"),
        ("200 short", "2 tokens of 3"),
    ],
)
def test_tokens_are_counted_however_their_bytes_are_cut_and_failures_are_told(reply: str, error: str) -> None:
    events = [b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'] * (2 if reply == "200 short" else 3)
    events += [b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n', b"data: [DONE]\n\n"]
    sent = b"".join(events)[: -30 if reply == "200 cut" else None]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(f"HTTP/1.1 {reply}\r\n\r\n".encode())
        for first in range(0, len(sent), 7):
            writer.write(sent[first : first + 7])
            await writer.drain()
        writer.close()

    async def ask() -> str:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            (found,) = await converse([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"], "model", 1, 3)
        assert found.tokens == len(events) - 2 or reply.startswith("429")
        return found.error

    assert asyncio.run(ask()) == error
