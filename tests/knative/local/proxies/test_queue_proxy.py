"""queue-proxy's own answers: 502 without a function, readiness, X-Forwarded-For."""

import asyncio
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest

from eventing.http.delivery import Sender
from eventing.http.pod_tls import PodTLS
from knative.local.http.client import REFUSED
from knative.local.kubelet.processes import free_port
from knative.local.proxies.queue_proxy import QueueProxy, RequestLimits
from knative.local.proxies.serving_certs import ServingCerts
from knative.local.proxies.timeouts import Timeouts
from tests.support.certificates import CertificateAuthority, write
from tests.support.http_server import serving
from tests.support.knative.behind_queue_proxy import behind_queue_proxy
from tests.support.knative.platform import client, echo_service, fetch, revision, running_platform


async def test_a_function_that_does_not_run_is_502_with_gos_words() -> None:
    """Gateways tell it by these words from a function that broke."""
    proxy = QueueProxy(RequestLimits(0, Timeouts(10), False))
    await proxy.start()
    async with client() as session:
        for port in (None, free_port()):  # after the platform has seen the end of the process, and before
            proxy.connect(port)
            status, text = await fetch(session, f"http://127.0.0.1:{proxy.port}")
            assert status == 502
            assert "dial tcp 127.0.0.1" in text
            assert REFUSED in text
    proxy.close()


async def test_a_function_that_breaks_during_a_request_is_502_without_them() -> None:
    async def breaks(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with behind_queue_proxy(breaks) as (session, url):
        status, text = await fetch(session, url)
        assert status == 502
        assert REFUSED not in text


async def test_with_certificates_there_is_a_port_with_tls_which_uses_renewed_ones(tmp_path: Path) -> None:
    folder = tmp_path / "serving-certs"

    def ask(tls: PodTLS, port: int) -> bytes:
        with closing(Sender(tls=tls)) as sender:
            return bytes(sender.get(f"https://127.0.0.1:{port}/", {}, 10).body)

    def trusting(authority: str) -> PodTLS:
        write(CertificateAuthority(authority).secret("kn-user-default"), folder)
        return PodTLS(str(folder / "ca.crt"), "kn-user-default")

    first = trusting("first")
    proxy = QueueProxy(RequestLimits(1, Timeouts(10)), certs=ServingCerts(folder))
    await proxy.start()
    with serving(lambda exchange: exchange.answer(200, b"safe")) as function:
        proxy.connect(function.server_address[1])
        assert await asyncio.to_thread(ask, first, proxy.tls_port) == b"safe"
        renewed = trusting("renewed")
        assert await asyncio.to_thread(ask, renewed, proxy.tls_port) == b"safe"
        (folder / "tls.crt").write_text("nonsense")
        assert await asyncio.to_thread(ask, renewed, proxy.tls_port) == b"safe", "the earlier certificate stays in use"
        proxy.close()


@pytest.mark.parametrize("prober", ["Knative-Activator-Probe", "Knative-Autoscaling-Probe"])
async def test_queue_proxy_answers_readiness_itself_and_does_not_count_it(prober: str) -> None:
    ready = False
    proxy = QueueProxy(RequestLimits(1, Timeouts(10)), lambda: ready)
    await proxy.start()
    url, began = f"http://127.0.0.1:{proxy.port}/healthz", proxy.all.last_arrival
    probe = {"K-Network-Probe": "queue", "User-Agent": prober}
    async with aiohttp.ClientSession() as session:
        async with session.get(url, headers=probe) as answer:
            assert (answer.status, await answer.read()) == (503, b"")
        ready = True
        async with session.get(url, headers=probe) as answer:
            assert (answer.status, await answer.read()) == (200, b"queue")
        async with session.get(url, headers=probe | {"K-Network-Probe": "probe"}) as answer:
            assert answer.status == 400
        assert proxy.all.last_arrival == began
        async with session.get(url, headers=probe | {"User-Agent": "another"}) as answer:
            assert answer.status == 502, "with another User-Agent it goes to the function, which does not run"
        assert proxy.all.last_arrival > began
    proxy.close()


async def show_header(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with every X-Forwarded-For line of the request."""
    lines = [line.partition(b": ")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"x-forwarded-for:")]
    body = b" | ".join(lines)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ([], "127.0.0.1"),
        (["203.0.113.9"], "203.0.113.9, 127.0.0.1"),
        (["203.0.113.9, 198.51.100.2"], "203.0.113.9, 198.51.100.2, 127.0.0.1"),
        (["203.0.113.9", "198.51.100.2"], "203.0.113.9, 198.51.100.2, 127.0.0.1"),
    ],
)
async def test_queue_proxy_adds_the_clients_address(written: list[str], seen: str) -> None:
    headers = [("X-Forwarded-For", value) for value in written]
    async with behind_queue_proxy(show_header) as (session, url), session.get(url, headers=headers) as reply:
        assert await reply.text() == seen


async def test_ingress_and_activator_add_their_addresses_as_well(tmp_path: Path) -> None:
    """Three proxies add one while the activator is in the path, two when it is not, as on a cluster."""
    async with running_platform(tmp_path, echo_service()) as platform, client() as session:
        url = platform.url("echo") + "/header?X-Forwarded-For"
        assert revision(platform).activator.in_path
        assert await fetch(session, url) == (200, "127.0.0.1, 127.0.0.1, 127.0.0.1")
        revision(platform).activator.in_path = False
        assert await fetch(session, url) == (200, "127.0.0.1, 127.0.0.1")
