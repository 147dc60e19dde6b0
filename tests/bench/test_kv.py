"""The judging and reporting of `bench.kv`, and its reading of streamed answers."""

import asyncio
from dataclasses import replace

import pytest
from aiohttp import web

from bench.kv.client import Server
from bench.kv.pods import Stream
from bench.kv.report import MOST_COMPUTED, Case, Found, NotMeasured, markdown, met, ratio, verdicts
from tests.bench.served import serving


def second(seconds: float, different: int = 0) -> Found:
    return Found(Case.SECOND_TURN, seconds, 1.0, different)


def test_the_median_of_the_ratios_counts() -> None:
    assert ratio([second(0.1), second(0.9), second(0.11)]) == pytest.approx(0.11)
    assert met([second(0.1), second(0.9), second(0.11)]) is True
    assert met([second(0.13)]) is False


@pytest.mark.parametrize("case", [Case.SHARED_PROMPT, Case.SCALED_IN])
def test_another_answer_or_too_much_computed_is_a_miss(case: Case) -> None:
    most = MOST_COMPUTED[case]
    assert met([replace(second(0.1), different=1)]) is False
    tries = [Found(case, 0.1, 1.0, 0, computed) for computed in (most, most + 1)]
    assert (met(tries[:1]), met(tries[1:])) == (True, False)
    (line,) = verdicts({("bfloat16", case): tries}, {})
    assert line == f"missed: bfloat16: {case}: 0.100; {most + 1} tokens were computed, {most} at most were wanted"


def test_a_cold_start_is_not_counted() -> None:
    tries = [Found(Case.FROM_ZERO, 4.5, 20.0, 0, start_seconds=2.5, held=0.97)]
    assert ratio(tries) == pytest.approx(0.1)
    assert met(tries) is True
    assert "| 4.500 (a cold start 2.500) | 20.000 | 0.100 | 0.2 | met |" in markdown(
        {("bfloat16", Case.FROM_ZERO): tries}, {}, ""
    )


@pytest.mark.parametrize("case", [Case.PEER, Case.STORE, Case.FROM_ZERO])
def test_a_prompt_that_was_computed_is_a_miss_with_a_reason(case: Case) -> None:
    tries = [Found(case, 0.1, 1.0, 0, held=0.01)]
    assert met(tries) is False
    (line,) = verdicts({("float32", case): tries}, {})
    assert "only 1% of a prompt was held" in line


def test_a_case_that_was_not_measured_is_reported_with_its_reason() -> None:
    missing = {"bfloat16": [NotMeasured(Case.SCALED_IN, "an answer ended before")]}
    assert verdicts({}, missing) == [f"not measured: bfloat16: {Case.SCALED_IN}: an answer ended before"]
    assert "| bfloat16 | a stage scaled in" in markdown({}, missing, "facts")
    assert "not measured: an answer ended before" in markdown({}, missing, "facts")


def test_a_peer_is_reported_and_not_judged() -> None:
    tries = [Found(Case.LLAMA_CPP, 0.1, 1.0, 1)]
    assert met(tries) is None
    (row,) = [line for line in markdown({("Q4_1", Case.LLAMA_CPP): tries}, {}, "facts").splitlines() if "Q4_1" in line]
    assert row == f"| Q4_1 | {Case.LLAMA_CPP} | 1 | 0.100 | 1.000 | 0.100 |  |  |  | 1 |"


def test_the_longest_pause_is_after_the_moment() -> None:
    stream = Stream("abcd", [1.0, 9.0, 9.5, 11.5])
    assert stream.since(9.2) == [9.5, 11.5]
    assert stream.pause(9.2) == pytest.approx(2.0)
    assert stream.pause(10.0) == pytest.approx(1.5)


_STREAMED = b"""data: {"choices":[{"delta":{"role":"assistant"}}]}

data: {"choices":[{"delta":{"content":"a"}}]}

data: {"choices":[{"delta":{"content":" b"}}]}

data: {"choices":[],"usage":{"prompt_tokens":50,"prompt_tokens_details":{"cached_tokens":48}}}

data: [DONE]

"""


def test_cached_tokens_are_read_from_the_answer() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=_STREAMED, content_type="text/event-stream")

    async def scenario() -> None:
        async with serving(web.post("/v1/chat/completions", answer)) as url:
            (said,), seconds = await Server(url, "any", {}).answers([[]], 8)
        assert (said.text, said.prompt_tokens, said.cached_tokens) == ("a b", 50, 48)
        assert 0 < said.seconds <= seconds

    asyncio.run(scenario())
