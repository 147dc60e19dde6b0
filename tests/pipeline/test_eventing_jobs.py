"""Jobs through Broker, Triggers and Sequence on one machine, as a cluster would run them, with deliveries that go wrong.

Real processes, real HTTP, the rendered objects. Every tenth delivery is made twice, every twentieth fails once, half of these
after the subscriber has done its work; the gateway, subscriber of both kinds of jobs, is killed and started again. A sink that
drops what it knows counts each job once, and what it counts is what the functions answer without any of this.
"""

import asyncio
import base64
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
import yaml
from cloudevents.core.v1.event import CloudEvent

from eventing.http.binding import from_http, to_binary_http
from eventing.wire.cloud_event import json_data, json_event, make_event, reply_id
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateRequest, GenerateResponse
from eventing.wire.score import ScoreRequest, ScoreResponse
from knative.local.eventing.delivery import Subscription
from knative.local.eventing.local_eventing import LocalEventing
from knative.local.eventing.targets import HttpTarget, NoReply, TargetReply
from knative.local.kubelet.processes import free_port
from knative.render.eventing import eventing_objects
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.kubernetes_object import to_yaml
from knative.spec.spec_file import spec_from_dict
from tests.support.functions.functions import FunctionProcess, gateway_environment, stage_environment
from tests.support.knative.event_sink import EventSink, event_sink, post
from tests.support.knative.platform import client, until
from tests.support.storage.published import CUT, Published
from tests.support.storage.tiny_models import CONTEXT, all_logits

JOBS = 100
POISON = {
    "too-long": (EventType.SCORE_REQUEST, {"token_ids": [5] * (CONTEXT + 1)}, "422", "context-length-exceeded"),
    "no-such-token": (EventType.SCORE_REQUEST, {"token_ids": [5, 300]}, "422", "invalid-request"),
    "not-understood": (EventType.GENERATE_REQUEST, {"prompt": "x", "max_token": 5}, "400", "malformed-event"),
    "too-late": (EventType.GENERATE_REQUEST, {"prompt": "x"}, "410", "event-expired"),
}  # event id → type, data, and the code and problem that its dead letter names


class Functions:
    """Three stages and the events' gateway as processes. A restarted one keeps its port, as a Service keeps its name."""

    def __init__(self, published: Published) -> None:
        self._running = ExitStack()
        self.environments: dict[str, dict[str, str]] = {}
        self.processes: dict[str, FunctionProcess] = {}
        for group in range(len(CUT)):
            # A port that no outgoing connection takes while the process is down.
            self._start(f"s{group}", stage_environment(published, group, PORT=str(free_port())))
        stages = [self.processes[f"s{group}"].url for group in range(len(CUT))]
        self._start("ev", gateway_environment(published, stages, LAMINA_SCORES="on", PORT=str(free_port())))
        for process in self.processes.values():
            process.wait_ready()

    def url(self, namespace: str, service: str) -> str | None:
        """The URL of the Service that the rendered objects name."""
        process = self.processes.get(service.rpartition("-")[2])
        return None if process is None else process.url

    def kill(self, name: str) -> None:
        self.processes[name].process.kill()
        self.processes[name].wait_end()

    def restart(self, name: str) -> None:
        self._start(name, self.environments[name])

    def close(self) -> None:
        self._running.close()

    def _start(self, name: str, environ: dict[str, str]) -> None:
        self.environments[name] = environ
        self.processes[name] = self._running.enter_context(FunctionProcess(environ))


@pytest.fixture(scope="module")
def functions(published: Published) -> Iterator[Functions]:
    functions = Functions(published)
    yield functions
    functions.close()


@dataclass
class Faults:
    """What goes wrong, by the number of the delivery."""

    deliveries: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    attempts: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    repeated: int = 0
    failed: int = 0

    def put_into(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run, deliver = Subscription.run, HttpTarget.deliver

        async def repeated_run(subscription: Subscription, event: CloudEvent) -> None:
            if next(self.deliveries) % 10:
                await run(subscription, event)
                return
            self.repeated += 1
            await asyncio.gather(run(subscription, event), run(subscription, event))

        async def failing_deliver(target: HttpTarget, event: CloudEvent, seconds: float | None, **more: bool) -> TargetReply:
            number = next(self.attempts)
            if number % 20:
                return await deliver(target, event, seconds, **more)
            self.failed += 1
            if number % 40:
                await deliver(target, event, seconds, **more)
                raise NoReply("the answer got lost")
            return TargetReply(HTTPStatus.SERVICE_UNAVAILABLE)

        monkeypatch.setattr(Subscription, "run", repeated_run)
        monkeypatch.setattr(HttpTarget, "deliver", failing_deliver)


def pipeline(published: Published, answers: str, dead_letters: str) -> ResolvedPipeline:
    document = {
        "name": "jobs",
        "model": {"name": "tiny", "dtype": "float32"},
        "cut": ",".join(f"{first}:{last}" for first, last in CUT),
        "image": "registry.example/lamina:1",
        "store": {"endpoint": "http://store.example:9000"},
        "eventing": {
            "dead_letter_sink": dead_letters,
            "reply_sink": answers,
            "retry": 9,
            "backoff_seconds": 0.1,
            "timeout_seconds": 30,
        },
    }
    return ResolvedPipeline(spec_from_dict(document), CUT, published.manifest.digest)


def generation_job(number: int) -> CloudEvent:
    """Every other one samples, with the seed that follows from the event."""
    data = GenerateRequest(prompt=f"Job {number} of many: ", max_tokens=6, temperature=float(number % 2))
    return json_event(EventType.GENERATE_REQUEST, "/jobs", data, id=f"generate-{number}")


def scoring_job(number: int) -> CloudEvent:
    """From a few tokens to so many that their hidden states wait in the store."""
    return json_event(
        EventType.SCORE_REQUEST, "/jobs", ScoreRequest(text=f"{number} is the " * (number % 9 + 1)), id=f"s-{number}"
    )


def poison(id_: str) -> CloudEvent:
    type_, data, *_ = POISON[id_]
    late: dict[str, Any] = {"expirytime": datetime.now(UTC) - timedelta(seconds=1)} if id_ == "too-late" else {}
    return make_event(type_, "/jobs", json.dumps(data).encode(), id=id_, **late)


async def ask(session: aiohttp.ClientSession, url: str, event: CloudEvent) -> CloudEvent:
    headers, buffers = to_binary_http(event)
    headers["Prefer"] = "reply"
    async with session.post(url, data=b"".join(buffers), headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        return from_http(dict(reply.headers), await reply.read())


async def score(session: aiohttp.ClientSession, functions: Functions, event: CloudEvent) -> CloudEvent:
    """As a Sequence would, without one."""
    for name in ("ev", *(f"s{group}" for group in range(len(CUT)))):
        event = await ask(session, functions.processes[name].url, event)
    return event


async def restart_meanwhile(functions: Functions, answers: EventSink) -> None:
    """With a third of the answers in."""
    await until(lambda: len(answers.once()) >= 2 * JOBS / 3)
    await asyncio.to_thread(functions.kill, "ev")
    functions.restart("ev")


async def run_jobs(
    published: Published, functions: Functions, folder: Path, jobs: list[CloudEvent]
) -> tuple[EventSink, EventSink]:
    """The sinks of answers and of dead letters, when everything that was sent has come to one of them."""
    async with event_sink() as answers, event_sink() as dead_letters, client() as session, AsyncExitStack() as stack:
        eventing = LocalEventing(functions.url, folder)
        stack.push_async_callback(eventing.stop)
        rendered = to_yaml(eventing_objects(pipeline(published, answers.url, dead_letters.url)))
        await eventing.apply(yaml.safe_load_all(rendered))
        restarting = asyncio.create_task(restart_meanwhile(functions, answers))
        for job in jobs:
            assert await post(session, eventing.broker_url("jobs"), job) == (202, "")
        await restarting
        await until(lambda: eventing.status()["in_progress"] == 0)
        return answers, dead_letters


def check_scores(published: Published, found: ScoreResponse, direct: ScoreResponse) -> None:
    assert found.token_ids == direct.token_ids
    with torch.inference_mode():
        logprobs = all_logits(published.model, list(found.token_ids)).log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(found.token_ids[1:])[:, None])[:, 0].tolist()
    for values in (found.logprobs, direct.logprobs):
        assert values == pytest.approx(expected, abs=1e-4)


def test_each_job_counts_once_whatever_goes_wrong(
    published: Published, functions: Functions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generating, scoring = [[make(number) for number in range(JOBS)] for make in (generation_job, scoring_job)]
    poisoned = [poison(id_) for id_ in POISON]
    jobs = [event for pair in zip(generating, scoring, strict=True) for event in pair]
    jobs[10:10] = poisoned
    with monkeypatch.context() as patch:
        faults = Faults()
        faults.put_into(patch)
        answers, dead_letters = asyncio.run(run_jobs(published, functions, tmp_path, jobs))

    check_dead_letters({event.get_id(): event for event in dead_letters.events})  # first: they say why a job has no answer
    once = {id_: event for (_, id_), event in answers.once().items()}
    assert sorted(once) == sorted(map(reply_id, generating + scoring))
    assert len(answers.once()) == 2 * JOBS
    assert faults.repeated >= 60
    assert faults.failed >= 30
    assert len(answers.events) > 2 * JOBS, "repetitions reach the sink, which drops them"
    asyncio.run(compare(published, functions, once, generating, scoring))


async def compare(
    published: Published,
    functions: Functions,
    once: Mapping[str, CloudEvent],
    generating: list[CloudEvent],
    scoring: list[CloudEvent],
) -> None:
    async with client() as session:
        gateway = functions.processes["ev"].url
        direct = await asyncio.gather(*(ask(session, gateway, job) for job in generating))
        for job, reply in zip(generating, direct, strict=True):
            found = json_data(once[reply_id(job)], GenerateResponse)
            expected = json_data(reply, GenerateResponse)
            assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
        for job in scoring:
            reply = await score(session, functions, job)
            assert reply.get_id() == reply_id(job)
            check_scores(published, json_data(once[reply_id(job)], ScoreResponse), json_data(reply, ScoreResponse))


def check_dead_letters(letters: Mapping[str, CloudEvent]) -> None:
    """They are the events as they were sent: the gateway refuses them before any stage."""
    unexpected = {id_: letter.get_attributes() for id_, letter in letters.items() if id_ not in POISON}
    assert not unexpected
    assert sorted(letters) == sorted(POISON)
    for id_, (_, _, code, problem) in POISON.items():
        attributes: dict[str, Any] = dict(letters[id_].get_attributes())
        assert attributes["knativeerrorcode"] == code
        assert attributes["knativeerrordest"].startswith("http://127.0.0.1:")
        document = json.loads(base64.b64decode(attributes["knativeerrordata"]))
        assert document["type"] == f"urn:lamina:problem:{problem}"
        assert document["detail"]
