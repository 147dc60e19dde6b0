"""The stage's own TLS port: what pods with a certificate send reaches queue-proxy, from others nothing."""

import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from eventing.http.delivery import InfrastructureError, Sender, Unreachable
from eventing.http.pod_tls import PodTLS
from functions.hosting.server import listen
from functions.hosting.tls_port import serve_tls
from knative.local.kubelet.processes import free_port
from tests.support.certificates import CertificateAuthority, write
from tests.support.http_server import Server, serving

NAME = "chat.default"
BODY = bytes(range(256)) * 2**14  # 4 MiB


def tls_of(folder: Path, *, own: bool = True) -> PodTLS:
    certificate = (str(folder / "tls.crt"), str(folder / "tls.key")) if own else (None, None)
    return PodTLS(str(folder / "ca.crt"), NAME, *certificate)


def listening(tls: PodTLS, to_port: int) -> tuple[str, int]:
    listener = listen("127.0.0.1", 0)
    serve_tls(listener, tls, to_port)
    address: tuple[str, int] = listener.getsockname()
    return address


def ask(address: tuple[str, int], tls: PodTLS, body: bytes = b"body") -> bytes:
    with closing(Sender(tls=tls)) as sender:
        return bytes(sender.send(f"https://127.0.0.1:{address[1]}/", {}, [body], 20).body)


@contextmanager
def reversing() -> Iterator[Server]:
    with serving(lambda exchange: exchange.answer(200, exchange.body[::-1])) as server:
        yield server


def test_a_client_may_close_and_its_request_was_read_with_the_handshake(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = write(CertificateAuthority().secret(NAME), tmp_path / "own")
    tls = tls_of(own)
    with reversing() as queue_proxy:
        address = listening(tls, queue_proxy.server_address[1])
        with socket.create_connection(address) as plain, tls.client().wrap_socket(plain, server_hostname=NAME) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
            sock.settimeout(60)
            reply = b""
            while not reply.endswith(b"cba"):
                reply += sock.recv(1000)
            sock.unwrap()  # sends close_notify, and waits for the other side's end
    assert "refused" not in caplog.text


def test_bytes_reach_queue_proxy_and_come_back(tmp_path: Path) -> None:
    own = write(CertificateAuthority().secret(NAME), tmp_path / "own")
    with reversing() as queue_proxy, closing(Sender(tls=tls_of(own))) as sender:
        _, port = listening(tls_of(own), queue_proxy.server_address[1])
        for _ in range(3):
            assert bytes(sender.send(f"https://127.0.0.1:{port}/", {}, [BODY], 60).body) == BODY[::-1]
        assert queue_proxy.connections == 1, "it is kept alive"


def without(authority: CertificateAuthority, folder: Path) -> PodTLS:
    return tls_of(write(authority.secret(NAME), folder), own=False)


def of_another_ca(authority: CertificateAuthority, folder: Path) -> PodTLS:
    return tls_of(write(CertificateAuthority("another").secret(NAME) | {"ca.crt": authority.pem}, folder))


def with_another_name(authority: CertificateAuthority, folder: Path) -> PodTLS:
    return tls_of(write(authority.secret(f"x.{NAME}"), folder))


@pytest.mark.parametrize(
    ("client", "error", "words"),
    [
        (without, Unreachable, "it refuses this pod's certificate, or none was shown"),
        (of_another_ca, Unreachable, "it refuses this pod's certificate, or none was shown"),
        (with_another_name, InfrastructureError, "503: the certificate of the client does not have the name chat.default"),
    ],
)
def test_strangers_are_refused_and_told_why(
    tmp_path: Path, client: Callable[[CertificateAuthority, Path], PodTLS], error: type[Exception], words: str
) -> None:
    authority = CertificateAuthority()
    own = write(authority.secret(NAME), tmp_path / "own")
    with reversing() as queue_proxy:
        address = listening(tls_of(own), queue_proxy.server_address[1])
        with pytest.raises(error, match=words):
            ask(address, client(authority, tmp_path / "client"), BODY)
        with socket.create_connection(address) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            plain.settimeout(60)
            assert b"HTTP" not in plain.recv(100)
        assert queue_proxy.connections == 0


def test_the_port_uses_renewed_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventing.http.pod_tls._CHECK_SECONDS", 0)
    own = write(CertificateAuthority().secret(NAME), tmp_path / "own")
    with reversing() as queue_proxy:
        address = listening(tls_of(own), queue_proxy.server_address[1])
        before = tls_of(own)
        assert ask(address, before, b"abc") == b"cba"
        write(CertificateAuthority("renewed").secret(NAME), own)
        assert ask(address, tls_of(own), b"abc") == b"cba"


def test_a_queue_proxy_that_does_not_run_is_said(tmp_path: Path) -> None:
    own = write(CertificateAuthority().secret(NAME), tmp_path / "own")
    with pytest.raises(InfrastructureError, match="503: queue-proxy does not answer on port"):
        ask(listening(tls_of(own), free_port()), tls_of(own))
