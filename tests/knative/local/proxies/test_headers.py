"""docs/reference.md lists every header between Lamina and Knative; each row is checked in the code and in knative/local."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from werkzeug.test import EnvironBuilder

from eventing.http.delivery import RequestTarget, fixed_headers, request_head
from eventing.problems import QueueFull
from eventing.wire.cloud_event import make_event
from functions.gateway.answers.authentication import Clients
from functions.gateway.stages.readiness import EarlyReadiness
from functions.gateway.stages.routes import Endpoint
from functions.hosting.web import problem_response
from functions.stage.serving.app import stage_admission
from knative.local.eventing.local_eventing import LocalEventing
from knative.local.proxies.queue_proxy import QueueProxy
from tests.support.house.pages import section, strings_of_the_code, tables
from tests.support.knative.event_sink import EventSink, Reply, event_sink, post
from tests.support.knative.platform import client, echo_service, revision, running_platform, until
from tests.support.paths import ROOT


@dataclass
class Site:
    """A pod of the echo app behind the ingress and the activator."""

    session: aiohttp.ClientSession
    ingress: str  # the URL of its Service
    pod: QueueProxy

    async def get(self, path: str, headers: dict[str, str], *, through_activator: bool = False) -> tuple[int, str]:
        base = self.ingress if through_activator else f"http://127.0.0.1:{self.pod.port}"
        async with self.session.get(f"{base}/{path}", headers=headers) as reply:
            return reply.status, await reply.text()

    async def counted(self, headers: dict[str, str]) -> bool:
        """Whether a request with these headers to the pod's port is reported to the autoscaler."""
        now = asyncio.get_running_loop().time
        self.pod.report(now())
        assert (await self.get("pid", headers))[0] == 200
        return self.pod.report(now()).arrivals == 1


@asynccontextmanager
async def a_site(folder: Path) -> AsyncIterator[Site]:
    async with running_platform(folder, echo_service()) as platform, client() as session:
        url = platform.url("echo")
        async with session.get(f"{url}/pid") as reply:
            assert reply.status == 200
        (pod,) = revision(platform).pods
        yield Site(session, url, pod.proxy)


async def probe(site: Site) -> None:
    told: list[Sequence[Endpoint] | None] = []
    readiness = EarlyReadiness(lambda _, endpoints: told.append(endpoints))
    url = f"http://127.0.0.1:{site.pod.port}"
    try:
        readiness.endpoints_changed(0, [Endpoint(url, ready=False)])
        await until(lambda: told[-1] == [Endpoint(url)])
    finally:
        readiness.stop()
    asked = {"K-Network-Probe": "queue", "User-Agent": "Knative-Activator-Probe"}
    assert (await site.get("pid", asked, through_activator=True))[0] == 400, "only pods are asked, never a Service"
    version = {"K-Network-Probe": "probe", "K-Network-Hash": "v1"}
    assert await site.get("pid", version) == (200, ""), "answered for any User-Agent"


async def user_agent(site: Site) -> None:
    own = fixed_headers({"User-Agent": "kube-probe/1.36"})
    assert own["User-Agent"] == "lamina"
    assert await site.counted(own)
    for prober in ("kube-probe/1.36", "Knative-Activator-Probe", "Knative-Autoscaling-Probe"):
        assert (await site.get("pid", {"User-Agent": prober}))[0] == 400
    assert await site.get("pid", {"User-Agent": "kube-probe/1.36"}, through_activator=True) == (200, "")


async def kubelet_probe(site: Site) -> None:
    assert not await site.counted({"K-Kubelet-Probe": "x"})
    assert await site.get("pid", {"K-Kubelet-Probe": "x"}, through_activator=True) == (200, "")


async def proxy_request(site: Site) -> None:
    assert not await site.counted({"K-Proxy-Request": "activator"})
    _, seen = await site.get("header?K-Proxy-Request", {"K-Proxy-Request": "x"}, through_activator=True)
    assert seen == "activator"


async def original_host(site: Site) -> None:
    assert await site.get("header?Host", {"K-Original-Host": "other.example"}) == (200, "other.example")
    assert await site.get("header?K-Original-Host", {"K-Original-Host": "other.example"}) == (200, "")


async def revision_names(site: Site) -> None:
    for name in ("Knative-Serving-Revision", "Knative-Serving-Namespace"):
        assert await site.get(f"header?{name}", {name: "x"}, through_activator=True) == (200, "")


async def host(site: Site) -> None:
    target = RequestTarget.of("http://stage.default.example:81/x")
    assert b"\r\nHost: stage.default.example:81\r\n" in request_head(target, fixed_headers({"Host": "other"}), "POST")
    assert await site.get("header?Host", {"Host": "own.example"}, through_activator=True) == (200, "own.example")


async def authorization(site: Site) -> None:
    signed = {"PATH_INFO": "/", "REQUEST_METHOD": "POST", "HTTP_CE_SIGNATURE": "x", "CONTENT_TYPE": "x/y"}
    assert stage_admission("token")(signed) > 0
    assert await site.get("header?Authorization", {"Authorization": "Bearer a"}) == (200, "Bearer a")


async def forwarded_for(site: Site) -> None:
    clients = Clients(None, proxies=3)
    _, seen = await site.get("header?X-Forwarded-For", {"X-Forwarded-For": "forged"}, through_activator=True)
    builder = EnvironBuilder(headers={"X-Forwarded-For": seen})
    assert seen.startswith("forged, ")
    assert clients.identify(builder.get_request()) == "127.0.0.1"


async def traceparent(site: Site) -> None:
    assert await site.get("header?traceparent", {"traceparent": "00-1"}, through_activator=True) == (200, "00-1")


def prefer(subscriber: EventSink, letters: EventSink) -> None:
    assert {headers.get("prefer") for headers in subscriber.headers} == {"reply"}
    assert "prefer" not in letters.headers[-1]


def retry_after(subscriber: EventSink, letters: EventSink) -> None:
    assert problem_response(QueueFull("full")).headers["Retry-After"] == "1"
    assert len(subscriber.events) == 3, "its Retry-After of an hour was not waited for"


def broker_attributes(subscriber: EventSink, letters: EventSink) -> None:
    assert subscriber.events[-1].get_extension("knativebrokerttl") is None
    (letter,) = letters.events
    assert letter.get_extension("knativeerrorcode") == "503"
    assert letter.get_extension("knativeerrordest") == subscriber.url
    assert letter.get_extension("knativeerrordata")


SERVING: dict[str, Callable[[Site], Awaitable[None]]] = {
    "K-Network-Probe": probe, "User-Agent": user_agent, "K-Kubelet-Probe": kubelet_probe, "K-Proxy-Request": proxy_request,
    "K-Original-Host": original_host, "Knative-Serving-Revision": revision_names, "Host": host, "Authorization": authorization,
    "X-Forwarded-For": forwarded_for, "traceparent": traceparent,
}  # fmt: skip
EVENTING: dict[str, Callable[[EventSink, EventSink], None]] = {
    "Prefer": prefer,
    "Retry-After": retry_after,
    "ce-knativebrokerttl": broker_attributes,
}


@pytest.mark.parametrize("header", SERVING)
async def test_serving(tmp_path: Path, header: str) -> None:
    async with a_site(tmp_path) as site:
        await SERVING[header](site)


@pytest.mark.parametrize("header", EVENTING)
async def test_eventing(tmp_path: Path, header: str) -> None:
    """A subscriber that refuses each attempt with Retry-After, and the sink of dead letters."""
    refusal = Reply(503, body=b"later", headers={"Retry-After": "3600"})
    async with event_sink(lambda _: refusal) as subscriber, event_sink() as letters, client() as session:
        local = LocalEventing(lambda *_: None, tmp_path, 100)
        await local.apply(broker_with_trigger(subscriber.url, dead_letters=letters.url))
        await post(session, local.broker_url("b"), make_event("ask", "/me", b"{}", id="1"))
        await until(lambda: len(letters.events) == 1)
        await local.stop()
        EVENTING[header](subscriber, letters)


def broker_with_trigger(subscriber: str, *, dead_letters: str) -> list[dict[str, Any]]:
    delivery = {"retry": 2, "backoffPolicy": "linear", "backoffDelay": "PT0.01S", "deadLetterSink": {"uri": dead_letters}}
    trigger = {"broker": "b", "subscriber": {"uri": subscriber}, "delivery": delivery}
    return [
        {"apiVersion": "eventing.knative.dev/v1", "kind": kind, "metadata": {"name": "b"}, "spec": spec}
        for kind, spec in (("Broker", {}), ("Trigger", trigger))
    ]


def test_the_table_has_a_row_for_every_header_that_is_checked_or_in_the_code() -> None:
    (rows,) = tables(section((ROOT / "docs" / "reference.md").read_text(), "Headers between Lamina and Knative"))
    first = [re.findall(r"`([^`]+)`", row[0]) for row in rows]
    assert sorted(names[0] for names in first) == sorted([*SERVING, *EVENTING])
    known = {name.lower() for names in first for name in names}
    knatives = re.compile(r"k-[a-z]+-[a-z]+|knative-serving-[a-z]+|kn-[a-z]+|x-forwarded-[a-z]+|prefer|retry-after|user-agent")
    in_code = {text.lower() for text in strings_of_the_code()}
    assert {text for text in in_code if knatives.fullmatch(text)} <= known


def test_what_only_knatives_components_may_send_is_removed() -> None:
    sent = fixed_headers(dict.fromkeys([*SERVING, "K-Passthrough-Lb", "Kn-Namespace", "knative-serving-tag"], "x"))
    assert {name for name in sent if name.lower().startswith("k")} == set()
    assert sent["Authorization"] == "x"
