"""A batch as CloudEvents: its lines come as an event, inline or by claim check, and its results go to a sink the same way."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
import pytest
from cloudevents.core.v1.event import CloudEvent

from eventing.claim_check import ClaimCheck
from eventing.http.binding import from_http, to_binary_http
from eventing.wire.cloud_event import make_event
from eventing.wire.events import SAFE_EVENT_BYTES, Attribute, EventType
from eventing.wire.framing import JSONL_CONTENT_TYPE
from storage.store.payload_store import PayloadStore
from tests.support.functions.functions import FunctionProcess, running_gateway, wait_until
from tests.support.http_server import Exchange, serving
from tests.support.storage.published import Published

SOURCE = "/client"


class Sink:
    """Keeps the events that it gets. The first delivery of each is refused."""

    def __init__(self) -> None:
        self.url = ""
        self.events: list[CloudEvent] = []

    def receive(self, exchange: Exchange) -> None:
        event = from_http(exchange.headers.items(), exchange.body)
        first = event.get_id() not in [known.get_id() for known in self.events]
        self.events.append(event)
        exchange.answer(503 if first else 202)

    def told(self, id_: str) -> list[CloudEvent]:
        """Deliveries of the answer to an event."""
        return [event for event in self.events if event.get_extension(Attribute.CAUSATION_ID) == id_]


@pytest.fixture(scope="module")
def sink() -> Iterator[Sink]:
    sink = Sink()
    with serving(sink.receive) as server:
        sink.url = server.origin
        yield sink


@pytest.fixture(scope="module")
def gateway(published: Published, stages: list[FunctionProcess], sink: Sink) -> Iterator[FunctionProcess]:
    with running_gateway(published, stages, LAMINA_JOBS_STORE="lamina/jobs", K_SINK=sink.url) as gateway:
        yield gateway


def lines(count: int) -> bytes:
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 2, "temperature": 0}
    asked = {"method": "POST", "url": "/v1/completions", "body": body}
    return b"".join(json.dumps({"custom_id": f"line-{number}", **asked}).encode() + b"\n" for number in range(count))


def send(gateway: FunctionProcess, event: CloudEvent) -> httpx.Response:
    headers, body = to_binary_http(event)
    return httpx.post(gateway.url, headers=headers, content=b"".join(body), timeout=60)


@pytest.mark.parametrize("count", [3, 400], ids=["inline", "claim check"])
def test_results_come_as_an_event(gateway: FunctionProcess, published: Published, sink: Sink, count: int) -> None:
    with PayloadStore(published.store) as store:
        claims = ClaimCheck(store, published.store.bucket)
        whole = make_event(EventType.BATCH_REQUEST, SOURCE, lines(count), JSONL_CONTENT_TYPE, id=f"of-{count}")
        event = claims.check_in(whole, datetime.now(UTC))
        assert (event.get_extension(Attribute.DATAREF) is not None) == (len(lines(count)) > SAFE_EVENT_BYTES)
        for _ in range(2):  # a Broker may deliver it again
            assert send(gateway, event).status_code == 202
        wait_until(lambda: len(sink.told(f"of-{count}")) == 2, 120)
        told, again = sink.told(f"of-{count}")
        assert (told.get_id(), told.get_type()) == (again.get_id(), EventType.BATCH_RESPONSE)
        assert (told.get_extension(Attribute.DATAREF) is not None) == (count > 100)
        results = [json.loads(line) for line in bytes(claims.redeem(again).get_data()).splitlines()]  # type: ignore[arg-type]
        assert [result["custom_id"] for result in results] == [f"line-{number}" for number in range(count)]
        assert all(result["response"]["status_code"] == 200 for result in results)
        wait_until(lambda: not list(store.list("jobs/tiny/open/")))
        assert len([found for found in store.list("jobs/tiny/everybody/batches/") if told.get_id() in found.key]) == 1


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"", 422), (b"no JSON\n", 422), (b'{"url": "/v1/images/generations"}\n', 422)],
    ids=["empty", "no JSON", "endpoint"],
)
def test_an_event_that_is_no_batch_is_refused(gateway: FunctionProcess, published: Published, data: bytes, status: int) -> None:
    assert send(gateway, make_event(EventType.BATCH_REQUEST, SOURCE, data, JSONL_CONTENT_TYPE)).status_code == status
    with PayloadStore(published.store) as store:
        assert not list(store.list("jobs/tiny/open/"))
