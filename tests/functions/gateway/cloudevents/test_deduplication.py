"""An event that is delivered several times is computed once and answered each time."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask.testing import FlaskClient

from eventing.problems import PipelineUnavailable
from functions.gateway.answers.generation import Generation
from functions.gateway.cloudevents import deduplication
from functions.gateway.scheduling.token_stream import TokenStream
from tests.support.functions.gateway import wait_until
from tests.support.functions.scripted_gateway import EVENT, Pipeline, ask, client_of, refuse, stream


def test_a_repeated_delivery_gets_the_same_answer_without_computing_it(client: FlaskClient, pipeline: Pipeline) -> None:
    first = ask(client, {"prompt": "Hi"}, ce_id="7")
    again = ask(client, {"prompt": "Hi"}, ce_id="7")
    assert first.data == again.data
    assert first.headers["ce-id"] == again.headers["ce-id"]
    *tokens, last = stream(ask(client, {"prompt": "Hi"}, ce_id="7", Accept="text/event-stream"))
    assert "".join(token["data"]["text"] for token in tokens) == last["data"]["text"] == "Hello there"
    assert len(pipeline.prompts) == 1
    assert pipeline.value("answers_total", outcome="stop") == 1


@pytest.mark.parametrize("other", [{"ce_id": "8"}, {"ce_source": "/another"}, {"data": {"prompt": "Ho"}}])
def test_an_event_with_other_id_source_or_data_is_computed(
    client: FlaskClient, pipeline: Pipeline, other: dict[str, Any]
) -> None:
    ask(client, {"prompt": "Hi"}, ce_id="7")
    ask(client, other.pop("data", {"prompt": "Hi"}), **({"ce_id": "7"} | other))
    assert len(pipeline.prompts) == 2


def test_clients_do_not_share_answers(pipeline: Pipeline) -> None:
    client = client_of(pipeline, LAMINA_API_KEYS="first-key,second-key")
    for key in ("first-key", "second-key"):
        assert ask(client, {"prompt": "Hi"}, ce_id="7", Authorization=f"Bearer {key}").status_code == 200
    assert len(pipeline.prompts) == 2


def test_a_failed_answer_is_computed_again(client: FlaskClient, pipeline: Pipeline) -> None:
    said = pipeline.script
    for script, status in (
        (refuse(PipelineUnavailable("gone")), 503),
        (pipeline.say("Hel", end=False, then=PipelineUnavailable("gone")), 503),
        (said, 200),
    ):
        pipeline.script = script
        assert ask(client, {"prompt": "Hi"}, ce_id="7").status_code == status
    assert len(pipeline.prompts) == 3


def test_an_old_answer_is_computed_again(client: FlaskClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(client, {"prompt": "Hi"}, ce_id="7")
    monkeypatch.setattr(deduplication, "KEPT_SECONDS", -1.0)
    ask(client, {"prompt": "Hi"}, ce_id="7")
    assert len(pipeline.prompts) == 2


def test_the_oldest_answers_are_dropped_if_there_are_too_many_tokens(
    client: FlaskClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deduplication, "MAX_KEPT_TOKENS", 30)  # "Hello there" has 9
    for id_ in "123412341":
        ask(client, {"prompt": "Hi"}, ce_id=id_)
    assert len(pipeline.prompts) == 9
    ask(client, {"prompt": "Hi"}, ce_id="1")
    assert len(pipeline.prompts) == 9


@pytest.mark.slow
def test_concurrent_deliveries_share_one_computation(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on when some of them leave, also the one that began it."""
    streams: list[TokenStream] = []
    pipeline.script = streams.append
    client = client_of(pipeline)
    gone = threading.Event()
    body: dict[str, Any] = {"json": {"prompt": "Hi"}, "headers": EVENT}

    def deliver(leaves: bool) -> Any:
        return client.post("/", **body, environ_overrides={"lamina.client_gone": gone.is_set} if leaves else {})

    listening: list[object] = []
    listen = deduplication.Deduplicator.listen
    monkeypatch.setattr(
        deduplication.Deduplicator, "listen", lambda *asked: listening.append(listener := listen(*asked)) or listener
    )
    with ThreadPoolExecutor(6) as executor:
        leaving = [executor.submit(deliver, True)]
        wait_until(lambda: streams, "the first delivery, which computes")
        leaving += [executor.submit(deliver, True) for _ in range(2)]
        staying = [executor.submit(deliver, False) for _ in range(3)]
        wait_until(lambda: len(listening) == 6, "all deliveries")
        gone.set()
        assert [reply.result(30).status_code for reply in leaving] == [499] * 3
        assert not pipeline.cancelled.is_set()
        pipeline.say("Hello there")(streams[0])
        replies = [reply.result(30) for reply in staying]
    assert len({reply.data for reply in replies}) == 1
    assert replies[0].get_json()["text"] == "Hello there"
    assert len(pipeline.prompts) == 1


@pytest.mark.slow
def test_the_answer_is_cancelled_when_all_deliveries_have_left(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = lambda _: None
    gone = {"lamina.client_gone": lambda: True}
    for _ in range(2):
        assert client.post("/", json={"prompt": "Hi"}, headers=EVENT, environ_overrides=gone).status_code == 499
    assert pipeline.cancelled.is_set()
    assert len(pipeline.prompts) == 2


@pytest.mark.slow
def test_a_kept_answer_does_not_keep_its_prompt(
    client: FlaskClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only answers count against the limit, and a prompt may be as long as the context."""
    replies: list[weakref.ref[Generation]] = []
    tokens = Generation.tokens
    monkeypatch.setattr(Generation, "tokens", lambda reply, *rest: replies.append(weakref.ref(reply)) or tokens(reply, *rest))
    ask(client, {"prompt": "Hi"}, ce_id="7")
    gc.collect()
    assert replies[0]() is None
    ask(client, {"prompt": "Hi"}, ce_id="7")
    assert len(replies) == len(pipeline.prompts) == 1
