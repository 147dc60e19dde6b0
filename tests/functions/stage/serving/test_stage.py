"""Stage processes over real HTTP, with a tiny model out of a real store: the right tokens, and every refusal."""

import json
import socket
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from typing import Any

import pytest

from eventing.http.binding import from_http, to_binary_http, to_structured_http
from eventing.http.delivery import HttpReply, Sender
from eventing.problems import (
    EventExpired,
    EventTooLarge,
    MalformedEvent,
    Problem,
    Unauthorized,
    UnknownEventType,
    UnsupportedMediaType,
    WrongLayer,
    WrongPipeline,
)
from eventing.wire.batch_codec import decode_batch, encode_batch
from eventing.wire.cloud_event import Data, batch_data, json_data, json_event, make_event
from eventing.wire.control import (
    HOLD_SECONDS,
    ReleaseReply,
    ReleaseRequest,
    ReleaseRow,
    ReserveReply,
    ReserveRequest,
    ReserveRow,
    WarmupReply,
    WarmupRequest,
)
from eventing.wire.events import BATCH_CONTENT_TYPE, Attribute, Batch, EventType, Row, Status, Want
from eventing.wire.signature import sign
from functions.stage.native.library import library
from tests.support.functions.functions import TOKEN, FunctionProcess, running, running_stages, stage_environment, wait_until
from tests.support.functions.metrics import metric
from tests.support.storage.published import CUT, Published

SOURCE = "/test"
SECOND_TOKEN = "the-token-of-before"
NOTHING = encode_batch(Batch((Row("refused", 0, 0, 0, status=Status.FULL),), memoryview(array("i"))))
"""A batch whose only row was refused before: every stage accepts it and computes nothing."""
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def stages(published: Published) -> Iterator[list[FunctionProcess]]:
    with running_stages(published, LAMINA_SECOND_PIPELINE_TOKEN=SECOND_TOKEN) as started:
        yield started


@pytest.fixture(scope="module")
def sender() -> Iterator[Sender]:
    with closing(Sender()) as sender:
        yield sender


class Client:
    """Sends events to one stage as a gateway does."""

    def __init__(self, sender: Sender, stage: FunctionProcess, published: Published, group: int) -> None:
        self._sender = sender
        self.url = stage.url
        self.attributes: dict[str, Any] = {Attribute.PIPELINE: published.fingerprint(), Attribute.LAYER: CUT[group][0]}

    def post(self, headers: dict[str, str], body: Any) -> HttpReply:
        return self._sender.send(self.url, headers, body, 30)

    def send(self, event: Any, headers: dict[str, str] = AUTHORIZED) -> Any:
        own, body = to_binary_http(event)
        reply = self.post(own | headers, body)
        return from_http(reply.headers, reply.body)

    def event(self, type_: str, data: Data, content_type: str = BATCH_CONTENT_TYPE, **changes: Any) -> Any:
        return make_event(type_, SOURCE, data, content_type, **(self.attributes | changes))

    def forward(self, body: Data, **changes: Any) -> Any:
        return self.send(self.event(EventType.FORWARD, body, **changes))

    def await_room(self, tokens: int, *rows: ReleaseRow) -> Any:
        attributes = self.attributes | {Attribute.AWAITED_TOKENS: tokens}
        return self.send(json_event(EventType.RELEASE, SOURCE, ReleaseRequest(rows), **attributes))


@pytest.fixture
def clients(sender: Sender, stages: list[FunctionProcess], published: Published) -> list[Client]:
    return [Client(sender, stage, published, group) for group, stage in enumerate(stages)]


@pytest.fixture
def first(clients: list[Client]) -> Client:
    return clients[0]


def rows_of(id_: str, tokens: list[int], position: int = 0, reserve: int | None = 64) -> Batch:
    row = Row(id_, 0, position, len(tokens), want=Want.TOKEN, reserve_tokens=reserve)
    return Batch((row,), memoryview(array("i", tokens)))


def step(clients: list[Client], batch: Batch) -> Batch:
    """Sends a batch through all stages; the body of each reply is the body of the next request."""
    body: Data = encode_batch(batch)
    for client in clients:
        reply = client.forward(body)
        body = reply.get_data()
    return batch_data(reply)


@pytest.mark.slow  # the oracle needs torch
def test_three_stages_give_the_tokens_of_the_whole_model(clients: list[Client], published: Published) -> None:
    from tests.support.storage.tiny_models import greedy

    prompt = [1, 40, 90, 33, 7]
    expected = greedy(published.model, prompt, 8)
    seen: list[int] = []
    batch = rows_of("exact", prompt)
    while len(seen) < len(expected):
        (row,) = step(clients, batch).rows
        assert row.result is not None
        assert row.result.tokens is not None
        seen.extend(row.result.tokens)
        batch = rows_of("exact", seen[-1:], len(prompt) + len(seen) - 1, None)
    assert seen == expected


def test_a_reply_has_its_instance_and_free_tokens(clients: list[Client], published: Published) -> None:
    reply = clients[0].forward(encode_batch(rows_of("who", [5])))
    assert reply.get_type() == EventType.FORWARD
    assert reply.get_extension(Attribute.LAYER) == str(CUT[1][0])
    assert reply.get_extension(Attribute.PIPELINE) == published.fingerprint()
    assert int(reply.get_extension(Attribute.FREE_TOKENS)) > 0
    assert reply.get_extension(Attribute.INSTANCE) == clients[0].forward(NOTHING).get_extension(Attribute.INSTANCE)
    assert len({client.forward(NOTHING).get_extension(Attribute.INSTANCE) for client in clients}) == len(clients)


def test_server_timing_tells_the_engine_from_the_codec_and_the_pass(first: Client) -> None:
    headers, body = to_binary_http(first.event(EventType.FORWARD, encode_batch(rows_of("timing", [5]))))
    timing = first.post(headers | AUTHORIZED, body).headers["server-timing"]
    assert [part.split(";")[0] for part in timing.split(", ")] == ["engine", "codec", "pass"]
    assert timing.endswith(";desc=1"), "the tokens of the pass"


def test_reserve_and_release(first: Client) -> None:
    rows = (ReserveRow("small", 0, 10), ReserveRow("huge", 0, 10_000_000))
    event = json_event(EventType.RESERVE, SOURCE, ReserveRequest(rows), **first.attributes)
    reply = json_data(first.send(event), ReserveReply)
    assert [row.status for row in reply.rows] == [Status.OK, Status.INVALID]
    released = ReleaseRequest((ReleaseRow("small", 0), ReleaseRow("unknown", 3)))
    event = json_event(EventType.RELEASE, SOURCE, released, **first.attributes)
    assert json_data(first.send(event), ReleaseReply).released == 1


@pytest.mark.slow
def test_a_release_that_waits_for_memory_frees_its_rows_and_is_answered_once_there_is_memory(first: Client) -> None:
    event = json_event(EventType.RESERVE, SOURCE, ReserveRequest((ReserveRow("one", 0, 64),)), **first.attributes)
    free = int(first.send(event).get_extension(Attribute.FREE_TOKENS))
    began = time.monotonic()
    reply = first.await_room(free + 64, ReleaseRow("one", 0))
    assert time.monotonic() - began < HOLD_SECONDS
    assert json_data(reply, ReleaseReply).released == 1
    assert int(reply.get_extension(Attribute.FREE_TOKENS)) == free + 64
    assert json_data(first.await_room(free + 65), ReleaseReply).released == 0
    assert time.monotonic() - began >= HOLD_SECONDS


@pytest.mark.slow
def test_a_stopping_stage_answers_releases_that_wait_for_memory(published: Published, sender: Sender) -> None:
    with running([stage_environment(published, 0)]) as (stage,), ThreadPoolExecutor(1) as threads:
        client = Client(sender, stage, published, 0)
        began = time.monotonic()
        reply = threads.submit(client.await_room, 10_000_000)
        wait_until(lambda: metric(stage, "lamina_stage_events_in_flight") == 1, 10)
        stage.process.terminate()
        assert json_data(reply.result(120), ReleaseReply).released == 0
        assert time.monotonic() - began < HOLD_SECONDS


def test_warm_up_reports_the_start(first: Client) -> None:
    reply = json_data(first.send(json_event(EventType.WARMUP, SOURCE, WarmupRequest(), **first.attributes)), WarmupReply)
    assert set(reply.start_up) == {"process", "import", "connect", "first_byte", "last_byte", "place", "warm_up"}
    assert reply.loaded_bytes == reply.total_bytes > 0
    at_once = json_event(EventType.WARMUP, SOURCE, WarmupRequest(wait=False), **first.attributes)
    assert json_data(first.send(at_once), WarmupReply) == reply
    assert reply.start_up["process"] < reply.start_up["connect"] <= reply.start_up["last_byte"] < reply.start_up["warm_up"]


def test_probes_and_metrics(stages: list[FunctionProcess], first: Client) -> None:
    first.forward(encode_batch(rows_of("metrics", [5, 6])))
    assert stages[0].get("/healthz") == (200, {"alive": True})
    readiness = stages[0].get("/readyz")[1]
    assert (readiness["ready"], readiness["layers_run_by"]) == (True, f"C, {library().level}")
    status, text = stages[0].get("/metrics")
    assert status == 200
    for name in (
        'lamina_stage_events_total{status="200",type="dev.lamina.forward"}',
        'lamina_stage_rows_total{status="ok"}',
        "lamina_stage_compute_seconds_sum",
        "lamina_stage_queue_seconds_count",
        "lamina_stage_codec_seconds_count",
        "lamina_stage_free_tokens",
        "lamina_stage_sequences",
        "lamina_stage_kv_resident_bytes",
        "lamina_stage_checkpoint_bytes",
        "lamina_stage_kv_remembered_tokens",
        'lamina_stage_kv_hits_total{tier="memory"}',
        'lamina_startup_phase_seconds{phase="last_byte"}',
        "lamina_ready 1.0",
    ):
        assert name in text


@pytest.mark.parametrize(
    ("changes", "problem", "words"),
    [
        ({"pipeline": "0123456789abcdef0123456789abcdef"}, WrongPipeline, "'0123456789abcdef0123456789abcdef'"),
        ({"pipeline": None}, MalformedEvent, "pipeline is missing"),
        ({"layer": 2}, WrongLayer, "layer 2"),
        ({"layer": "two"}, MalformedEvent, "'two'"),
        ({"expirytime": datetime.now(UTC) - timedelta(seconds=5)}, EventExpired, "expired"),
        ({"expirytime": "soon"}, MalformedEvent, "'soon'"),
    ],
)
def test_events_of_other_pipelines_layers_and_times_are_refused(
    first: Client, changes: dict[str, Any], problem: type[Problem], words: str
) -> None:
    with pytest.raises(problem, match=words):
        first.forward(encode_batch(rows_of("refused", [5])), **changes)
    assert_still_serving(first)


def assert_still_serving(client: Client) -> None:
    (row,) = batch_data(client.forward(encode_batch(rows_of("serving", [5])))).rows
    assert row.status is Status.OK


@pytest.mark.parametrize(
    ("authorization", "words"),
    [
        ({}, "no Authorization"),
        ({"Authorization": "Bearer wrong"}, "another token"),
        ({"Authorization": TOKEN}, "another token"),
    ],
)
def test_a_stage_accepts_its_pipelines_token_only(first: Client, authorization: dict[str, str], words: str) -> None:
    with pytest.raises(Unauthorized, match=words):
        first.send(first.event(EventType.FORWARD, encode_batch(rows_of("token", [5]))), authorization)
    assert_still_serving(first)


def test_a_stage_accepts_both_tokens_during_rotation(first: Client) -> None:
    body = encode_batch(rows_of("second token", [5]))
    reply = first.send(first.event(EventType.FORWARD, body), {"Authorization": f"Bearer {SECOND_TOKEN}"})
    assert [row.status for row in batch_data(reply).rows] == [Status.OK]
    end = datetime.now(UTC) + timedelta(minutes=1)
    with pytest.raises(Unauthorized, match="another token"):
        first.send(first.event(EventType.FORWARD, body), {"Authorization": "Bearer a-third"})
    for token, problem in ((TOKEN, MalformedEvent), (SECOND_TOKEN, MalformedEvent), ("a-third", Unauthorized)):
        with pytest.raises(problem):  # signed events are for scoring: who is known is told what is wrong with this one
            first.send(sign(first.event(EventType.WARMUP, b"no JSON", "application/json", expirytime=end), token), {})


@pytest.mark.parametrize(
    ("type_", "data", "content_type", "problem", "words"),
    [
        ("dev.lamina.unknown", b"{}", "application/json", UnknownEventType, "dev.lamina.warmup"),
        (EventType.FORWARD, b"not a batch at all, by far", BATCH_CONTENT_TYPE, MalformedEvent, "begins with"),
        (EventType.FORWARD, b"", BATCH_CONTENT_TYPE, MalformedEvent, "0 bytes"),
        (EventType.FORWARD, b"{}", "application/json", UnsupportedMediaType, "application/json"),
        (EventType.RESERVE, b'{"rows": []}', "application/json", MalformedEvent, "rows"),
        (EventType.RESERVE, b'{"rows": "\xff"}', "application/json", MalformedEvent, "reserve"),
        (EventType.RELEASE, b'{"rows": [{"id": "a", "attempt": -1}]}', "application/json", MalformedEvent, "attempt"),
        (EventType.WARMUP, b'{"hurry": true}', "application/json", MalformedEvent, "hurry"),
    ],
)
def test_malformed_events_are_refused(
    first: Client, type_: str, data: bytes, content_type: str, problem: type[Problem], words: str
) -> None:
    with pytest.raises(problem, match=words):
        first.send(first.event(type_, data, content_type))
    assert_still_serving(first)


def test_a_request_without_an_event_is_refused(first: Client) -> None:
    with pytest.raises(MalformedEvent, match="not a CloudEvent"):
        first.post(AUTHORIZED | {"Content-Type": "application/json"}, [b"{}"])
    with pytest.raises(MalformedEvent, match="UTF-8"):
        first.post(AUTHORIZED | {"Content-Type": "application/cloudevents+json"}, [b'{"specversion": "\xff"}'])
    assert_still_serving(first)


def test_a_batch_travels_in_binary_mode_only(first: Client) -> None:
    event = first.event(EventType.FORWARD, b'{"rows": []}', "application/json")
    headers, body = to_structured_http(event)
    document = json.loads(bytes(body[0])) | {"datacontenttype": BATCH_CONTENT_TYPE}
    with pytest.raises(UnsupportedMediaType, match="binary mode only"):
        first.post(headers | AUTHORIZED, [json.dumps(document).encode()])


def test_an_oversized_event_is_refused_before_it_is_read(first: Client) -> None:
    headers, _ = to_binary_http(first.event(EventType.FORWARD, b""))
    with pytest.raises(EventTooLarge, match="the most is 268435456"):
        first.post(headers | AUTHORIZED, [memoryview(bytearray(2**28 + 1))])
    assert_still_serving(first)


def exchange(url: str, method: str, path: str, **request: Any) -> tuple[int, bytes]:
    with closing(HTTPConnection(url.removeprefix("http://"), timeout=30)) as connection:
        connection.request(method, path, **request)
        reply = connection.getresponse()
        return reply.status, reply.read()


def test_an_event_whose_body_comes_in_chunks_is_answered(first: Client) -> None:
    headers, _ = to_binary_http(first.event(EventType.FORWARD, b""))
    body = b"".join(encode_batch(rows_of("in chunks", [5])))
    chunks = iter([body[:30], body[30:]])
    status, answer = exchange(first.url, "POST", "/", body=chunks, headers=headers | AUTHORIZED, encode_chunked=True)
    assert status == 200
    assert [row.status for row in decode_batch(answer).rows] == [Status.OK]


def test_refused_events_are_counted_by_type_and_status(stages: list[FunctionProcess], first: Client) -> None:
    with pytest.raises(Unauthorized):
        first.send(first.event(EventType.WARMUP, b"{}", "application/json"), {})
    with pytest.raises(UnknownEventType):
        first.send(first.event("dev.lamina.dance", b"{}", "application/json"))
    with pytest.raises(MalformedEvent):
        first.send(first.event(EventType.WARMUP, b"no JSON", "application/json"))
    text = stages[0].get("/metrics")[1]
    for labels in ('status="401",type="unread"', 'status="400",type="unknown"', 'status="400",type="dev.lamina.warmup"'):
        assert f"lamina_stage_events_total{{{labels}}}" in text


def test_probes_on_the_clients_port_have_no_details(first: Client) -> None:
    assert exchange(first.url, "GET", "/readyz") == (200, b'{"ready":true}')
    assert exchange(first.url, "GET", "/healthz") == (200, b'{"alive":true}')
    assert exchange(first.url, "GET", "/metrics")[0] == 404


def test_strangers_are_refused_before_their_body_is_read(first: Client) -> None:
    """Also with a signature that could be seen only by parsing the event's JSON."""
    host, port = first.url.removeprefix("http://").split(":")
    structured = b"Content-Type: application/cloudevents+json\r\nce-signature: 00\r\n"
    for headers in (b"", b"Authorization: Bearer wrong\r\n", structured):
        with socket.create_connection((host, int(port)), timeout=30) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: here\r\n" + headers + b"Content-Length: 1000000\r\n\r\n")
            seen = sock.recv(4096)
            assert seen.startswith(b"HTTP/1.1 401 ")
            assert b'WWW-Authenticate: Bearer realm="lamina"\r\n' in seen


def test_other_paths_and_methods_are_problem_documents(stages: list[FunctionProcess]) -> None:
    assert stages[0].get("/nothing")[1]["status"] == 404
    status, document = stages[0].get("/")
    assert (status, document["title"]) == (405, "Method Not Allowed")
