"""The watch of EndpointSlices, against a server that lists and watches as the Kubernetes API does."""

import ipaddress
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from eventing.http.pod_network import PodNetwork
from functions.gateway.stages.endpoints import EndpointsWatch, OnEndpoints, service_name
from functions.gateway.stages.kubernetes_api import SILENCE_SECONDS, WATCH_SECONDS, KubernetesAPI
from functions.gateway.stages.routes import Endpoint
from tests.support.functions.gateway import wait_until
from tests.support.knative.kubernetes_watch import WatchServer

PODS = PodNetwork((ipaddress.ip_network("10.1.0.0/16"),), 8012)
KNATIVE_PORTS = [("http-autometric", 9090), ("http", 8012), ("https", 8112)]


def slice_of(
    name: str,
    *addresses: tuple[str, dict[str, bool | None]],
    revision: str = "stage-0-00001",
    ports: list[tuple[str | None, int]] | None = None,
    service: str = "stage-0",
) -> dict[str, Any]:
    labels = {"serving.knative.dev/service": service, "serving.knative.dev/revision": revision}
    return {
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "metadata": {"name": name, "labels": labels},
        "ports": [{"name": name, "port": port, "protocol": "TCP"} for name, port in ports or KNATIVE_PORTS],
        "endpoints": [{"addresses": [address], "conditions": conditions} for address, conditions in addresses],
    }


FIRST, SECOND = (Endpoint(f"http://10.1.0.{number}:8012", "stage-0-00001") for number in (5, 6))
READY: dict[str, bool | None] = {"ready": True, "serving": True, "terminating": False}
TERMINATING: dict[str, bool | None] = {"ready": False, "serving": True, "terminating": True}
FIRST_READY, SECOND_READY = ("10.1.0.5", READY), ("10.1.0.6", READY)


class Told:
    """Reports of the watch about one stage, newest last."""

    watch: EndpointsWatch

    def __init__(self) -> None:
        self.all: list[list[Endpoint]] = []
        self.unknown = 0

    def __call__(self, endpoints: Any) -> None:
        if endpoints is None:
            self.unknown += 1
            return
        self.all.append(sorted(endpoints, key=lambda endpoint: endpoint.url))

    def wait(self, *expected: Endpoint) -> None:
        wait_until(lambda: self.all and self.all[-1] == list(expected), f"{expected} after {self.all}")


@contextmanager
def watching(
    server: WatchServer, pods: PodNetwork = PODS, on_change: OnEndpoints | None = None, **seconds: float
) -> Iterator[Told]:
    """on_change: instead of what it yields, which has its `watch`. seconds: of the watch."""
    told = Told()
    api = KubernetesAPI(server.url, "lamina", **seconds)  # type: ignore[arg-type]
    told.watch = EndpointsWatch(api, pods, ["stage-0", "stage-1"])
    told.watch.follow("stage-0", on_change or told)
    told.watch.slices.start()
    try:
        yield told
    finally:
        told.watch.slices.stop()


@pytest.fixture
def server() -> Iterator[WatchServer]:
    with WatchServer() as started:
        yield started


def test_lists_then_follows(server: WatchServer) -> None:
    server.put(slice_of("one", FIRST_READY))
    with watching(server) as told:
        told.wait(FIRST)
        server.put(slice_of("one", FIRST_READY, ("10.1.0.6", {"ready": False})))
        told.wait(FIRST, Endpoint("http://10.1.0.6:8012", "stage-0-00001", ready=False))
        server.put(slice_of("one", ("10.1.0.5", TERMINATING), SECOND_READY))
        told.wait(Endpoint("http://10.1.0.5:8012", "stage-0-00001", ready=False, terminating=True), SECOND)
        server.delete("one")
        told.wait()
    listing, following = server.requests[:2]
    assert urlsplit(listing).path == "/apis/discovery.k8s.io/v1/namespaces/lamina/endpointslices"
    selector = "serving.knative.dev/service in (stage-0,stage-1),networking.internal.knative.dev/serviceType=Private"
    assert parse_qs(urlsplit(listing).query) == {"labelSelector": [selector]}
    parameters = parse_qs(urlsplit(following).query)
    assert parameters["watch"] == ["1"]
    assert parameters["resourceVersion"] == ["1"]
    assert parameters["labelSelector"] == [selector]


def test_one_watch_reports_each_service_to_its_own_follower(server: WatchServer) -> None:
    """A follower that comes later is told at once, and one that left is told nothing."""
    server.put(slice_of("one", FIRST_READY))
    server.put(slice_of("two", SECOND_READY, service="stage-1"))
    told, other = Told(), Told()
    watch = EndpointsWatch(KubernetesAPI(server.url, "lamina"), PODS)
    watch.follow("stage-0", told)
    watch.slices.start()
    try:
        told.wait(FIRST)
        watch.follow("stage-1", other)
        assert other.all == [[SECOND]]
        server.put(slice_of("two", service="stage-1"))
        other.wait()
        watch.unfollow("stage-0")
        server.put(slice_of("one", SECOND_READY))
        server.put(slice_of("two", SECOND_READY, service="stage-1"))
        other.wait(SECOND)
        assert told.all == [[FIRST]], "the other Service's changes, or its own after it left, were told"
    finally:
        watch.slices.stop()
    assert len([each for each in server.requests if "watch=1" in each]) == 1


@pytest.mark.parametrize(
    ("port", "ports", "url"),
    [
        (8112, KNATIVE_PORTS, "https://10.1.0.5:8112"),
        (8443, KNATIVE_PORTS, "https://10.1.0.5:8443"),  # a stage's own, which no Service has
        (0, [("http", 40001), ("https", 40002)], "https://10.1.0.5:40002"),  # knative/local
    ],
)
def test_with_tls_pods_are_reached_by_https_at_their_tls_port(
    server: WatchServer, port: int, ports: list[tuple[str | None, int]], url: str
) -> None:
    server.put(slice_of("one", FIRST_READY, ports=ports))
    with watching(server, PodNetwork(PODS.networks, port, secure=True)) as told:
        told.wait(Endpoint(url, "stage-0-00001"))


def test_with_tls_a_pod_without_a_tls_port_is_not_used(server: WatchServer) -> None:
    server.put(slice_of("one", FIRST_READY, ports=[("http", 40001)]))
    with watching(server, PodNetwork(PODS.networks, 0, secure=True)) as told:
        wait_until(lambda: told.watch.refused("stage-0") == 1, "the address to be refused")
        assert not any(told.all)


def test_slices_are_merged(server: WatchServer) -> None:
    """knative/local has a slice for each pod, each with its own port; Kubernetes splits large ones."""
    local = PodNetwork((ipaddress.ip_network("127.0.0.0/8"),), 0)
    server.put(slice_of("pod-1", ("127.0.0.1", READY), ports=[("http", 40001)]))
    server.put(slice_of("pod-2", ("127.0.0.1", READY), revision="stage-0-00002", ports=[(None, 40002)]))
    with watching(server, local) as told:
        told.wait(Endpoint("http://127.0.0.1:40001", "stage-0-00001"), Endpoint("http://127.0.0.1:40002", "stage-0-00002"))
        server.delete("pod-1")
        told.wait(Endpoint("http://127.0.0.1:40002", "stage-0-00002"))


def test_an_address_in_two_slices_is_one_instance(server: WatchServer) -> None:
    server.put(slice_of("old", ("10.1.0.5", {"ready": False})))
    server.put(slice_of("new", FIRST_READY))
    with watching(server) as told:
        told.wait(FIRST)


def test_missing_conditions_have_kubernetes_defaults(server: WatchServer) -> None:
    server.put(slice_of("one", ("10.1.0.5", {}), ("10.1.0.6", {"ready": None, "terminating": None})))
    with watching(server) as told:
        told.wait(FIRST, SECOND)


def test_foreign_addresses_and_ports_are_not_followed(server: WatchServer, caplog: pytest.LogCaptureFixture) -> None:
    server.put(slice_of("foreign", ("192.168.0.1", READY), ("169.254.169.254", READY), ("not-an-address", READY)))
    server.put(slice_of("port", ("10.1.0.7", READY), ports=[("http", 22)]))
    server.put(slice_of("unnamed", ("10.1.0.8", READY), ports=[("a", 8012), ("b", 8012)]))
    server.put(slice_of("own", ("10.1.0.9", READY)))
    with caplog.at_level(logging.WARNING), watching(server) as told:
        told.wait(Endpoint("http://10.1.0.9:8012", "stage-0-00001"))
    assert "foreign: 169.254.169.254 port 8012 is ignored" in caplog.text
    assert "port: 10.1.0.7 port 22 is ignored" in caplog.text


def test_the_service_url_is_used_if_all_addresses_are_refused(server: WatchServer, caplog: pytest.LogCaptureFixture) -> None:
    """A pipeline with a wrong pod network would never answer."""
    server.put(slice_of("one", ("192.168.0.1", READY)))
    with caplog.at_level(logging.WARNING), watching(server) as told:
        wait_until(lambda: told.unknown == 1, "the fallback")
        assert told.watch.refused("stage-0") == 1
        server.put(slice_of("one", ("192.168.0.1", READY), ("192.168.0.2", READY)))
        wait_until(lambda: told.watch.refused("stage-0") == 2, "the second pod")
        server.put(slice_of("one", ("192.168.0.1", READY), FIRST_READY))
        told.wait(FIRST)
        assert (told.watch.refused("stage-0"), told.unknown) == (1, 1)
        server.delete("one")
        told.wait()
        assert told.watch.refused("stage-0") == 0
    assert caplog.text.count("no instance of stage-0 is in the pod network, 10.1.0.0/16 port 8012") == 1
    assert caplog.text.count("192.168.0.1 port 8012 is ignored") == 1


def test_ipv6(server: WatchServer) -> None:
    server.put(slice_of("one", ("fd00::5", READY)))
    with watching(server, PodNetwork((ipaddress.ip_network("fd00::/64"),), 8012)) as told:
        told.wait(Endpoint("http://[fd00::5]:8012", "stage-0-00001"))


@pytest.mark.parametrize("how", ["status", "event"])
def test_an_expired_version_is_listed_anew(server: WatchServer, how: str) -> None:
    server.put(slice_of("one", FIRST_READY))
    with watching(server) as told:
        told.wait(FIRST)
        server.expire(how)
        server.put(slice_of("one", SECOND_READY), silently=True)
        server.end_watches()
        told.wait(SECOND)


def test_a_watch_that_ends_is_resumed(server: WatchServer) -> None:
    server.put(slice_of("one", FIRST_READY))
    with watching(server) as told:
        told.wait(FIRST)
        wait_until(lambda: server.watches, "the watch")
        server.bookmark("77")
        server.end_watches()
        wait_until(lambda: any("resourceVersion=77" in request for request in server.requests), "the next watch")
        assert len(told.all) == 1


@pytest.mark.slow
def test_an_api_that_fails_is_asked_again(server: WatchServer, caplog: pytest.LogCaptureFixture) -> None:
    server.put(slice_of("one", FIRST_READY))
    server.failures = [500, 403, 200]
    with caplog.at_level(logging.WARNING), watching(server) as told:
        told.wait(FIRST)
    assert "watching the instances of stage-0, stage-1 failed, trying again: the Kubernetes API answered 500" in caplog.text
    assert "answered 403" in caplog.text
    assert "trying again: no ObjectList" in caplog.text


@pytest.mark.slow
def test_without_the_right_to_watch_the_instances_are_unknown(server: WatchServer) -> None:
    with watching(server) as told:
        wait_until(lambda: server.watches, "the watch")
        assert not told.unknown
        server.failures = [500, 500]
        server.end_watches(broken=True)
        wait_until(lambda: not server.failures and len(told.all) == 2, "the API's return")
        assert not told.unknown, "what was known is better than nothing"
        server.failures = [403]
        server.end_watches(broken=True)
        wait_until(lambda: len(told.all) == 3, "the return of the right")
        assert told.unknown == 1


def test_an_unavailable_api_is_retried() -> None:
    with WatchServer() as closed:
        port = closed.port
    with watching(closed) as told:
        wait_until(lambda: told.unknown, "the report that nothing is known")
        with WatchServer(port) as server:
            server.put(slice_of("one", FIRST_READY))
            told.wait(FIRST)
            told.watch.slices.stop()


def test_a_listener_that_fails_is_called_again(server: WatchServer, caplog: pytest.LogCaptureFixture) -> None:
    server.put(slice_of("one", FIRST_READY))
    told, failures = Told(), ["first", "second"]

    def fail(endpoints: Any) -> None:
        if failures:
            raise KeyError(failures.pop())
        told(endpoints)

    with watching(server, on_change=fail):
        told.wait(FIRST)
        server.put(slice_of("one", SECOND_READY))
        told.wait(SECOND)
    assert "KeyError" in caplog.text


@pytest.mark.slow
def test_versions_that_expire_at_once_are_asked_for_more_and_more_slowly(
    server: WatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    real = threading.Event.wait

    def wait(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread().name.startswith("watch of") and timeout is not None:
            pauses.append(timeout)
            timeout = 0.0
        return real(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", wait)
    server.always_gone = True
    with watching(server):
        wait_until(lambda: len(pauses) >= 8, "eight pauses")
    assert pauses[7] > 10 * pauses[0]


def test_a_watch_that_has_died_in_silence_is_noticed(server: WatchServer) -> None:
    """The server neither ends the watch in time nor sends the changes that there are."""
    assert WATCH_SECONDS + SILENCE_SECONDS < 30
    server.put(slice_of("one", FIRST_READY))
    with watching(server, watch_seconds=0.2, silence_seconds=0.1) as told:
        told.wait(FIRST)
        wait_until(lambda: server.watches, "the watch")
        server.put(slice_of("one", SECOND_READY), silently=True)
        told.wait(SECOND)


def test_stopping_ends_an_open_watch(server: WatchServer) -> None:
    before = threading.active_count()
    with watching(server) as told:
        wait_until(lambda: told.all and server.watches, "the watch")
    wait_until(lambda: threading.active_count() <= before + 1, "the end of the thread")


def test_names_of_services() -> None:
    assert service_name("http://stage-0.default.svc.cluster.local") == "stage-0"
    assert service_name("http://stage-0") == "stage-0"
