"""Brokers, Triggers and Sequences on one machine, over real HTTP: filters, replies, retries and dead letters."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cloudevents.core.v1.event import CloudEvent

from eventing.wire.cloud_event import data_buffers, make_event
from knative.local.errors import UnsupportedManifest
from knative.local.eventing.local_eventing import LocalEventing
from knative.local.eventing.objects import Delivery, Trigger, read_eventing_object
from tests.support.knative.event_sink import EventSink, Reply, event_sink, post
from tests.support.knative.platform import client, echo_service, revision, running_platform, until


def a(kind: str, name: str, spec: Mapping[str, Any] | None = None) -> dict[str, Any]:
    group = "flows" if kind == "Sequence" else "eventing"
    return {"apiVersion": f"{group}.knative.dev/v1", "kind": kind, "metadata": {"name": name}, "spec": dict(spec or {})}


def trigger(name: str, subscriber: Any, *, delivery: dict[str, Any] | None = None, **filters: Any) -> dict[str, Any]:
    """subscriber: a URL or a destination. filters: `filter`, `filters`."""
    spec = {"broker": "b", "subscriber": {"uri": subscriber} if isinstance(subscriber, str) else subscriber, **filters}
    return a("Trigger", name, spec | ({"delivery": delivery} if delivery else {}))


def delivery(dead_letters: str | None = None, **more: Any) -> dict[str, Any]:
    quick = {"retry": 2, "backoffPolicy": "linear", "backoffDelay": "PT0.01S", "timeout": "PT60S"} | more
    return quick | ({"deadLetterSink": {"uri": dead_letters}} if dead_letters else {})


def of_type(type_: str) -> dict[str, Any]:
    return {"attributes": {"type": type_}}


def event(id_: str = "1", type_: str = "ask", data: bytes = b"{}", **more: str) -> CloudEvent:
    return make_event(type_, "/me", data, id=id_, **more)


class Local:
    """A running LocalEventing, a subscriber, and the sink of dead letters or answers."""

    def __init__(
        self, folder: Path, session: aiohttp.ClientSession, subscriber: EventSink, other: EventSink, limit: int
    ) -> None:
        self.services: dict[str, str] = {}
        self.eventing = LocalEventing(lambda _, name: self.services.get(name), folder, limit)
        self.subscriber = subscriber
        self.other = other
        self._session = session

    async def apply(self, *manifests: dict[str, Any]) -> None:
        await self.eventing.apply([a("Broker", "b"), *manifests])

    async def send(self, *events: CloudEvent) -> list[tuple[int, str]]:
        return [await post(self._session, self.eventing.broker_url("b"), each) for each in events]

    async def deliver(self, *events: CloudEvent) -> list[tuple[int, str]]:
        """Sends events and waits until no delivery is in progress."""
        answers = await self.send(*events)
        await until(lambda: self.eventing.status()["in_progress"] == 0)
        return answers

    def counts(self, name: str) -> dict[str, Any]:
        (broker,) = self.eventing.status()["brokers"]
        found: dict[str, Any] = next(each for each in broker["triggers"] if each["name"] == f"default/{name}")
        return found


@asynccontextmanager
async def running(folder: Path, limit: int = 100) -> AsyncIterator[Local]:
    async with event_sink() as subscriber, event_sink() as other, client() as session:
        local = Local(folder, session, subscriber, other, limit)
        try:
            yield local
        finally:
            await local.eventing.stop()


async def test_an_event_goes_unchanged_to_every_matching_trigger(tmp_path: Path) -> None:
    async with running(tmp_path) as local:
        await local.apply(trigger("all", local.subscriber.url), trigger("asks", local.other.url, filter=of_type("ask")))
        binary = make_event("tell", "/me", b"\0\1", "application/vnd.lamina.batch", id="2", subject="ü")
        assert await local.deliver(event("1", data=b'{"a": 1}'), binary) == [(202, "")] * 2
        assert sorted(local.subscriber.ids()) == ["1", "2"]
        assert local.other.ids() == ["1"]
        told = next(each for each in local.subscriber.events if each.get_id() == "2")
        assert dict(told.get_attributes()) == dict(binary.get_attributes())
        assert b"".join(data_buffers(told)) == b"\0\1"
        assert {headers["prefer"] for headers in local.subscriber.headers} == {"reply"}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"filter": {"attributes": {"type": "ask", "source": "/me"}}}, ["1"]),
        ({"filter": {"attributes": {"priority": "high"}}}, ["2"]),
        ({"filter": {"attributes": {"priority": ""}}}, ["2", "3"]),
        ({"filters": [{"exact": {"type": "ask"}}]}, ["1"]),
        ({"filters": [{"prefix": {"type": "te"}}, {"suffix": {"priority": "gh"}}]}, ["2"]),
        ({"filters": [{"not": {"exact": {"type": "tell"}}}]}, ["1"]),
        ({"filters": [{"any": [{"exact": {"priority": "low"}}, {"exact": {"type": "ask"}}]}]}, ["1", "3"]),
        ({"filters": [{"all": [{"exact": {"type": "tell"}}, {"not": {"exact": {"priority": "low"}}}]}]}, ["2"]),
        ({"filters": [{"exact": {"type": "ask"}}], "filter": of_type("tell")}, ["1"]),
    ],
)
def test_filters(filters: dict[str, Any], expected: list[str]) -> None:
    found = read_eventing_object(trigger("t", "http://sink.example", **filters))
    assert isinstance(found, Trigger)
    events = [event("1"), event("2", "tell", priority="high"), event("3", "tell", priority="low")]
    assert [each.get_id() for each in events if found.filter(each)] == expected


async def test_a_reply_returns_to_the_broker(tmp_path: Path) -> None:
    async with running(tmp_path) as local:
        local.subscriber.answer = lambda asked: Reply(event=event(f"reply-{asked.get_id()}", "answer"))
        gets = trigger("b", local.other.url, filter=of_type("answer"))
        await local.apply(trigger("a", local.subscriber.url, filter=of_type("ask")), gets)
        await local.deliver(event("1"), event("2"))
        assert local.counts("a")["delivered"] == local.counts("b")["delivered"] == 2
        assert sorted(local.other.ids()) == ["reply-1", "reply-2"]
        for each in [*local.other.events, *local.subscriber.events]:
            assert each.get_extension("knativebrokerttl") is None


async def test_replies_that_match_their_own_trigger_end_as_a_dead_letter(tmp_path: Path) -> None:
    async with running(tmp_path) as local:
        local.subscriber.answer = lambda asked: Reply(event=asked)
        await local.apply(trigger("a", local.subscriber.url, delivery=delivery(local.other.url)))
        await local.deliver(event())
        assert len(local.subscriber.events) == 255
        (letter,) = local.other.events
        assert "came back too often" in base64.b64decode(str(letter.get_extension("knativeerrordata"))).decode()


@pytest.mark.parametrize("status", [404, 408, 409, 429, 500, 502, 503])
async def test_a_temporary_failure_is_retried(tmp_path: Path, status: int) -> None:
    async with running(tmp_path) as local:
        local.subscriber.answer = lambda _: Reply(status if len(local.subscriber.events) < 3 else 202)
        await local.apply(trigger("a", local.subscriber.url, delivery=delivery(local.other.url)))
        await local.deliver(event())
        assert local.counts("a") | {"subscriber": ""} == {
            "name": "default/a", "subscriber": "", "delivered": 1, "retries": 2, "dead_letters": 0, "lost": 0,
        }  # fmt: skip
        assert local.subscriber.ids() == ["1"] * 3
        assert local.other.events == []


@pytest.mark.parametrize(("status", "attempts"), [(400, 1), (401, 1), (410, 1), (421, 1), (422, 1), (302, 1), (503, 3)])
async def test_a_dead_letter_is_the_event_with_the_reason(tmp_path: Path, status: int, attempts: int) -> None:
    async with running(tmp_path) as local:
        local.subscriber.answer = lambda _: Reply(status, body=b"because " * 200)
        await local.apply(trigger("a", local.subscriber.url, delivery=delivery(local.other.url)))
        await local.deliver(event(data=b'{"a": 1}', subject="s"))
        assert local.counts("a")["dead_letters"] == 1
        assert len(local.subscriber.events) == attempts
        (letter,) = local.other.events
        assert (letter.get_id(), letter.get_subject(), data_buffers(letter)) == ("1", "s", [b'{"a": 1}'])
        assert letter.get_extension("knativeerrorcode") == str(status)
        assert letter.get_extension("knativeerrordest") == local.subscriber.url
        data = str(letter.get_extension("knativeerrordata"))
        assert len(data) == 1024
        assert base64.b64decode(data).startswith(b"because because")


@pytest.mark.parametrize(
    ("reply", "timeout", "words"),
    [
        (Reply(200, body=b"no event"), "PT60S", "neither empty nor a CloudEvent"),
        (Reply(200, body=b"{}", headers={"Content-Type": "application/cloudevents+json"}), "PT60S", "is no CloudEvent"),
        (Reply(after_seconds=60), "PT0.5S", "no whole answer within 0.5 s"),
    ],
)
async def test_a_missing_or_malformed_reply_is_a_failure(tmp_path: Path, reply: Reply, timeout: str, words: str) -> None:
    async with running(tmp_path) as local:
        local.subscriber.answer = lambda _: reply
        await local.apply(trigger("a", local.subscriber.url, delivery=delivery(local.other.url, retry=1, timeout=timeout)))
        await local.deliver(event())
        assert len(local.subscriber.events) == 2
        assert words in base64.b64decode(str(local.other.events[0].get_extension("knativeerrordata"))).decode()


async def test_an_event_without_a_reachable_subscriber_is_retried_and_lost(tmp_path: Path) -> None:
    async with event_sink() as gone:
        pass
    async with running(tmp_path) as local:
        await local.apply(trigger("a", gone.url, delivery=delivery(retry=3, backoffPolicy="exponential")))
        await local.deliver(event())
        assert local.counts("a") | {"subscriber": ""} == {
            "name": "default/a", "subscriber": "", "delivered": 0, "retries": 3, "dead_letters": 0, "lost": 1,
        }  # fmt: skip


async def test_a_trigger_without_a_dead_letter_sink_uses_its_brokers(tmp_path: Path) -> None:
    async with running(tmp_path) as local:
        local.subscriber.answer = lambda _: Reply(503)
        own = trigger("own", local.subscriber.url, delivery=delivery(retry=0), filter=of_type("ask"))
        none = trigger("none", local.subscriber.url, filter=of_type("tell"))
        await local.apply(a("Broker", "b", {"delivery": delivery(local.other.url)}), own, none)
        await local.deliver(event("1", "ask"), event("2", "tell"))
        assert sorted(local.subscriber.ids()) == ["1", "2", "2", "2"]
        assert sorted(local.other.ids()) == ["1", "2"]


@pytest.mark.parametrize(("policy", "pauses"), [("linear", [0, 2, 4, 6]), ("exponential", [2, 4, 8, 16]), (None, [0, 0, 0, 0])])
def test_pauses_follow_the_backoff_policy(policy: str | None, pauses: list[float]) -> None:
    assert [Delivery(retry=4, policy=policy, backoff_seconds=2).pause_seconds(retry) for retry in range(4)] == pauses


@pytest.mark.parametrize(("text", "seconds"), [("PT1S", 1), ("PT0.25S", 0.25), ("PT1M30S", 90), ("P1DT2H", 93600)])
def test_durations(text: str, seconds: float) -> None:
    found = read_eventing_object(trigger("t", "http://sink.example", delivery={"timeout": text}))
    assert isinstance(found, Trigger)
    assert found.delivery is not None
    assert found.delivery.timeout_seconds == seconds


def sequence(*steps: str, dead_letters: str | None = None, **more: Any) -> dict[str, Any]:
    return a("Sequence", "s", {"steps": [{"uri": step, "delivery": delivery(dead_letters)} for step in steps], **more})


TO_SEQUENCE = {"ref": {"apiVersion": "flows.knative.dev/v1", "kind": "Sequence", "name": "s"}}
TO_BROKER = {"ref": {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": "b"}}


async def test_the_reply_of_each_step_goes_to_the_next_and_the_last_to_the_sequences_reply(tmp_path: Path) -> None:
    async with running(tmp_path) as local:
        step = local.subscriber
        step.answer = lambda seen: Reply(event=event(seen.get_id() + "+", "step" if len(seen.get_id()) < 3 else "answer"))
        await local.apply(
            trigger("in", TO_SEQUENCE, filter=of_type("ask")),
            trigger("out", local.other.url, filter=of_type("answer")),
            sequence(step.url, step.url, step.url + "/path", reply=TO_BROKER),
        )
        await local.deliver(event("1"))
        assert [each["delivered"] for each in local.eventing.status()["steps"]] == [1, 1, 1]
        assert step.ids() == ["1", "1+", "1++"]
        assert local.other.ids() == ["1+++"]


async def test_a_sequence_ends_at_a_step_without_a_reply_or_with_a_failure(tmp_path: Path) -> None:
    async with running(tmp_path) as local:
        replies, step = {"ends": Reply(202), "says": Reply(200, body=b"no event"), "fails": Reply(422)}, local.subscriber
        step.answer = lambda seen: replies[seen.get_id()]
        await local.apply(trigger("in", TO_SEQUENCE), sequence(step.url, step.url, dead_letters=local.other.url))
        await local.deliver(*(event(id_) for id_ in replies))
        assert sorted(step.ids()) == ["ends", "fails", "says"]
        assert local.other.ids() == ["fails"]


@pytest.mark.slow
async def test_a_full_broker_refuses_events_but_takes_replies(tmp_path: Path) -> None:
    async with running(tmp_path, limit=3) as local:
        local.subscriber.answer = lambda asked: Reply(event=event(f"reply-{asked.get_id()}", "answer"), after_seconds=2.0)
        gets = trigger("b", local.other.url, filter=of_type("answer"))
        await local.apply(trigger("a", local.subscriber.url, filter=of_type("ask")), gets)
        sent = await local.deliver(*(event(str(number)) for number in range(5)))
        assert [status for status, _ in sent] == [202] * 3 + [429] * 2
        assert "3 deliveries are in progress" in sent[-1][1]
        assert (await local.deliver(event("6")))[0][0] == 202
        assert sorted(local.other.ids()) == ["reply-0", "reply-1", "reply-2", "reply-6"]


async def test_stopping_does_not_wait_for_deliveries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with asyncio.timeout(60), running(tmp_path) as local:
        local.subscriber.answer = lambda _: Reply(after_seconds=90)
        await local.apply(trigger("a", local.subscriber.url))
        await local.send(event())
        await until(lambda: local.subscriber.events != [])
        await local.eventing.stop()
    assert "1 deliveries were still in progress" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "expected"),
    [
        ("GET", "/default/b", {}, b"", (405, "by POST")),
        ("POST", "/default/other", {}, b"", (404, "no such Broker")),
        ("POST", "/", {}, b"", (404, "no such Broker")),
        ("POST", "/default/b", {}, b"text", (400, "not a CloudEvent")),
        ("POST", "/default/b", {"ce-specversion": "1.0", "ce-type": "t", "ce-source": "/"}, b"", (400, "ce-id")),
        ("POST", "/default/b", {"Content-Type": "application/cloudevents+json"}, b"{", (400, "JSON")),
        ("POST", "/default/b", {}, b"x" * (2**20 + 1), (413, "dataref")),
    ],
)
async def test_the_ingress_refuses(
    tmp_path: Path, method: str, path: str, headers: dict[str, str], body: bytes, expected: tuple[int, str]
) -> None:
    async with running(tmp_path) as local, client() as session:
        await local.apply()
        url = local.eventing.broker_url("b").removesuffix("/default/b") + path
        async with session.request(method, url, data=io.BytesIO(body), headers=headers) as reply:
            assert reply.status == expected[0]
            assert expected[1] in await reply.text()


async def test_events_for_services_elsewhere_are_written_into_files(tmp_path: Path) -> None:
    async with running(tmp_path) as local:
        await local.apply(trigger("a", {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "answers"}}))
        await local.deliver(event("1", data=b'{"a": 1}'), make_event("ask", "/me", b"\0", "application/x", id="2"))
    lines = [json.loads(line) for line in (tmp_path / "events-answers.jsonl").read_text().splitlines()]
    found = {line["id"]: line for line in lines}
    assert found["1"]["data"] == {"a": 1}
    assert found["2"]["data_base64"] == "AA=="


async def test_the_uri_of_a_destination_is_appended_to_a_services_url(tmp_path: Path) -> None:
    async with running(tmp_path) as local:
        local.services["here"] = local.subscriber.url
        ref = {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "here"}
        await local.apply(trigger("a", {"ref": ref, "uri": "/x"}))
        await local.deliver(event())
        assert local.counts("a")["subscriber"] == f"{local.subscriber.url}/x"
        assert local.subscriber.ids() == ["1"]


async def test_a_changed_trigger_keeps_its_counts(tmp_path: Path) -> None:
    async with running(tmp_path) as local:
        await local.apply(trigger("a", local.subscriber.url))
        await local.deliver(event("1"))
        await local.eventing.apply([trigger("a", local.other.url)])
        await local.deliver(event("2"))
        assert local.counts("a")["delivered"] == 2
        assert (local.subscriber.ids(), local.other.ids()) == (["1"], ["2"])


NO_BROKER = a("Trigger", "t", {"broker": "other", "subscriber": {"uri": "http://sink.example"}})


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (NO_BROKER, "Trigger t: there is no Broker 'other'"),
        (a("Trigger", "t", {"subscriber": {"uri": "http://sink.example"}}), r"Trigger t: spec\.broker is missing"),
        (a("Trigger", "t", {"broker": "b"}), r"spec\.subscriber is missing"),
        (trigger("t", "sink.example"), "no http URL"),
        (trigger("t", {"ref": {"apiVersion": "v1", "kind": "Service", "name": "x"}}), r"Service \(v1\) is not here"),
        (trigger("t", TO_SEQUENCE), "there is no Sequence default/s"),
        (trigger("t", "http://sink.example", filters=[{"cesql": "type = 'a'"}]), "'cesql' is not run"),
        (trigger("t", "http://sink.example", delivery={"backoffPolicy": "random"}), "neither exponential nor linear"),
        (trigger("t", "http://sink.example", delivery={"timeout": "5s"}), "'5s' is no ISO 8601 duration"),
        (trigger("t", "http://sink.example", delivery={"timeout": "PT"}), "'PT' is no ISO 8601 duration"),
        (a("Sequence", "s", {"steps": []}), "at least one"),
        ({**a("Sequence", "p"), "kind": "Parallel"}, r"Parallel p \(flows\.knative\.dev/v1\) is not run"),
    ],
)
async def test_unsupported_objects_are_refused_by_name(tmp_path: Path, manifest: dict[str, Any], words: str) -> None:
    async with running(tmp_path) as local:
        with pytest.raises(UnsupportedManifest, match=words):
            await local.apply(manifest)


async def test_the_platform_wakes_a_service_for_an_event(tmp_path: Path) -> None:
    step = {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "echo"}, "delivery": delivery()}
    manifests = [a("Sequence", "s", {"steps": [step]}), a("Broker", "b"), trigger("in", TO_SEQUENCE), echo_service()]
    async with running_platform(tmp_path, *manifests) as platform, client() as session:
        assert revision(platform).pods == []
        assert await post(session, platform.eventing.broker_url("b"), event()) == (202, "")
        await until(lambda: platform.status()["eventing"]["steps"][0]["delivered"] == 1)
        assert len(revision(platform).pods) == 1


async def test_other_kinds_are_ignored(tmp_path: Path) -> None:
    async with running(tmp_path) as local:
        await local.eventing.apply([{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}}])
        assert local.eventing.status() == {}
