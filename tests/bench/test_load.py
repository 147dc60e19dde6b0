"""The load generator against a gateway that answers, one that fails, and a page of Knative's metrics."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
import pytest
from aiohttp import web

from bench.load.conversations import Load, LoadRecorder, parse_plan, read_replicas, run
from bench.load.report import draw
from bench.load.series import Answer, Failure, Phase, Replicas, Second, percentile, read_records, replica_seconds
from bench.records import of
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateResponse, Timings, TokenEvent, Usage
from tests.bench.served import message, serving

PAGE = """
# TYPE kn_revision_pods_count gauge
kn_revision_pods_count{kn_service_name="stage",kn_revision_name="stage-00001"} 2
# TYPE kn_revision_pods_pending_count gauge
kn_revision_pods_pending_count{kn_service_name="stage",kn_revision_name="stage-00001"} 1
# TYPE something_else gauge
something_else 5
"""


async def answering(request: web.Request) -> web.StreamResponse:
    """Three tokens and the end, as a gateway streams them."""
    await request.read()
    reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await reply.prepare(request)
    for index in range(3):
        await reply.write(message(EventType.TOKEN, TokenEvent(index, index, "a")))
    timings = Timings(queue_seconds=0, time_to_first_token_seconds=0, total_seconds=0, tokens_per_second=0, replays=1)
    end = GenerateResponse("aaa", (0, 1, 2), "length", Usage(4, 3, 7), timings)
    await reply.write(message(EventType.GENERATE_RESPONSE, end))
    return reply


async def failing(request: web.Request) -> web.Response:
    return web.Response(status=503, text="asleep")


async def metrics(request: web.Request) -> web.Response:
    return web.Response(text=PAGE)


def load(folder: Path, handler: Callable[[web.Request], Awaitable[web.StreamResponse]], plan: str) -> Path:
    """The records of a run of `plan` against a gateway that is `handler`."""
    output = folder / "load.jsonl"

    async def whole() -> None:
        async with serving(web.post("/", handler), web.get("/metrics", metrics)) as url:
            with LoadRecorder(output) as recorder:
                await run(Load(url, parse_plan(plan), (3, 3), f"{url}/metrics"), recorder)

    asyncio.run(whole())
    return output


@pytest.mark.slow
def test_a_run_is_recorded_second_by_second(tmp_path: Path) -> None:
    records = read_records(load(tmp_path, answering, "1:1.2,4:1.2,0:0"))
    answers = of(Answer, records)
    assert [phase.conversations for phase in of(Phase, records)] == [1, 4, 0]
    assert not of(Failure, records)
    assert {answer.conversation for answer in answers} == {0, 1, 2, 3}
    assert all(answer.tokens == 3 and answer.replays == 1 and answer.text == "aaa" for answer in answers)
    seconds = of(Second, records)
    assert len(seconds) >= 2  # more on a machine that stood still meanwhile
    assert 0 < sum(second.tokens for second in seconds) <= 3 * len(answers)
    replicas = of(Replicas, records)
    assert replicas[0] == Replicas(replicas[0].t, "stage", "stage-00001", ready=2, starting=1)
    picture = tmp_path / "load.png"
    draw(records, picture, "a run")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_failures_are_recorded_and_do_not_storm(tmp_path: Path) -> None:
    failures = of(Failure, read_records(load(tmp_path, failing, "2:1.5,0:0")))
    assert 2 <= len(failures) <= 6
    assert all("503" in failure.reason and "asleep" in failure.reason for failure in failures)


def test_replicas_are_read_by_revision() -> None:
    assert read_replicas(PAGE, 7.0) == [Replicas(7.0, "stage", "stage-00001", ready=2, starting=1)]


def test_cost_is_the_area_against_the_peak() -> None:
    records = [Replicas(t, "stage", "r", ready=pods) for t, pods in ((0.0, 0), (10.0, 4), (20.0, 1), (40.0, 0))]
    assert replica_seconds(records) == {"stage": (60, 160)}


def test_percentile_is_a_value_that_occurred() -> None:
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([1] * 19 + [9], 0.95) == 9
    assert str(percentile([], 0.5)) == "nan"


@pytest.mark.parametrize("plan", ["", "1", "1:x", "-1:2", "a:1"])
def test_an_invalid_plan_is_refused(plan: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_plan(plan)
