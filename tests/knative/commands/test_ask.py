"""`ask` reports the time that its caller waited, not the gateway's."""

import asyncio
import io
from collections.abc import AsyncIterator

import pytest
from rich.console import Console

from eventing.wire.generation import GenerateResponse, Timings, TokenEvent, Usage
from knative.commands import ask
from knative.commands.ask import Answer, Question


@pytest.mark.parametrize("tokens", [0, 3])
def test_times_are_those_of_the_caller(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway was scaled to zero, and answered quickly once it ran."""
    now = 100.0

    async def answers(url: str, question: Question) -> AsyncIterator[Answer]:
        nonlocal now
        now += 4.28
        for index in range(tokens):
            yield TokenEvent(index, 7, "a")
            now += 0.5
        now += 0.5 if tokens else 0.0
        timings = Timings(0.0, 0.02, 0.03, 1000.0)
        yield GenerateResponse("aaa", (7,) * tokens, "stop", Usage(5, tokens + 1, tokens + 6), timings)

    monkeypatch.setattr(ask, "stream_answer", answers)
    monkeypatch.setattr(ask.time, "monotonic", lambda: now)
    out = io.StringIO()
    asyncio.run(ask.show_answer(Console(file=out), "http://gateway", Question("hello", 8)))
    rate = "1.5" if tokens else "0.0"
    assert f"({5} + {tokens + 1} tokens, first after 4.28 s, then {rate} tokens/s, stop)" in out.getvalue()
