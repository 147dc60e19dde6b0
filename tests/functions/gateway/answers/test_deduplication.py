"""An event, or a request with an idempotency key, that comes several times is computed once and answered each time."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask.testing import FlaskClient

from eventing.problems import PipelineUnavailable
from functions.gateway.answers import deduplication
from functions.gateway.answers.generation import Generation
from functions.gateway.scheduling.token_stream import TokenStream
from tests.support.functions.gateway import wait_until
from tests.support.functions.scripted_gateway import EVENT, Pipeline, ask, chat, client_of, refuse, stream

GONE: dict[str, Any] = {"lamina.client_gone": lambda: True}
MESSAGES = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
KEY = {"Idempotency-Key": "order-66"}
BODIES: dict[str, dict[str, Any]] = {
    "event": {"path": "/", "json": {"prompt": "Hi"}, "headers": EVENT},
    "chat": {"path": "/v1/chat/completions", "json": MESSAGES, "headers": KEY},
    "stream": {"path": "/v1/chat/completions", "json": MESSAGES | {"stream": True}, "headers": KEY},
    "completion": {"path": "/v1/completions", "json": {"model": "tiny", "prompt": "Hi"}, "headers": KEY},
    "response": {"path": "/v1/responses", "json": {"model": "tiny", "input": "Hi"}, "headers": KEY},
}


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


@pytest.mark.parametrize(
    "other", [{}, {"headers": {"Idempotency-Key": "order-67"}}, {"json": MESSAGES | {"seed": 1}}, {"headers": {}}]
)
def test_a_request_with_another_key_or_body_or_without_a_key_is_computed(
    client: FlaskClient, pipeline: Pipeline, other: dict[str, Any]
) -> None:
    first = client.post(**BODIES["chat"])
    again = client.post(**BODIES["chat"] | other)
    assert (again.data == first.data) == (not other)
    assert len(pipeline.prompts) == 1 + bool(other)


def test_the_answer_at_another_gateway_has_the_same_id_and_seed(pipeline: Pipeline) -> None:
    replies = [client_of(pipeline).post(**BODIES["chat"]) for _ in range(2)]
    assert replies[0].get_json()["id"] == replies[1].get_json()["id"]
    assert replies[0].headers["X-Request-Id"] == replies[1].headers["X-Request-Id"]
    seeds = [prompt.sampling.seed for prompt in pipeline.prompts]
    assert seeds[0] == seeds[1]
    assert chat(client_of(pipeline)).get_json()["id"] != replies[0].get_json()["id"]
    assert pipeline.prompts[-1].sampling.seed != seeds[0]


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
@pytest.mark.parametrize("body", BODIES)
def test_the_answer_is_cancelled_if_no_client_comes_back(
    client: FlaskClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.setattr(deduplication, "ABANDONED_SECONDS", 0.0)
    pipeline.script = lambda _: None
    for asked in (1, 2):
        assert client.post(**BODIES[body], environ_overrides=GONE).status_code == 499
        wait_until(pipeline.cancelled.is_set, "the end of the answer")
        pipeline.cancelled.clear()
        assert len(pipeline.prompts) == asked


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_a_client_that_lost_its_connection_joins_the_running_answer(pipeline: Pipeline, body: str) -> None:
    streams: list[TokenStream] = []
    pipeline.script = streams.append
    client = client_of(pipeline)
    assert client.post(**BODIES[body], environ_overrides=GONE).status_code == 499
    with ThreadPoolExecutor(1) as executor:
        again = executor.submit(client.post, **BODIES[body])
        pipeline.say("Hello there")(streams[0])
        reply = again.result(30)
    assert reply.status_code == 200
    assert "Hello there" in reply.text or len(stream(reply)) > 9
    assert not pipeline.cancelled.is_set()
    assert len(pipeline.prompts) == 1
    assert client.post(**BODIES[body]).data == reply.data, "the complete answer"


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
