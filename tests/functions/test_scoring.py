"""Texts scored by gateway and stages one after the other, as a Sequence drives them: the whole model's log-probabilities."""

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from cloudevents.core.v1.event import CloudEvent

from eventing.claim_check import ClaimCheck
from eventing.http.binding import from_http, to_binary_http
from eventing.http.delivery import Sender
from eventing.problems import (
    EventExpired,
    EventTooLarge,
    InvalidRequest,
    MalformedEvent,
    NotReady,
    Problem,
    Unauthorized,
    UnknownEventType,
    WrongLayer,
)
from eventing.wire.cloud_event import batch_event, checked_event, data_buffers, json_data, json_event, make_event, reply_id
from eventing.wire.control import ReleaseRow
from eventing.wire.events import BATCH_CONTENT_TYPE, Attribute, Batch, EventType, Result, Row, Status, Tensor, Want
from eventing.wire.framing import expiry_time
from eventing.wire.score import ScoreRequest, ScoreResponse, score_row
from eventing.wire.signature import sign, verify
from functions.stage.serving.handlers import StageIdentity
from functions.stage.serving.scoring import Scorer
from storage.store.object_store import ObjectStore
from storage.store.payload_store import PayloadStore
from tests.support.functions.functions import TOKEN, FunctionProcess, running_gateway
from tests.support.storage.published import CUT, Published
from tests.support.storage.tiny_models import CONTEXT, all_logits

TEXT = "The capital of France is the 12th"


@pytest.fixture(scope="module")
def gateway(published: Published, stages: list[FunctionProcess]) -> Iterator[FunctionProcess]:
    with running_gateway(published, stages, LAMINA_SCORES="on") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def sender() -> Iterator[Sender]:
    with closing(Sender()) as sender:
        yield sender


class Steps:
    """What a Sequence does: each step's reply is the next step's event. It sends no token."""

    def __init__(self, sender: Sender, gateway: FunctionProcess, stages: list[FunctionProcess]) -> None:
        self._sender = sender
        self.urls = [gateway.url, *(stage.url for stage in stages)]

    def send(self, url: str, event: CloudEvent) -> CloudEvent:
        headers, body = to_binary_http(event)
        headers["Prefer"] = "reply"
        reply = self._sender.send(url, headers, body, 30)
        return from_http(reply.headers, reply.body)

    def events(self, event: CloudEvent) -> list[CloudEvent]:
        """The request, what each step answered, the response."""
        events = [event]
        for url in self.urls:
            events.append(self.send(url, events[-1]))
        return events

    def score(self, event: CloudEvent) -> CloudEvent:
        return self.events(event)[-1]


@pytest.fixture
def steps(sender: Sender, gateway: FunctionProcess, stages: list[FunctionProcess]) -> Steps:
    return Steps(sender, gateway, stages)


def request(data: ScoreRequest, id_: str = "job-1", **attributes: Any) -> CloudEvent:
    return json_event(EventType.SCORE_REQUEST, "/jobs", data, id=id_, **attributes)


def altered(event: CloudEvent, **attributes: str | None) -> CloudEvent:
    changed = {**event.get_attributes(), **attributes}
    return checked_event({name: value for name, value in changed.items() if value is not None}, event.get_data())


def expected(published: Published, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logprobs = all_logits(published.model, token_ids).log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def test_a_text_has_the_whole_models_log_probabilities(steps: Steps, published: Published) -> None:
    cause = request(ScoreRequest(text=TEXT))
    reply = steps.score(cause)
    assert reply.get_type() == EventType.SCORE_RESPONSE
    scored = json_data(reply, ScoreResponse)
    assert list(scored.token_ids) == published.tokenizer.encode(TEXT).ids
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected(published, list(scored.token_ids)), atol=1e-4, rtol=0)
    assert scored.logprob_sum == pytest.approx(sum(scored.logprobs))


def test_all_events_of_a_score_have_the_id_of_the_reply_and_end_as_the_request_does(steps: Steps) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=5)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    cause = request(ScoreRequest(text=TEXT), expirytime=end, traceparent=trace)
    events = steps.events(cause)[1:]
    assert {event.get_id() for event in events} == {reply_id(cause)}
    assert {expiry_time(event.get_attributes()) for event in events} == {end}
    assert {event.get_extension("traceparent") for event in events} == {trace}
    assert [event.get_type() for event in events] == [EventType.FORWARD] * len(CUT) + [EventType.SCORE_RESPONSE]
    assert len({event.get_source() for event in events}) == len(events)


def test_a_signed_event_is_good_for_an_hour_and_goes_to_sequences_only(steps: Steps, sender: Sender) -> None:
    cause = request(ScoreRequest(text=TEXT), expirytime=datetime.now(UTC) + timedelta(days=3))
    end = expiry_time(steps.events(cause)[1].get_attributes())
    assert end <= datetime.now(UTC) + timedelta(hours=1)
    headers, body = to_binary_http(cause)
    with pytest.raises(UnknownEventType, match="from a Sequence only"):
        sender.send(steps.urls[0], headers, body, 30)


def test_a_repeated_delivery_has_the_same_reply(steps: Steps) -> None:
    first, again, other = (steps.score(request(ScoreRequest(token_ids=(1, 8, 40, 9)), id_)) for id_ in ("a", "a", "b"))
    assert first.get_id() == again.get_id() != other.get_id()
    assert json_data(first, ScoreResponse) == json_data(again, ScoreResponse)


def test_deliveries_at_the_same_time_do_not_meet(steps: Steps) -> None:
    cause = request(ScoreRequest(text=TEXT * 5))
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(steps.score, [cause] * 16))
    assert {reply.get_id() for reply in replies} == {reply_id(cause)}
    sums = [json_data(reply, ScoreResponse).logprob_sum for reply in replies]
    assert max(sums) - min(sums) < 1e-3


class WideEngine:
    """Answers with hidden states of 4,096 numbers a token, and scores every token with -1."""

    cache = SimpleNamespace(free_tokens=1)

    def __init__(self, scores: bool) -> None:
        self.scores = scores
        self.seen: list[Batch] = []
        self.released: list[str] = []

    def started(self, _: float) -> "WideEngine":
        return self

    def handle(self, batch: Batch, *, source: str, expires_at: float | None = None) -> Batch:
        self.seen.append(batch)
        tokens = len(batch.token_ids)
        if self.scores:
            row = msgspec.structs.replace(batch.rows[0], length=0, result=Result(logprobs=(-1.0,) * (tokens - 1)))
            return Batch((row,), memoryview(array("i")))
        hidden = Tensor("F32", (tokens, 4096), memoryview(bytes(range(256)) * (tokens * 64)))
        return msgspec.structs.replace(batch, hidden=hidden)

    def reserve(self, reservations: object, *, source: str, expires_at: float | None = None) -> list[Status]:
        raise NotImplementedError

    def release(self, releases: Sequence[ReleaseRow], *, source: str) -> int:
        self.released += [release.id for release in releases]
        return len(releases)


@pytest.fixture
def wide(published: Published) -> Iterator[tuple[list[WideEngine], list[Scorer]]]:
    """Two stages without a model, whose hidden states pass no channel."""
    engines = [WideEngine(scores=False), WideEngine(scores=True)]
    with PayloadStore(published.store) as store:
        claims = ClaimCheck(store, published.store.bucket)
        identities = [StageIdentity("0123456789abcdef0123456789abcdef", 2 * k, 2 * k + 2, k == 1, "me") for k in (0, 1)]
        yield engines, [Scorer(own, engine.started, claims, TOKEN) for own, engine in zip(identities, engines, strict=True)]


def first_event(tokens: int = 100) -> CloudEvent:
    batch = Batch((score_row("job", tokens),), memoryview(array("i", range(tokens))))
    end = datetime.now(UTC) + timedelta(minutes=1)
    return sign(batch_event(EventType.FORWARD, "/gateway", batch, layer=0, expirytime=end), TOKEN)


Wide = tuple[list[WideEngine], list[Scorer]]


def test_hidden_states_too_large_for_a_channel_wait_in_the_store(wide: Wide, published: Published) -> None:
    engines, (first, last) = wide
    following = first.answer(first_event())
    assert following.get_data() is None
    assert str(following.get_extension(Attribute.DATAREF)).startswith(f"s3://{published.store.bucket}/claims/")
    verify(following, TOKEN)
    assert json_data(last.answer(following), ScoreResponse).logprob_sum == -99
    hidden = engines[1].seen[0].hidden
    assert bytes(hidden.data[:256]) == bytes(range(256))
    for engine in engines:
        assert engine.released == [engine.seen[0].rows[0].id]
    assert engines[0].released != engines[1].released, "each delivery has a name of its own"


def test_a_response_too_large_for_a_channel_waits_in_the_store_too(wide: Wide, published: Published) -> None:
    _, (_, last) = wide
    data = data_buffers(first_event(20_000))
    end = datetime.now(UTC) + timedelta(minutes=1)
    event = make_event(EventType.FORWARD, "/s", data, BATCH_CONTENT_TYPE, id="job", layer=2, expirytime=end)
    response = last.answer(event)
    assert response.get_data() is None
    with PayloadStore(published.store) as store:
        whole = ClaimCheck(store, published.store.bucket).redeem(response)
    assert json_data(whole, ScoreResponse).logprob_sum == -19_999


def test_a_request_may_wait_in_the_store(steps: Steps, published: Published) -> None:
    with PayloadStore(published.store) as store:
        claims = ClaimCheck(store, published.store.bucket)
        by_claim_check = claims.check_in(request(ScoreRequest(text="word " * 20_000)), datetime.now(UTC))
    assert by_claim_check.get_data() is None
    with pytest.raises(InvalidRequest, match=f"context length is {CONTEXT}"):
        steps.send(steps.urls[0], by_claim_check)


def test_payloads_that_are_gone_or_not_the_same_are_refused(wide: Wide, published: Published) -> None:
    _, (first, last) = wide
    following = first.answer(first_event())
    key = str(following.get_extension(Attribute.DATAREF)).removeprefix(f"s3://{published.store.bucket}/")
    store = ObjectStore(published.store)
    size = len(store.get(key))
    store.put(key, bytes(size))
    with pytest.raises(MalformedEvent, match="SHA-256 differs"):
        last.answer(following)
    store.delete(key)
    with pytest.raises(EventExpired, match="not in the store any more"):
        last.answer(following)
    with pytest.raises(Unauthorized, match="altered"):
        verify(altered(following, datarefsha256="0" * 64), TOKEN)


def test_a_store_that_does_not_answer_is_worth_a_retry(published: Published) -> None:
    nowhere = PayloadStore(replace(published.store, endpoint_url="http://127.0.0.1:1"), retry_seconds=0.1)
    identity = StageIdentity("0123456789abcdef0123456789abcdef", 0, 2, False, "me")
    scorer = Scorer(identity, WideEngine(scores=False).started, ClaimCheck(nowhere, "lamina"), TOKEN)
    with pytest.raises(NotReady, match=r"127\.0\.0\.1:1"):
        scorer.answer(first_event())


def test_a_text_may_fill_the_context(steps: Steps, published: Published) -> None:
    token_ids = tuple(5 + index % 250 for index in range(CONTEXT))
    scored = json_data(steps.score(request(ScoreRequest(token_ids=token_ids))), ScoreResponse)
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected(published, list(token_ids)), atol=2e-4, rtol=0)


def test_nothing_is_kept(steps: Steps, stages: list[FunctionProcess]) -> None:
    steps.score(request(ScoreRequest(text=TEXT)))
    with pytest.raises(InvalidRequest):
        steps.score(request(ScoreRequest(token_ids=tuple([5] * 300))))
    for stage in stages:
        assert "lamina_stage_sequences 0.0" in stage.get("/metrics")[1]


@pytest.mark.parametrize(
    ("data", "problem", "words"),
    [
        (ScoreRequest(text="", token_ids=None), MalformedEvent, "text"),
        (ScoreRequest(token_ids=tuple([5] * (CONTEXT + 1))), InvalidRequest, f"context length is {CONTEXT}"),
        (ScoreRequest(token_ids=(5, 300)), InvalidRequest, "300"),
    ],
)
def test_what_cannot_be_scored_is_refused_for_good(
    steps: Steps, data: ScoreRequest, problem: type[Problem], words: str
) -> None:
    with pytest.raises(problem, match=words) as caught:
        steps.score(request(data))
    assert caught.value.status not in (404, 408, 409, 429)
    assert caught.value.status < 500


def test_an_expired_request_is_dropped(steps: Steps) -> None:
    with pytest.raises(EventExpired):
        steps.score(request(ScoreRequest(text=TEXT), expirytime=datetime.now(UTC) - timedelta(seconds=1)))


def test_stages_are_asked_in_their_order(steps: Steps) -> None:
    _, first, second, *_ = steps.events(request(ScoreRequest(text=TEXT)))
    with pytest.raises(WrongLayer, match="layer 0"):
        steps.send(steps.urls[2], first)
    with pytest.raises(WrongLayer, match="layer 2"):
        steps.send(steps.urls[1], second)


def signed(published: Published, batch: Batch, **attributes: Any) -> CloudEvent:
    usual: dict[str, Any] = {
        "layer": 0,
        "pipeline": published.fingerprint(),
        "expirytime": datetime.now(UTC) + timedelta(minutes=1),
    }
    return sign(batch_event(EventType.FORWARD, "/jobs", batch, **usual | attributes), TOKEN)


def test_one_text_at_a_time(steps: Steps, published: Published) -> None:
    rows = tuple(Row(name, 0, 0, 2, want=Want.LOGPROBS, reserve_tokens=2) for name in "ab")
    event = signed(published, Batch(rows, memoryview(array("i", [5, 6, 7, 8]))))
    with pytest.raises(MalformedEvent, match="one text at a time"):
        steps.send(steps.urls[1], event)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"signature": None}, Unauthorized),
        ({"signature": "0" * 64}, Unauthorized),
        ({"signature": "ü"}, Unauthorized),
        ({"id": "another"}, Unauthorized),
        ({"source": "/another"}, Unauthorized),
        ({"type": "dev.lamina.release"}, Unauthorized),
        ({"layer": "2"}, Unauthorized),
        ({"pipeline": "0123456789abcdef0123456789abcdef"}, Unauthorized),
        ({"expirytime": "2099-01-01T00:00:00Z"}, Unauthorized),
        ({"expirytime": None}, Unauthorized),
        ({"subject": "intermediaries may add attributes"}, None),
    ],
)
def test_an_altered_event_is_refused(
    steps: Steps, published: Published, changes: dict[str, str | None], problem: type[Problem] | None
) -> None:
    batch = Batch((score_row("job", 2),), memoryview(array("i", [5, 6])))
    event = altered(signed(published, batch), **changes)
    with nullcontext() if problem is None else pytest.raises(problem):
        steps.send(steps.urls[1], event)


def test_other_data_is_refused_and_so_is_what_expired(steps: Steps, published: Published) -> None:
    batches = [Batch((score_row("job", 2),), memoryview(array("i", ids))) for ids in ([5, 6], [5, 7])]
    one, other = (signed(published, batch) for batch in batches)
    with pytest.raises(Unauthorized, match="altered"):
        steps.send(steps.urls[1], checked_event(dict(one.get_attributes()), other.get_data()))
    late = signed(published, batches[0], expirytime=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(EventExpired):
        steps.send(steps.urls[1], late)


def test_a_signed_event_is_no_larger_than_what_a_channel_passes_on(steps: Steps, published: Published) -> None:
    batch = Batch((score_row("job", 20_000),), memoryview(array("i", [5] * 20_000)))
    with pytest.raises(EventTooLarge, match="65536"):
        steps.send(steps.urls[1], signed(published, batch))
