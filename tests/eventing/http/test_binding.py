"""CloudEvents over HTTP: both modes, attributes and data, and errors that name the fault."""

import json
import timeit
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_http_event, to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

from eventing.http.binding import from_http, to_binary_http, to_structured_http
from eventing.http.delivery import RequestTarget, RequestTemplate
from eventing.problems import EventExpired, MalformedEvent, UnsupportedMediaType
from eventing.wire.cloud_event import (
    batch_data,
    batch_event,
    data_buffers,
    json_data,
    json_event,
    make_event,
    reply_id,
    reply_seed,
)
from eventing.wire.events import BATCH_CONTENT_TYPE, Attribute, EventType
from eventing.wire.framing import (
    ReplyTemplate,
    check_not_expired,
    event_lines,
    expiry_time,
    integer_attribute,
    read_attributes,
    required_attribute,
)
from eventing.wire.generation import GenerateRequest, Message
from tests.support.functions.batches import make_batch

BINARY = {"ce-specversion": "1.0", "ce-id": "7", "ce-source": "/me", "ce-type": "t", "content-type": "application/json"}
STRUCTURED = {"content-type": "application/cloudevents+json"}


def _members(**changes: object) -> bytes:
    return json.dumps({"specversion": "1.0", "id": "7", "source": "/me", "type": "t"} | changes).encode()


def test_an_event_has_an_id_and_a_time_of_its_own() -> None:
    first, second = (make_event(EventType.WARMUP, "/gateway") for _ in range(2))
    assert first.get_id() != second.get_id()
    assert abs((datetime.now(UTC) - first.get_time()).total_seconds()) < 60
    assert first.get_type() == "dev.lamina.warmup"
    assert make_event("t", "/s", id="mine").get_id() == "mine"


def test_binary_round_trip() -> None:
    event = json_event("t", "/søurce", Message("user", "grüß"), layer=10, pipeline="abc", flag=True, absent=None)
    headers, buffers = to_binary_http(event)
    assert headers["ce-source"] == "/s%C3%B8urce"
    assert headers["content-type"] == "application/json"
    assert headers["ce-flag"] == "true"
    back = from_http(headers, b"".join(buffers))
    assert back.get_attributes() == event.get_attributes()
    assert json_data(back, Message) == Message("user", "grüß")
    assert integer_attribute(back.get_attributes(), Attribute.LAYER) == 10
    assert required_attribute(back.get_attributes(), Attribute.PIPELINE) == "abc"
    assert back.get_extension("absent") is None


def test_structured_round_trip() -> None:
    event = json_event("t", "/me", Message("user", "grüß \U0001f600"), layer=10)
    headers, buffers = to_structured_http(event)
    assert headers == STRUCTURED
    back = from_http(headers, b"".join(buffers))
    assert back.get_attributes() == event.get_attributes()
    assert json_data(back, Message) == Message("user", "grüß \U0001f600")


def test_the_sdk_and_this_binding_read_each_others_events() -> None:
    event = json_event("t", "/me", Message("user", "x"), expirytime=datetime(2026, 1, 2, tzinfo=UTC))
    for write in (to_binary_http, to_structured_http):
        headers, buffers = write(event)
        read = from_http_event(HTTPMessage(headers, b"".join(buffers)))
        assert read.get_data() == {"role": "user", "content": "x"}
        assert read.get_attributes() == event.get_attributes()
    theirs = CloudEvent({"type": "t", "source": "/me", "expirytime": "2026-01-02T00:00:00Z"}, {"role": "user", "content": "x"})
    for message in (to_binary_event(theirs), to_structured_event(theirs)):
        ours = from_http(message.headers, message.body)
        assert ours.get_id() == theirs.get_id()
        assert ours.get_time() == theirs.get_time()
        assert json_data(ours, Message) == Message("user", "x")
        assert expiry_time(ours.get_attributes()) == datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    "extensions",
    [
        {},
        {"layer": 12, "freetokens": 0, "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        {"plain": "!#$&'()*+,-./09:;<=>?@AZ[]^_`az{|}~"},
        {"blank": "a b"},
        {"quote": 'a"b'},
        {"percent": "100%25"},
        {"beyond": "Ünïcödé €"},
        {"offset": "+00:00"},
    ],
)
@pytest.mark.parametrize("offset", [timedelta(0), timedelta(hours=-3, minutes=-30), timedelta(seconds=30)])
def test_headers_are_read_as_the_sdk_reads_them(extensions: dict[str, Any], offset: timedelta) -> None:
    attributes = make_event("a.type", "/a/source", b"data", "text/plain", **extensions).get_attributes()
    event = CloudEvent({**attributes, "time": datetime(2026, 2, 3, 4, 5, 6, 70, timezone(offset))}, b"data")
    headers, _ = to_binary_http(event)
    if offset.seconds % 60 == 0:  # RFC 3339 has no seconds there.
        assert from_http(headers, b"").get_attributes() == from_http_event(HTTPMessage(headers, b"")).get_attributes()


def test_a_time_that_only_the_sdk_reads_is_read() -> None:
    headers, _ = to_binary_http(make_event("a.type", "/a/source"))
    assert from_http(headers | {"ce-time": "20260203T040506Z"}, b"").get_time() == datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)


def test_framed_requests_and_replies_have_the_bindings_headers() -> None:
    """Templates leave out an event object; what they write is what the binding writes of the same event."""
    varying = {"expirytime": "2026-01-02T00:00:00Z", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    constant, _ = to_binary_http(make_event("t", "/søurce", b"{}", layer=10, pipeline="abc"))
    whole, _ = to_binary_http(make_event("t", "/søurce", b"{}", layer=10, pipeline="abc", **varying))
    reply = dict(ReplyTemplate(constant).headers("7", varying.items()))
    del constant["ce-id"], constant["ce-time"]
    template = RequestTemplate(RequestTarget.of("http://stage:8012/path"), constant)
    line, *lines = template.head(2, event_lines(varying.items())).decode("ascii").split("\r\n")
    request = dict(each.split(": ", 1) for each in lines if each)
    assert (line, lines[-2:], request["Host"], request["Content-Length"]) == (
        "POST /path HTTP/1.1",
        ["", ""],
        "stage:8012",
        "2",
    )
    for framed in (request, reply):
        event = from_http(framed, b"{}")
        assert abs((datetime.now(UTC) - event.get_time()).total_seconds()) < 60
        same = {"ce-id": whole["ce-id"], "ce-time": whole["ce-time"]}
        assert {name: value for name, value in framed.items() if name in whole} | same == whole


def test_a_batch_goes_out_and_comes_in_without_a_copy() -> None:
    batch = make_batch([2, 1], hidden_size=4)
    event = batch_event(EventType.FORWARD, "/gateway", batch, layer=0)
    headers, buffers = to_binary_http(event)
    assert headers["content-type"] == BATCH_CONTENT_TYPE
    tensor = buffers[-1]
    assert isinstance(tensor, memoryview)
    assert tensor.obj is batch.hidden.data.obj
    body = bytearray(b"".join(buffers))
    for received in (body, memoryview(body)):
        back = from_http(headers, received)
        assert batch_data(back) == batch
        assert batch_data(back).token_ids.obj is body
        assert to_binary_http(back) == (headers, [received])
    assert batch_data(event) == batch


def test_a_batch_travels_in_binary_mode_only() -> None:
    event = batch_event(EventType.FORWARD, "/gateway", make_batch([1]))
    with pytest.raises(UnsupportedMediaType, match="binary mode only"):
        to_structured_http(event)
    with pytest.raises(UnsupportedMediaType, match="binary mode only"):
        from_http(STRUCTURED, _members(datacontenttype=BATCH_CONTENT_TYPE, data_base64="TE1C"))
    with pytest.raises(UnsupportedMediaType, match=r"wants application/vnd\.lamina\.batch, its data is application/json"):
        batch_data(json_event(EventType.FORWARD, "/me", Message("user", "x")))
    with pytest.raises(UnsupportedMediaType, match="wants application/json"):
        json_data(event, Message)


@pytest.mark.parametrize("content_type", ["application/cloudevents-batch+json", "application/cloudevents+avro"])
def test_other_modes_and_formats_are_415(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match=r"application/cloudevents[-+]"):
        from_http({"Content-Type": content_type + "; charset=utf-8"}, b"[]")


def test_the_content_type_decides_the_mode_also_beside_ce_headers() -> None:
    event = from_http(BINARY | {"content-type": "Application/CloudEvents+json; charset=UTF-8"}, _members(id="inner"))
    assert event.get_id() == "inner"


@pytest.mark.parametrize("name", ["specversion", "id", "source", "type"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_attribute_is_named(name: str, value: str | None) -> None:
    headers = {key: text for key, text in BINARY.items() if key != f"ce-{name}"}
    if value is not None:
        headers[f"ce-{name}"] = value
    with pytest.raises(MalformedEvent, match=name):
        from_http(headers, b"{}")
    with pytest.raises(MalformedEvent, match=name):
        from_http(STRUCTURED, _members(**{name: value}))


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"ce-specversion": "0.3"}, "specversion is '0.3'"),
        ({"ce-specversion": "2.0"}, "specversion is '2.0'"),
        ({"ce-time": "yesterday"}, "time is 'yesterday'"),
        ({"ce-time": "2026-01-01T00:00:00"}, "time.*timezone"),
        ({"ce-subject": ""}, "subject"),
        ({"ce-a" + "b" * 20: "x"}, "attribute 'abbbbbbbbbbbbbbbbbbbb'"),
        ({"ce-no_underscore": "x"}, "attribute 'no_underscore'"),
        ({"ce-": "x"}, "attribute ''"),
        ({"ce-data": "x"}, "data"),
        ({"ce-datacontenttype": "text/plain"}, "datacontenttype travels as Content-Type"),
        ({"ce-pipeline": "x" * 5000}, "pipeline has 5000 characters"),
        ({"ce-pipeline": "a%0Ab"}, "pipeline contains a control character"),
        ({"ce-pipeline": "%ff"}, "pipeline contains a control character or is not UTF-8"),
        ({"CE-ID": "8"}, "ce-id is there twice: '7' and '8'"),
        ({"Content-Type": "text/plain"}, "content-type is there twice"),
    ],
)
def test_a_bad_attribute_is_named_in_binary_mode(changes: dict[str, str], seen: str) -> None:
    for read in (lambda headers: from_http(headers, b"{}"), lambda headers: read_attributes(headers.items())):
        with pytest.raises(MalformedEvent, match=seen):
            read(BINARY | changes)


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (b"", "not JSON in UTF-8"),
        (b"\xff\xfe", "not JSON in UTF-8"),
        (_members().decode().encode("utf-16"), "not JSON in UTF-8"),
        (b'{"id": "\xff"}', "not JSON in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "a JSON list, not an object"),
        (b"null", "a JSON NoneType"),
        (b'{"specversion": "1.0", "id": "1", "id": "2"}', "'id' is there twice"),
        (_members(data={}).replace(b'"data": {}', b'"data": NaN'), "NaN is not JSON"),
        (_members(specversion=1.0), "specversion is a JSON float, 1.0"),
        (_members(layer=1.5), "attribute 'layer' is a JSON float"),
        (_members(layer={"a": 1}), "attribute 'layer' is a JSON dict"),
        (_members(Layer="1"), "attribute 'Layer'"),
        (_members(time="2026-13-01T00:00:00Z"), "attribute time is '2026-13-01T00:00:00Z'"),
        (_members(time=5), "time"),
        (_members(id=["x"]), "attribute 'id' is a JSON list"),
        (_members(data={}, data_base64="e30="), "exclude each other"),
        (_members(data_base64="%%%"), "data_base64 is not base64"),
        (_members(data_base64=5), "data_base64 is not base64"),
        (_members(data={}, datacontenttype="text/plain"), "data of text/plain must be a JSON string"),
        (_members(data={}, datacontenttype=5), "datacontenttype"),
    ],
)
def test_a_bad_structured_event_is_named(body: bytes, seen: str) -> None:
    with pytest.raises(MalformedEvent, match=seen):
        from_http(STRUCTURED, body)


def test_a_request_without_an_event_is_told_how_to_send_one() -> None:
    with pytest.raises(MalformedEvent, match="neither ce- headers nor the content type application/cloudevents"):
        from_http({"content-type": "application/json", "accept": "*/*"}, b"{}")


def test_structured_data_in_its_forms() -> None:
    text = from_http(STRUCTURED, _members(data="hällo", datacontenttype="text/plain"))
    assert data_buffers(text) == ["hällo".encode()]
    encoded = from_http(STRUCTURED, _members(data_base64="e30="))
    assert json_data(encoded, dict) == {}
    assert encoded.get_datacontenttype() == "application/json"
    assert data_buffers(from_http(STRUCTURED, _members(data=None))) == []
    assert data_buffers(from_http(STRUCTURED, _members(subject=None))) == []


def test_an_event_without_time_does_not_get_one() -> None:
    assert from_http(BINARY, b"{}").get_time() is None
    assert from_http(STRUCTURED, _members()).get_time() is None
    assert "ce-time" not in to_binary_http(from_http(BINARY, b"{}"))[0]


def test_quoted_header_values_are_unquoted() -> None:
    assert from_http(BINARY | {"ce-subject": '"a \\"b\\" %C3%A4"'}, b"{}").get_subject() == 'a "b" ä'


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", ""),
        (b"\xff", ""),
        (b'{"prompt": "\xff"}', ""),
        (b"{", ""),
        (b'{"prompt": "x", "max_tokens": "many"}', "max_tokens"),
        (b'{"prompt": "x", "stop": ["a", 5]}', "stop"),
        (b"[" * 100_000, ""),
    ],
)
def test_bad_json_data_names_the_event_type_and_the_field(data: bytes, named: str) -> None:
    with pytest.raises(MalformedEvent, match=f"the data of t: .*{named}"):
        json_data(from_http(BINARY, data), GenerateRequest)


def test_structured_values_beyond_the_types_are_named() -> None:
    for data, seen in (({"prompt": "x", "seed": 10**30}, "data of t: .*seed"), ({"prompt": "\ud800"}, "data of t")):
        with pytest.raises(MalformedEvent, match=seen):
            json_data(from_http(STRUCTURED, _members(data=data)), GenerateRequest)


@pytest.mark.parametrize("value", ["", "-1", "1.0", "ten", "١", "1" * 11])
def test_an_attribute_that_is_not_a_number_is_named(value: str) -> None:
    with pytest.raises(MalformedEvent, match=r"layer is|subject"):
        integer_attribute(make_event("t", "/me", layer=value).get_attributes(), Attribute.LAYER)
    with pytest.raises(MalformedEvent, match="pipeline is missing"):
        required_attribute(make_event("t", "/me").get_attributes(), Attribute.PIPELINE)


def test_expiry() -> None:
    now = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
    check_not_expired(make_event("t", "/me").get_attributes(), now)
    check_not_expired(make_event("t", "/me", expirytime=now + timedelta(seconds=1)).get_attributes(), now)
    check_not_expired(make_event("t", "/me", expirytime="2026-11-24T14:00:01+02:00").get_attributes(), now)
    with pytest.raises(EventExpired, match="expired at 2026-11-24T12:00:00Z"):
        check_not_expired(make_event("t", "/me", expirytime=now).get_attributes(), now)
    for wrong in ("soon", "2026-11-24", "2026-11-24T12:00:00"):
        with pytest.raises(MalformedEvent, match="expirytime"):
            check_not_expired(make_event("t", "/me", expirytime=wrong).get_attributes(), now)


def test_a_reply_id_depends_on_source_and_id_alone() -> None:
    cause = make_event("t", "/a", b"{}", id="1")
    again = from_http(*_sent(make_event("t", "/a", b"{}", id="1", attempt="2")))
    assert reply_id(cause) == reply_id(again)
    assert reply_seed(cause) == reply_seed(again)
    assert 0 <= reply_seed(cause) < 2**63
    others = [make_event("t", source, id=id) for source, id in (("/a", "2"), ("/b", "1"), ("/a 1", "1"), ("/a", "1 1"))]
    assert len({reply_id(event) for event in [cause, *others]}) == 5


def _sent(event: CloudEvent) -> tuple[dict[str, str], bytes]:
    headers, buffers = to_binary_http(event)
    return headers, b"".join(buffers)


def test_reading_a_forward_event_costs_tens_of_microseconds() -> None:
    event = batch_event(EventType.FORWARD, "/g", make_batch([512], 5120, "BF16"), layer=1, pipeline="abc", traceparent="0" * 55)
    headers, body = _sent(event)
    assert min(timeit.repeat(lambda: batch_data(from_http(headers, body)), number=20, repeat=5)) / 20 < 5e-4
