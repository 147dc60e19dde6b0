"""Claim check against a real S3 server: small and large events, and references that are refused."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cloudevents.core.v1.event import CloudEvent

from eventing.claim_check import ClaimCheck, event_bytes, sweep
from eventing.http.binding import from_http, to_binary_http
from eventing.problems import EventExpired, EventTooLarge, MalformedEvent
from eventing.wire.cloud_event import batch_data, batch_event, data_buffers, make_event
from eventing.wire.events import SAFE_EVENT_BYTES, Attribute, EventType
from eventing.wire.framing import JSONL_CONTENT_TYPE
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from storage.store.payload_store import MAX_PAYLOAD_BYTES, PayloadStore
from tests.support.functions.batches import make_batch

NOW = datetime(2026, 11, 24, 12, 30, tzinfo=UTC)
PREFIX = "payloads/"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    folder: Path = tmp_path_factory.mktemp("store")
    with EmbeddedStore(folder) as server:
        yield server


@pytest.fixture
def store(server: EmbeddedStore) -> Iterator[ObjectStore]:
    store = ObjectStore(server.settings)
    yield store
    for info in list(store.list("")):
        store.delete(info.key)


@pytest.fixture
def payloads(store: ObjectStore) -> Iterator[PayloadStore]:
    with PayloadStore(store.settings) as payloads:
        yield payloads


@pytest.fixture
def claims(payloads: PayloadStore) -> ClaimCheck:
    return ClaimCheck(payloads, payloads.settings.bucket, PREFIX)


def _large_event(**attributes: str | datetime) -> CloudEvent:
    return batch_event(EventType.FORWARD, "/stage", make_batch([40], hidden_size=576), **attributes)


def _over_the_wire(event: CloudEvent) -> CloudEvent:
    headers, buffers = to_binary_http(event)
    return from_http(headers, b"".join(buffers))


def test_a_large_batch_waits_in_the_store_and_comes_back(claims: ClaimCheck, store: ObjectStore) -> None:
    event = _large_event(layer="10")
    ticket = _over_the_wire(claims.check_in(event, NOW))
    assert event_bytes(event) > SAFE_EVENT_BYTES
    assert event_bytes(ticket) < 1024
    assert [info.key for info in store.list("")] == [ticket.get_extension("dataref").removeprefix("s3://lamina/")]

    for _ in range(2):  # Delivery is at least once.
        redeemed = claims.redeem(ticket)
        assert redeemed.get_attributes() == event.get_attributes()
        assert batch_data(redeemed) == batch_data(event)


@pytest.mark.parametrize("size", [0, SAFE_EVENT_BYTES // 2, SAFE_EVENT_BYTES, 3 * 2**20 + 1])
def test_data_may_come_and_go_in_pieces(claims: ClaimCheck, store: ObjectStore, size: int) -> None:
    data = b"x" * size

    def pieces() -> Iterator[bytes]:
        yield from (data[start : start + 2**20] for start in range(0, size, 2**20))

    event = claims.check_in_pieces(make_event(EventType.BATCH_RESPONSE, "/gateway"), JSONL_CONTENT_TYPE, pieces, NOW)
    assert (event.get_extension(Attribute.DATAREF) is not None) == (size >= SAFE_EVENT_BYTES)
    assert b"".join(claims.pieces(event)) == data
    assert b"".join(data_buffers(claims.redeem(event))) == data
    for info in list(store.list("")):
        store.put(info.key, b"y" * size)
    if size >= SAFE_EVENT_BYTES:
        with pytest.raises(MalformedEvent, match="SHA-256"):
            list(claims.pieces(event))


def test_a_repeated_delivery_writes_the_same_object(claims: ClaimCheck, store: ObjectStore) -> None:
    first, second = (claims.check_in(_large_event(), NOW + timedelta(minutes=minutes)) for minutes in (0, 1))
    assert first.get_extension("dataref") == second.get_extension("dataref")
    assert len(list(store.list(PREFIX))) == 1


@pytest.mark.slow
def test_small_events_pass(claims: ClaimCheck, store: ObjectStore) -> None:
    event = make_event("t", "/me", b"{}")
    assert claims.check_in(event, NOW) is event
    assert claims.redeem(event) is event
    assert list(store.list("")) == []


def test_the_limit_counts_attributes_too(claims: ClaimCheck) -> None:
    room = SAFE_EVENT_BYTES - event_bytes(make_event("t", "/me", b""))
    for length, travels in ((room - 1, True), (room + 32, False)):
        ticket = claims.check_in(make_event("t", "/me", bytes(length)), NOW)
        assert (ticket.get_extension("dataref") is None) is travels


def test_a_payload_that_expires_in_the_last_year_is_kept_until_the_last_hour(claims: ClaimCheck) -> None:
    event = _large_event(expirytime="9999-12-31T23:59:59Z")
    assert claims.redeem(claims.check_in(event, NOW)).get_type() == EventType.FORWARD


def test_sweep_deletes_expired_payloads_only(claims: ClaimCheck, store: ObjectStore) -> None:
    store.put("models/x/manifest.json", b"{}")
    store.put(PREFIX + "by-hand", b"kept")
    claims.check_in(_large_event(), NOW)
    soon = claims.check_in(_large_event(expirytime=NOW + timedelta(minutes=1)), NOW)
    assert sweep(store, NOW + timedelta(minutes=2), PREFIX) == 0, "the hour is not over"
    assert sweep(store, NOW + timedelta(minutes=31), PREFIX) == 1
    with pytest.raises(EventExpired, match="not in the store any more"):
        claims.redeem(soon)
    assert sweep(store, NOW + timedelta(days=2), PREFIX) == 1
    assert [info.key for info in store.list("")] == ["models/x/manifest.json", PREFIX + "by-hand"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "reference",
    [
        "s3://other/payloads/20261124T13Z/" + "a" * 64,
        "s3://lamina/models/20261124T13Z/" + "a" * 64,
        "s3://lamina/payloads/../models/x/manifest.json",
        "s3://lamina/payloads/20261124T13Z/../" + "a" * 61,
        "s3://lamina/payloads/20261124T13Z/" + "A" * 64,
        "s3://lamina/payloads/tomorrow/" + "a" * 64,
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "",
    ],
)
def test_references_to_any_other_place_are_not_followed(claims: ClaimCheck, reference: str) -> None:
    with pytest.raises(MalformedEvent, match="followed is only s3://lamina/payloads/"):
        claims.redeem(make_event("t", "/me", dataref=reference, datarefbytes=2, datarefsha256="a" * 64))


def _altered(ticket: CloudEvent, **changes: object) -> CloudEvent:
    return CloudEvent(dict(ticket.get_attributes()) | changes)


def test_altered_payloads_are_refused(claims: ClaimCheck, store: ObjectStore) -> None:
    ticket = claims.check_in(_large_event(), NOW)
    (info,) = store.list(PREFIX)
    with pytest.raises(MalformedEvent, match=f"has {info.bytes} bytes, the event says 5"):
        claims.redeem(_altered(ticket, datarefbytes="5"))
    with pytest.raises(EventTooLarge, match="the most is"):
        claims.redeem(_altered(ticket, datarefbytes=str(MAX_PAYLOAD_BYTES + 1)))
    with pytest.raises(MalformedEvent, match="datarefbytes is missing"):
        claims.redeem(_altered(ticket, datarefbytes=None))
    store.put(info.key, bytes(info.bytes))
    with pytest.raises(MalformedEvent, match="SHA-256 differs"):
        claims.redeem(ticket)


def test_a_prefix_must_be_a_folder(payloads: PayloadStore) -> None:
    with pytest.raises(ValueError, match="'payloads' must end in '/'"):
        ClaimCheck(payloads, "lamina", "payloads")


def test_the_reference_says_size_and_digest(claims: ClaimCheck) -> None:
    event = _large_event()
    body = b"".join(data_buffers(event))
    ticket = claims.check_in(event, NOW)
    assert ticket.get_extension(Attribute.DATAREF_BYTES) == str(len(body))
    assert ticket.get_extension(Attribute.DATAREF_SHA256) == hashlib.sha256(body).hexdigest()
    assert ticket.get_datacontenttype() == event.get_datacontenttype()
