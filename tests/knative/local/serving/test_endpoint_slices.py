"""The EndpointSlice API: list, watch, selectors, versions."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from knative.local.serving.endpoint_slices import WatchedObjects, endpoint_slice
from tests.support.knative.platform import client, echo_service, fetch, revision, running_platform, until

PATH = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"


def a_slice(pod: str = "p1", *, ready: bool = True, service: str = "echo", port: int = 1234) -> dict[str, Any]:
    conditions = {"ready": ready, "serving": ready, "terminating": False}
    return endpoint_slice(service, f"{service}-00001", "default", pod, conditions, port)


async def collect(slices: WatchedObjects, count: int, since: str = "", selector: str = "") -> list[dict[str, Any]]:
    events = []
    async with asyncio.timeout(60):
        async for line in slices.watch("default", selector, since, False):
            events.append(json.loads(line))
            if len(events) == count:
                break
    return events


def test_a_slice_has_knatives_labels_and_names_its_port() -> None:
    found = a_slice()
    assert (
        found["metadata"]["labels"]
        | {
            "kubernetes.io/service-name": "echo-00001-private",
            "serving.knative.dev/service": "echo",
            "serving.knative.dev/revision": "echo-00001",
            "networking.internal.knative.dev/serviceType": "Private",
        }
        == found["metadata"]["labels"]
    )
    assert found["ports"] == [{"name": "http", "protocol": "TCP", "port": 1234}]
    assert found["endpoints"][0]["addresses"] == ["127.0.0.1"]


async def test_a_watch_without_version_begins_with_what_exists() -> None:
    slices = WatchedObjects()
    slices.put(a_slice("p1"))
    watching = asyncio.create_task(collect(slices, 4))
    await asyncio.sleep(0)
    slices.put(a_slice("p2"))
    slices.put(a_slice("p2"))  # the same again is no event
    slices.put(a_slice("p2", ready=False))
    slices.remove(a_slice("p1"))
    events = await watching
    seen = [(event["type"], event["object"]["metadata"]["name"]) for event in events]
    assert seen == [("ADDED", "p1-private"), ("ADDED", "p2-private"), ("MODIFIED", "p2-private"), ("DELETED", "p1-private")]


async def test_a_watch_goes_on_from_a_lists_version() -> None:
    slices = WatchedObjects()
    slices.put(a_slice("p1"))
    version = slices.list("default", "")["metadata"]["resourceVersion"]
    slices.put(a_slice("p2"))
    (event,) = await collect(slices, 1, since=version)
    assert event["object"]["metadata"]["name"] == "p2-private"
    assert int(event["object"]["metadata"]["resourceVersion"]) > int(version)


async def test_a_version_older_than_the_history_is_expired() -> None:
    slices = WatchedObjects()
    for index in range(1100):
        slices.put(a_slice(port=index))
    (event,) = await collect(slices, 1, since="1")
    assert (event["type"], event["object"]["code"], event["object"]["reason"]) == ("ERROR", 410, "Expired")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("", 2),
        ("serving.knative.dev/service=echo", 1),
        ("serving.knative.dev/service==echo,networking.internal.knative.dev/serviceType=Private", 1),
        ("serving.knative.dev/service!=echo", 1),
        ("serving.knative.dev/service in (echo, other)", 2),
        ("serving.knative.dev/service notin (echo)", 1),
        ("serving.knative.dev/service", 2),
        ("!serving.knative.dev/service", 0),
    ],
)
async def test_label_selectors(selector: str, expected: int) -> None:
    slices = WatchedObjects()
    slices.put(a_slice("p1"))
    slices.put(a_slice("p2", service="other"))
    assert len(slices.list("default", selector)["items"]) == expected
    assert slices.list("elsewhere", selector)["items"] == []


async def test_a_watch_shows_the_life_of_a_pod(tmp_path: Path) -> None:
    async with running_platform(tmp_path, echo_service()) as platform, client() as session:
        url = f"{platform.admin_url}{PATH}?labelSelector=serving.knative.dev/service%3Decho"
        seen: list[tuple[str, str, dict[str, bool]]] = []
        begun = asyncio.Event()
        watching = asyncio.create_task(watch(session, url, seen, begun))
        await begun.wait()
        await fetch(session, platform.url("echo") + "/pid")
        status, text = await fetch(session, url)
        (found,) = json.loads(text)["items"]
        pod = revision(platform).pods[0]
        assert found["ports"][0]["port"] == pod.proxy.port
        await pod.leave()
        await until(lambda: any(kind == "DELETED" for kind, _, _ in seen))
        watching.cancel()
        own = [(kind, conditions) for kind, name, conditions in seen if name == f"{pod.name}-private"]  # another may follow
        states = [(kind, conditions["ready"], conditions["terminating"]) for kind, conditions in own]
        assert states == [
            ("ADDED", False, False),
            ("MODIFIED", True, False),
            ("MODIFIED", False, True),
            ("DELETED", False, True),
        ]
        assert status == 200


@pytest.mark.slow
async def test_a_watch_ends_after_timeout_seconds(tmp_path: Path) -> None:
    async with running_platform(tmp_path) as platform, client() as session:
        assert await fetch(session, f"{platform.admin_url}{PATH}?watch=1&timeoutSeconds=1") == (200, "")


async def test_unsupported_requests_get_a_status(tmp_path: Path) -> None:
    async with running_platform(tmp_path) as platform, client() as session:
        assert (await fetch(session, platform.admin_url + "/api/v1/pods"))[0] == 404
        assert (await fetch(session, f"{platform.admin_url}{PATH}?labelSelector=a%20b"))[0] == 400
        assert (await fetch(session, f"{platform.admin_url}{PATH}?watch=1&resourceVersion=x"))[0] == 400
        async with session.delete(platform.admin_url + PATH) as reply:
            assert reply.status == 405
        assert "kn_revision_pods_desired" in (await fetch(session, platform.admin_url + "/metrics"))[1]


async def watch(
    session: aiohttp.ClientSession, url: str, seen: list[tuple[str, str, dict[str, bool]]], begun: asyncio.Event
) -> None:
    async with session.get(url + "&watch=1") as reply:
        begun.set()
        async for line in reply.content:
            event = json.loads(line)
            found = event["object"]
            seen.append((event["type"], found["metadata"]["name"], found["endpoints"][0]["conditions"]))
