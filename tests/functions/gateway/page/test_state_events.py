"""The stream of the pipeline's state: its events, who may read it, how many at once, and when it ends."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from eventing.http.sse import ServerSentEvent, SSEDecoder
from functions.gateway.answers.authentication import KeyRing
from functions.gateway.app import create_app
from functions.gateway.page import pipeline_state, state_events
from functions.gateway.page.pipeline_state import PipelineState, PipelineWatch, StageDescription
from functions.gateway.page.state_events import merge_patch
from functions.gateway.scheduling.pipeline_status import AnswerStatus, InstanceStatus, PipelineStatus, StageStatus
from functions.gateway.scheduling.wake_up import ColdStart
from tests.support.environments import gateway_config
from tests.support.functions.scripted_gateway import Pipeline, refuse

ADDRESS = "127.0.0.1"


def replica(number: int, state: Any = "ready", event_seconds: float = 0.0) -> InstanceStatus:
    return InstanceStatus(number, "s-00001", state, 1, 900, event_seconds)


def answer(request_id: str, client_id: str = ADDRESS) -> AnswerStatus:
    return AnswerStatus(request_id, client_id, (1,), 5, 7, 0)


class Pipe:
    """A pipeline with one stage, whose state is `now`."""

    def __init__(self) -> None:
        stage = StageStatus((replica(1),), 0, 0.0, False, None)
        self.now = PipelineStatus(time.monotonic(), (stage,), 0, 1, 1, 0, (answer("mine"), answer("other", "somebody else")))
        self.draining = False
        self.watched = PipelineWatch(
            "tiny",
            "f" * 32,
            8,
            (StageDescription("tiny-s0", (0, 2), 1.4),),
            lambda: self.now,
            lambda: True,
            lambda: self.draining,
        )

    def stage(self, **changes: Any) -> None:
        (stage,) = self.now.stages
        self.now = dataclasses.replace(self.now, moment=self.now.moment + 1, stages=(dataclasses.replace(stage, **changes),))

    def client(self, **environ: str) -> FlaskClient:
        config = gateway_config(**environ)
        pipeline = Pipeline()
        pipeline.script = refuse(AssertionError)  # type: ignore[arg-type]
        return create_app(
            config, lambda: None, pipeline.metrics, KeyRing(config.api_keys), lambda _: None, self.watched
        ).test_client()  # type: ignore[arg-type, return-value]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipe:
    monkeypatch.setattr(state_events, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(pipeline_state, "SAMPLE_SECONDS", 0.0)
    return Pipe()


def events(response: TestResponse) -> Iterator[ServerSentEvent]:
    assert response.status_code == 200, response.text
    assert response.content_type == "text/event-stream"
    decoder = SSEDecoder()
    for chunk in response.response:
        yield from decoder.feed(chunk)  # type: ignore[arg-type]


def documents(response: TestResponse) -> Iterator[dict[str, Any]]:
    """The state after each event, as a reader computes it."""
    document: dict[str, Any] = {}
    for number, event in enumerate(events(response)):
        assert event.event == ("change" if number else "snapshot")
        document = applied(msgspec.json.decode(event.data), document)
        yield document


def test_a_snapshot_has_the_whole_state_without_other_clients_answers(pipe: Pipe) -> None:
    with closing(pipe.client().get("/v1/pipeline/events")) as response:
        first = next(documents(response))
    state = msgspec.convert(first, PipelineState)
    assert (state.model, state.queue.limit, state.ready) == ("tiny", 8, True)
    assert (state.stages["0"].service, state.stages["0"].layers, state.stages["0"].target) == ("tiny-s0", (0, 2), 1.4)
    assert list(state.answers) == ["mine"]
    assert state.answers["mine"].route == (1,)


def test_adapters_have_the_numbers_of_their_answers(pipe: Pipe) -> None:
    of_other, waits = (dataclasses.replace(answer(name, "other"), adapter=b"b") for name in ("computes", "waits"))
    pipe.now = dataclasses.replace(pipe.now, answers=(of_other, dataclasses.replace(waits, route=()), answer("mine")))
    pipe.watched = dataclasses.replace(
        pipe.watched, adapters=lambda: {"idle": frozenset((b"a",)), "named": frozenset((b"b", b"c"))}, has_batches=True
    )
    with closing(pipe.client().get("/v1/pipeline/events")) as response:
        state = msgspec.convert(next(documents(response)), PipelineState)
    assert state.adapters is not None
    assert {name: each.running for name, each in state.adapters.items()} == {"idle": 0, "named": 1}
    assert state.batches


def test_running_answers_come_before_waiting_ones(pipe: Pipe) -> None:
    waiting = tuple(dataclasses.replace(answer(f"waits-{number}"), route=()) for number in range(40))
    pipe.now = dataclasses.replace(pipe.now, answers=(*waiting, answer("computes")))
    with closing(pipe.client().get("/v1/pipeline/events")) as response:
        seen = next(documents(response))["answers"]
    assert len(seen) == pipeline_state.MAX_ANSWERS
    assert seen["computes"]["route"] == [1]


@pytest.mark.slow
def test_changes_are_sent_until_the_gateway_drains(pipe: Pipe) -> None:
    with closing(pipe.client().get("/v1/pipeline/events")) as response:
        told = documents(response)
        assert list(next(told)["stages"]["0"]["replicas"]) == ["1"]
        pipe.stage(instances=(replica(1, event_seconds=1.5), replica(2, "starting")), steps=3, step_seconds=0.6)
        changed = next(told)["stages"]["0"]
        assert changed["replicas"]["1"]["concurrency"] == 1.5
        assert changed["replicas"]["2"]["state"] == "starting"
        assert changed["step_seconds"] == pytest.approx(0.2)
        pipe.stage(instances=(replica(2),), start=ColdStart(0.0, 2.5, {"process": 0.1}))
        changed = next(told)["stages"]["0"]
        assert {number: each["state"] for number, each in changed["replicas"].items()} == {"2": "ready"}
        assert changed["start"] == {"seconds": 2.5, "over": True, "phases": {"process": 0.1}}
        pipe.draining = True
        assert not list(told)


def test_the_stream_requires_a_key(pipe: Pipe) -> None:
    client = pipe.client(LAMINA_API_KEYS="a-key")
    assert client.get("/v1/pipeline/events").status_code == 401
    with closing(client.get("/v1/pipeline/events", headers={"Authorization": "Bearer a-key"})) as response:
        assert response.status_code == 200


def test_the_number_of_concurrent_streams_is_limited(pipe: Pipe) -> None:
    client = pipe.client()
    with ExitStack() as watching:
        for _ in range(state_events.MAX_STREAMS):
            watching.enter_context(closing(client.get("/v1/pipeline/events")))
        refused = client.get("/v1/pipeline/events")
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "5"
    for _ in range(3):
        with closing(client.get("/v1/pipeline/events")) as response:
            assert response.status_code == 200


def test_streams_of_a_greedy_client_give_way_to_those_of_five_modest_ones(pipe: Pipe) -> None:
    client = pipe.client(LAMINA_API_KEYS=",".join(["greedy", *(f"modest-{number}" for number in range(5))]))

    def watch(key: str) -> TestResponse:
        return watching.enter_context(closing(client.get("/v1/pipeline/events", headers={"Authorization": f"Bearer {key}"})))

    with ExitStack() as watching:
        greedy = [watch("greedy") for _ in range(state_events.MAX_STREAMS)]
        modest = [watch(f"modest-{number}") for number in range(5)]
        assert watch("greedy").status_code == 429
        assert [response.status_code for response in modest] == [200] * 5
        for response in greedy[-5:]:
            assert [event.event for event in events(response)] == ["snapshot"], "it ends"
        for response in (*greedy[:-5], *modest):
            told = documents(response)
            next(told)
            pipe.stage(instances=(replica(1), replica(2)))
            assert list(next(told)["stages"]["0"]["replicas"]) == ["1", "2"]
            pipe.stage(instances=(replica(1),))


def test_a_stream_without_changes_has_heartbeats_and_an_end(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_events, "KEEP_ALIVE_SECONDS", 0.01)
    monkeypatch.setattr(state_events, "MAX_STREAM_SECONDS", 0.2)
    with closing(pipe.client().get("/v1/pipeline/events")) as response:
        _, *rest = itertools.chain(response.response)
    assert set(rest) == {b":\n\n"}


VALUES = st.recursive(
    st.integers() | st.text(max_size=2) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


def applied(patch: Any, document: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(document) if isinstance(document, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = applied(value, result.get(name))
    return result


@given(DOCUMENTS, DOCUMENTS)
def test_a_patch_turns_the_old_document_into_the_new_one(old: Any, new: Any) -> None:
    patch = merge_patch(old, new)
    assert applied(patch, old) == new
    assert bool(patch) == (old != new)


def test_a_patch_has_only_what_changed() -> None:
    old = {"stages": {"0": {"replicas": {"1": {"routes": 1, "state": "ready"}}}}, "queue": {"waiting": 0}}
    new = {"stages": {"0": {"replicas": {"1": {"routes": 2, "state": "ready"}}}}, "queue": {"waiting": 0}}
    assert merge_patch(old, new) == {"stages": {"0": {"replicas": {"1": {"routes": 2}}}}}
