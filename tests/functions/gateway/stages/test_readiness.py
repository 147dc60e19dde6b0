"""Instances that answer a probe over HTTP before Kubernetes reports them ready."""

import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from eventing.http.pod_tls import PodTLS
from functions.gateway.stages.readiness import EarlyReadiness
from functions.gateway.stages.routes import Endpoint
from tests.support.certificates import CertificateAuthority, write
from tests.support.functions.gateway import wait_until
from tests.support.http_server import Exchange, Server, serving


class QueueProxy:
    """Answers probes by `verdict`: a status and a body."""

    server: Server

    def __init__(self) -> None:
        self.verdict = (503, b"")
        self.probes: list[str | None] = []

    @property
    def url(self) -> str:
        return self.server.origin

    def respond(self, exchange: Exchange) -> None:
        self.probes.append(exchange.headers["K-Network-Probe"])
        is_probe = exchange.headers["User-Agent"] == "Knative-Activator-Probe"
        status, body = self.verdict if is_probe else (404, b"asked of the function")
        exchange.answer(status, body, Connection="close")


class Told:
    def __init__(self) -> None:
        self.all: list[list[Endpoint] | None] = []

    def __call__(self, stage: int, endpoints: Sequence[Endpoint] | None) -> None:
        assert stage == 1
        self.all.append(None if endpoints is None else list(endpoints))


@contextmanager
def asking(told: Told, tls: PodTLS | None = None) -> Iterator[EarlyReadiness]:
    readiness = EarlyReadiness(told, tls)
    try:
        yield readiness
    finally:
        readiness.stop()


@pytest.fixture
def proxy() -> Iterator[QueueProxy]:
    proxy = QueueProxy()
    with serving(proxy.respond) as proxy.server:
        yield proxy


def test_an_instance_is_ready_once_its_queue_proxy_says_so(proxy: QueueProxy) -> None:
    told = Told()
    starting = Endpoint(proxy.url, "s-00001", ready=False)
    ready = Endpoint(proxy.url, "s-00001")
    with asking(told) as readiness:
        readiness.endpoints_changed(1, [starting])
        wait_until(lambda: len(proxy.probes) >= 2, "a second question, after a no")
        assert told.all == [[starting]]
        proxy.verdict = (200, b"queue")
        wait_until(lambda: told.all[-1] == [ready], "its readiness")
        other = Endpoint("http://127.0.0.1:1", "s-00001")
        readiness.endpoints_changed(1, [starting, other])
        assert told.all[-1] == [ready, other], "what it has said stays said"
        asked, before = len(proxy.probes), len(told.all)
        readiness.endpoints_changed(1, [ready])
        readiness.endpoints_changed(1, [starting])
        assert told.all[before : before + 2] == [[ready], [starting]], "Kubernetes has seen it fail since"
        wait_until(lambda: told.all[-1] == [ready] and len(proxy.probes) > asked, "that it has recovered")
    assert set(proxy.probes) == {"queue"}


def test_probes_go_by_tls(proxy: QueueProxy, tmp_path: Path) -> None:
    folder = write(CertificateAuthority().secret("kn-user-default"), tmp_path / "serving-certs")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    proxy.server.socket = context.wrap_socket(proxy.server.socket, server_side=True, do_handshake_on_connect=False)
    proxy.verdict, told = (200, b"queue"), Told()
    url = proxy.url.replace("http:", "https:")
    with asking(told, PodTLS(str(folder / "ca.crt"), "kn-user-default")) as readiness:
        readiness.endpoints_changed(1, [Endpoint(url, ready=False)])
        wait_until(lambda: told.all[-1] == [Endpoint(url)], "its readiness")


def test_only_queue_proxy_can_say_it(proxy: QueueProxy) -> None:
    """The function's own health check does not say that its weights are loaded."""
    told = Told()
    proxy.verdict = (200, b"ok")
    with asking(told) as readiness:
        readiness.endpoints_changed(1, [Endpoint(proxy.url, ready=False)])
        wait_until(lambda: len(proxy.probes) >= 2, "two questions")
        assert len(told.all) == 1


def test_terminating_and_unknown_instances_are_not_probed(proxy: QueueProxy) -> None:
    told = Told()
    before = threading.active_count()
    with asking(told) as readiness:
        readiness.endpoints_changed(1, [Endpoint(proxy.url, ready=False, terminating=True), Endpoint("http://127.0.0.1:2")])
        assert not proxy.probes
        readiness.endpoints_changed(1, [Endpoint(proxy.url, ready=False)])
        wait_until(lambda: proxy.probes, "the question")
        readiness.endpoints_changed(1, None)
        assert told.all[-1] is None
        wait_until(lambda: threading.active_count() <= before + 1, "the end of the thread")
        proxy.verdict = (200, b"queue")
        assert told.all[-1] is None
