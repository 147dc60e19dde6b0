"""Events that the gateway sends to stages, and how it classifies every failure of them."""

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from eventing.http.binding import from_http, to_binary_http
from eventing.http.delivery import Sender
from eventing.problems import PROBLEM_CONTENT_TYPE, EventExpired, EventTooLarge, NotReady, Problem, Unauthorized, WrongPipeline
from eventing.wire.batch_codec import encode_batch
from eventing.wire.cloud_event import batch_event, json_data, json_event, make_event
from eventing.wire.control import ReleaseReply, ReleaseRequest, ReleaseRow, ReservedRow, ReserveReply, ReserveRow, WarmupReply
from eventing.wire.events import Attribute, Batch, EventType, Row, Status
from eventing.wire.framing import expiry_time, integer_attribute
from functions.gateway.stages.client import PipelineIdentity, StageClient
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Instance
from knative.local.kubelet.processes import free_port
from tests.support.http_server import Exchange, Server, serving

IDS = ["a", "b"]
ROWS = tuple(Row(id_, 0, 5, 1) for id_ in IDS)
BATCH = Batch(ROWS, memoryview(array("i", [1, 2])))

Respond = Callable[[Exchange], None]


@contextmanager
def client_of(respond: Respond, step_timeout_seconds: float = 5.0) -> Iterator[tuple[StageClient, Instance, Server]]:
    identity = PipelineIdentity("0123456789abcdef0123456789abcdef", "secret", "/gateways/1", (0, 10, 20))
    with serving(respond) as server, closing(Sender()) as sender:
        yield StageClient(sender, identity, step_timeout_seconds), Instance(1, server.url), server


def answer_batch(exchange: Exchange, batch: Batch = BATCH, **attributes: str | int) -> None:
    headers, buffers = to_binary_http(batch_event(EventType.FORWARD, "/stage", batch, id=None, **attributes))
    exchange.answer(200, b"".join(buffers), **{name.replace("-", "_"): value for name, value in headers.items()})


def answer_json(exchange: Exchange, value: ReserveReply | ReleaseReply | WarmupReply) -> None:
    headers, buffers = to_binary_http(json_event("dev.lamina.reply", "/stage", value, id=None, instance="i-1", freetokens=7))
    exchange.answer(200, b"".join(buffers), **{name.replace("-", "_"): value for name, value in headers.items()})


def answer_problem(problem: Problem) -> Respond:
    return lambda exchange: exchange.answer(problem.status, problem.document(), Content_Type=PROBLEM_CONTENT_TYPE)


def forward(respond: Respond, **settings: float) -> StageFailed:
    """The failure of a forward event."""
    with client_of(respond, **settings) as (client, instance, _), pytest.raises(StageFailed) as failed:
        client.forward(instance, encode_batch(BATCH), IDS, time.monotonic() + 10)
    return failed.value


def test_a_forward_event_carries_attributes_and_batch() -> None:
    with client_of(lambda exchange: answer_batch(exchange, instance="i-1", freetokens=99)) as (client, instance, server):
        reply = client.forward(instance, encode_batch(BATCH), IDS, time.monotonic() + 2)
        (exchange,) = server.requests
    event = from_http(exchange.headers.items(), exchange.body)
    assert event.get_type() == EventType.FORWARD
    assert event.get_source() == "/gateways/1"
    assert event.get_extension("pipeline") == "0123456789abcdef0123456789abcdef"
    assert event.get_extension("layer") == "10"
    assert exchange.headers["Authorization"] == "Bearer secret"
    expiry = expiry_time(event.get_attributes())
    assert timedelta(0) < expiry - datetime.now(UTC) <= timedelta(seconds=2), "the earlier of step timeout and deadline"
    assert exchange.body == b"".join(encode_batch(BATCH))
    assert reply.batch.rows == ROWS
    assert bytes(reply.body) == exchange.body
    assert (reply.origin.instance, reply.origin.boot, reply.origin.free_tokens) == (instance, "i-1", 99)


def test_reservation_release_and_warm_up() -> None:
    reserved = tuple(ReservedRow(id_, 3, status) for id_, status in zip(IDS, (Status.OK, Status.FULL), strict=True))
    with client_of(lambda exchange: answer_json(exchange, ReserveReply(reserved))) as (client, instance, _):
        origin, rows = client.reserve(instance, [ReserveRow(id_, 3, 10) for id_ in IDS], time.monotonic() + 5)
        assert (origin.boot, origin.free_tokens, rows) == ("i-1", 7, ReserveReply(reserved))
    with client_of(lambda exchange: answer_json(exchange, ReleaseReply(1))) as (client, instance, server):
        assert client.release(instance, [ReleaseRow("a", 3)]).free_tokens == 7
        event = from_http(server.requests[0].headers.items(), server.requests[0].body)
        assert json_data(event, ReleaseRequest).rows == (ReleaseRow("a", 3),)
        assert event.get_extension(Attribute.AWAITED_TOKENS) is None
        client.release(instance, [], 40)
        event = from_http(server.requests[1].headers.items(), server.requests[1].body)
        assert integer_attribute(event.get_attributes(), Attribute.AWAITED_TOKENS) == 40
    with client_of(lambda exchange: answer_json(exchange, WarmupReply("i-1", {"import": 1.5}))) as (client, instance, _):
        assert client.warm_up(1, instance.url, 5.0).start_up == {"import": 1.5}


def test_with_tls_a_stage_is_woken_without_the_token() -> None:
    """The Service URL leads through the ingress, without encryption."""
    identity = PipelineIdentity("0123456789abcdef0123456789abcdef", "secret", "/gateways/1", (0, 10, 20))
    with serving(lambda exchange: exchange.answer(200)) as server, closing(Sender()) as sender:
        client = StageClient(sender, identity, 5.0, pods_only=True)
        client.warm_up(1, server.url.removesuffix("/"), 5.0)
        (request,) = server.requests
        assert (request.command, request.path) == ("GET", "/readyz")
        assert "secret" not in str(request.headers)
    with client_of(lambda exchange: exchange.answer(503)) as (_, instance, server), closing(Sender()) as sender:
        with pytest.raises(StageFailed) as failed:
            StageClient(sender, identity, 5.0, pods_only=True).warm_up(1, instance.url, 5.0)
        assert (failed.value.stage, failed.value.cause) == (1, "infrastructure")


@pytest.mark.parametrize(
    ("problem", "cause", "blames", "final"),
    [
        (NotReady("starting"), "not-ready", False, False),
        (WrongPipeline("another"), "wrong-pipeline", False, True),
        (Unauthorized("no token"), "unauthorized", False, True),
        (EventTooLarge("large"), "event-too-large", True, False),
        (Problem("bug"), "internal", True, False),
    ],
    ids=lambda value: value.name if isinstance(value, Problem) else None,
)
def test_refusals_of_a_stage(problem: Problem, cause: str, blames: bool, final: bool) -> None:
    failed = forward(answer_problem(problem))
    assert (failed.stage, failed.cause, failed.blames, failed.final) == (1, cause, blames, final)
    assert str(failed) == f"stage 1: {cause}: {problem}"


@pytest.mark.parametrize(
    ("status", "text", "cause", "blames"),
    [
        (502, b"upstream", "infrastructure", True),
        (503, b"upstream", "infrastructure", False),
        (504, b"upstream", "infrastructure", True),
        (404, b"upstream", "infrastructure", True),
        (502, b"dial tcp 127.0.0.1:8080: connect: connection refused\n", "refused", False),
        (502, b"EOF\n", "infrastructure", True),
        (502, b"read tcp 127.0.0.1:41234->127.0.0.1:8080: read: connection reset by peer\n", "infrastructure", True),
    ],
)
def test_errors_of_proxies_blame_the_event_unless_it_was_not_delivered(
    status: int, text: bytes, cause: str, blames: bool
) -> None:
    """The texts of a queue-proxy tell a dead function from one that died with the event."""
    failed = forward(lambda exchange: exchange.answer(status, text))
    assert (failed.cause, failed.blames) == (cause, blames)


def test_connections_without_a_reply_fail_the_step() -> None:
    broken = forward(lambda exchange: exchange.reset())
    assert (broken.cause, broken.blames) == ("broken", True)
    late = forward(lambda exchange: exchange.server.released.wait(5) and None, step_timeout_seconds=0.1)
    assert (late.cause, late.blames) == ("timeout", True)
    with client_of(lambda exchange: None) as (client, _, _):
        nobody = Instance(1, f"http://127.0.0.1:{free_port()}")
        with pytest.raises(StageFailed) as refused:
            client.forward(nobody, encode_batch(BATCH), IDS, time.monotonic() + 5)
    assert (refused.value.cause, refused.value.blames) == ("refused", False)


def test_a_passed_deadline_of_the_client_is_no_failure_of_the_stage() -> None:
    """Both if the gateway notices it and if the stage says so."""
    rows = [ReserveRow(id_, 0, 10) for id_ in IDS]
    for respond in (lambda exchange: exchange.server.released.wait(5) and None, answer_problem(EventExpired("late"))):
        with client_of(respond) as (client, instance, _):
            for ask in (
                lambda end, to=client, at=instance: to.forward(at, encode_batch(BATCH), IDS, end),
                lambda end, to=client, at=instance: to.reserve(at, rows, end),
            ):
                with pytest.raises(StageFailed) as failed:
                    ask(time.monotonic() + 0.1)
                assert (failed.value.cause, failed.value.expired, failed.value.blames) == ("deadline", True, False)


@pytest.mark.parametrize(("failures", "seconds"), [(0, 10), (1, 20), (2, 40), (9, 120)])
def test_a_reservation_has_a_timeout_of_its_own(failures: int, seconds: float) -> None:
    """Shorter than a step's, so that a silent instance is soon left; longer after each failure, for slow stages."""
    reserved = ReserveReply((ReservedRow("a", 0, Status.OK),))
    with client_of(lambda exchange: answer_json(exchange, reserved), step_timeout_seconds=120.0) as (client, instance, server):
        instance.failures = failures
        client.reserve(instance, [ReserveRow("a", 0, 10)], time.monotonic() + 600)
        expiry = expiry_time(from_http(server.requests[0].headers.items(), server.requests[0].body).get_attributes())
    assert timedelta(seconds=seconds - 10) < expiry - datetime.now(UTC) <= timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "respond",
    [
        lambda exchange: exchange.answer(200, b"hello", Content_Type="text/plain"),
        lambda exchange: answer_batch(exchange, Batch(ROWS[:1], memoryview(array("i", [1])))),
        lambda exchange: answer_batch(exchange, Batch(ROWS[::-1], memoryview(array("i", [1, 2])))),
        lambda exchange: exchange.answer(200, b"LMB", **_headers()),
    ],
    ids=["no event", "a row lacks", "rows in another order", "no batch"],
)
def test_malformed_replies_fail_the_step(respond: Respond) -> None:
    failed = forward(respond)
    assert (failed.cause, failed.blames) == ("malformed", True)


def test_a_reservation_reply_with_other_rows_is_malformed() -> None:
    rows = (ReservedRow("z", 0, Status.OK),)
    with client_of(lambda exchange: answer_json(exchange, ReserveReply(rows))) as (client, instance, _):
        with pytest.raises(StageFailed, match="other rows") as failed:
            client.reserve(instance, [ReserveRow("a", 0, 10)], time.monotonic() + 5)
        assert not failed.value.blames


def _headers() -> dict[str, str]:
    headers, _ = to_binary_http(make_event(EventType.FORWARD, "/stage", b"LMB", "application/vnd.lamina.batch", id=None))
    return {name.replace("-", "_"): value for name, value in headers.items()}
