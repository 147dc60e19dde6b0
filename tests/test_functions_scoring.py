"""Texts scored by stage processes one after the other, as a Sequence drives them: the whole model's log-probabilities."""

import json
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch

from eventing.batch_codec import encode_batch
from eventing.claim_check import ClaimCheck
from eventing.cloud_event import json_data, json_event, make_event, reply_id
from eventing.delivery import Sender
from eventing.events import BATCH_CONTENT_TYPE, Attribute, Batch, EventType, Result, Row, Status, Tensor, Want
from eventing.generation import ReleaseRow, ScoreRequest, ScoreResponse
from eventing.http_binding import from_http, to_binary_http, to_structured_http
from eventing.problems import InvalidRequest, MalformedEvent, Problem, Unauthorized, UnknownEventType, WrongLayer, WrongPipeline
from functions.stage.identity import StageIdentity
from functions.stage.scoring import Scorer
from storage.object_store import ObjectStore
from tests.support.functions import FunctionProcess, running, stage_environment
from tests.support.published import CUT, Published, published_model
from tests.support.tiny_models import CONTEXT, all_logits

TEXT = "The capital of France is the 12th"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    with published_model(tmp_path_factory.mktemp("published")) as model:
        yield model


@pytest.fixture(scope="module")
def stages(published: Published) -> Iterator[list[FunctionProcess]]:
    with running(stage_environment(published, group, LAMINA_SCORING="open") for group in range(len(CUT))) as started:
        yield started


@pytest.fixture(scope="module")
def sender() -> Iterator[Sender]:
    with Sender() as sender:
        yield sender


class Steps:
    """What a Sequence does: each step's reply is the next step's event."""

    def __init__(self, sender: Sender, stages: list[FunctionProcess]) -> None:
        self._sender = sender
        self.urls = [f"{stage.url}/score" for stage in stages]

    def send(self, url: str, event: Any) -> Any:
        headers, body = to_binary_http(event)
        reply = self._sender.send(url, headers, body, 30)
        return from_http(reply.headers, reply.body)

    def score(self, event: Any) -> Any:
        for url in self.urls:
            event = self.send(url, event)
        return event


@pytest.fixture
def steps(sender: Sender, stages: list[FunctionProcess]) -> Steps:
    return Steps(sender, stages)


def request(data: ScoreRequest, id_: str = "job-1", **attributes: Any) -> Any:
    return json_event(EventType.SCORE_REQUEST, "/jobs", data, id=id_, **attributes)


def expected(published: Published, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logprobs = all_logits(published.model, token_ids).log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def test_a_text_has_the_whole_models_log_probabilities(steps: Steps, published: Published) -> None:
    cause = request(ScoreRequest(text=TEXT))
    reply = steps.score(cause)
    assert reply.get_type() == EventType.SCORE_RESPONSE
    assert reply.get_id() == reply_id(cause)
    scored = json_data(reply, ScoreResponse)
    assert list(scored.token_ids) == published.tokenizer.encode(TEXT).ids
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected(published, list(scored.token_ids)), atol=1e-4, rtol=0)
    assert scored.logprob_sum == pytest.approx(sum(scored.logprobs))


def test_a_repeated_delivery_has_the_same_reply(steps: Steps) -> None:
    first, again, other = (steps.score(request(ScoreRequest(token_ids=(1, 8, 40, 9)), id_)) for id_ in ("a", "a", "b"))
    assert first.get_id() == again.get_id() != other.get_id()
    assert json_data(first, ScoreResponse) == json_data(again, ScoreResponse)


class WideEngine:
    """Answers with hidden states of 4,096 numbers a token, and scores every token with -1."""

    free_tokens = 1

    def __init__(self, scores: bool) -> None:
        self.scores = scores
        self.seen: list[Batch] = []
        self.released: list[str] = []

    def engine(self, wait_seconds: float = 0.0) -> "WideEngine":
        return self

    def phases(self) -> dict[str, float]:
        return {}

    def handle(self, batch: Batch, *, source: str, expires_at: float | None = None) -> Batch:
        self.seen.append(batch)
        tokens = len(batch.token_ids)
        if self.scores:
            row = msgspec.structs.replace(batch.rows[0], length=0, result=Result(logprobs=(-1.0,) * (tokens - 1)))
            return Batch((row,), memoryview(array("i")))
        hidden = Tensor("F32", (tokens, 4096), memoryview(bytes(range(256)) * (tokens * 64)))
        return msgspec.structs.replace(batch, hidden=hidden)

    def reserve(self, reservations: object, *, source: str) -> list[Status]:
        raise NotImplementedError

    def release(self, releases: Sequence[ReleaseRow], *, source: str) -> int:
        self.released += [release.id for release in releases]
        return len(releases)


def test_hidden_states_too_large_for_a_channel_wait_in_the_store(published: Published) -> None:
    claims = ClaimCheck(ObjectStore(published.store), published.store.bucket, "claims/")
    engines = WideEngine(scores=False), WideEngine(scores=True)
    first, last = (
        Scorer(
            StageIdentity("0123456789ab", begin, begin + 2, begin == 0, begin == 2, "me"), engine, lambda _: [], lambda: claims
        )
        for begin, engine in zip((0, 2), engines, strict=True)
    )
    following = first.answer(request(ScoreRequest(token_ids=tuple(range(100)))))
    assert following.get_data() is None
    assert str(following.get_extension(Attribute.DATAREF)).startswith(f"s3://{published.store.bucket}/claims/")
    assert json_data(last.answer(following), ScoreResponse).logprob_sum == -99
    hidden = engines[1].seen[0].hidden
    assert hidden is not None
    assert bytes(hidden.data[:256]) == bytes(range(256))
    assert engines[0].released == engines[1].released == [engines[1].seen[0].rows[0].id]


def test_a_text_may_fill_the_context(steps: Steps, published: Published) -> None:
    token_ids = tuple(5 + index % 250 for index in range(CONTEXT))
    scored = json_data(steps.score(request(ScoreRequest(token_ids=token_ids))), ScoreResponse)
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected(published, list(token_ids)), atol=1e-4, rtol=0)


def test_nothing_is_kept(steps: Steps, stages: list[FunctionProcess]) -> None:
    steps.score(request(ScoreRequest(text=TEXT)))
    with pytest.raises(InvalidRequest):
        steps.score(request(ScoreRequest(token_ids=tuple([5] * 300))))
    for stage in stages:
        assert "lamina_stage_sequences 0.0" in stage.get("/metrics")[1]


@pytest.mark.parametrize(
    ("data", "attributes", "problem", "words"),
    [
        (ScoreRequest(text="", token_ids=None), {}, MalformedEvent, "text"),
        (ScoreRequest(token_ids=(5, 300)), {}, InvalidRequest, "300"),
        (ScoreRequest(token_ids=tuple([5] * (CONTEXT + 1))), {}, InvalidRequest, "256 tokens"),
        (ScoreRequest(text=TEXT), {"pipeline": "0123456789ab"}, WrongPipeline, "0123456789ab"),
    ],
)
def test_what_cannot_be_scored_is_refused_for_good(
    steps: Steps, data: ScoreRequest, attributes: dict[str, Any], problem: type[Problem], words: str
) -> None:
    with pytest.raises(problem, match=words) as caught:
        steps.send(steps.urls[0], request(data, **attributes))
    assert caught.value.status not in (404, 408, 409, 429)
    assert caught.value.status < 500


def test_stages_are_asked_in_their_order(steps: Steps, published: Published) -> None:
    with pytest.raises(WrongLayer, match="from layer 0"):
        steps.send(steps.urls[1], request(ScoreRequest(text=TEXT)))
    second = steps.send(steps.urls[0], request(ScoreRequest(text=TEXT)))
    with pytest.raises(WrongLayer, match="layer 2"):
        steps.send(steps.urls[2], second)


def test_one_text_at_a_time(steps: Steps, published: Published) -> None:
    rows = tuple(Row(name, 0, 0, 2, want=Want.LOGPROBS, reserve_tokens=2) for name in "ab")
    body = encode_batch(Batch(rows, memoryview(array("i", [5, 6, 7, 8]))))
    pipeline = published.fingerprint()
    event = make_event(EventType.SCORE_REQUEST, "/jobs", body, BATCH_CONTENT_TYPE, layer="0", pipeline=pipeline)
    with pytest.raises(MalformedEvent, match="one text at a time"):
        steps.send(steps.urls[0], event)


def test_nothing_but_scores_is_open(steps: Steps, stages: list[FunctionProcess], published: Published) -> None:
    forward = make_event(EventType.FORWARD, "/jobs", b"", BATCH_CONTENT_TYPE, layer="0", pipeline=published.fingerprint())
    with pytest.raises(UnknownEventType, match="/score"):
        steps.send(steps.urls[0], forward)
    with pytest.raises(Unauthorized):
        steps.send(stages[0].url, request(ScoreRequest(text=TEXT)))


def test_structured_requests_are_taken_too(steps: Steps, sender: Sender) -> None:
    headers, body = to_structured_http(request(ScoreRequest(text=TEXT)))
    reply = sender.send(steps.urls[0], headers, body, 30)
    assert reply.headers["ce-type"] == EventType.SCORE_REQUEST
    assert json.loads(bytes(body[0]))["data"] == {"text": TEXT}
