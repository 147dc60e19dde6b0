"""TLS between pods: whom a sender trusts, what it says if it does not, certificates that are renewed."""

import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from eventing.http.delivery import Sender, Unreachable
from eventing.http.pod_tls import PodTLS, UnusableTLSFiles
from tests.support.certificates import CertificateAuthority, write
from tests.support.http_server import Server, serving

NAME = "kn-user-default"


def tls_of(folder: Path, *, own: bool = False) -> PodTLS:
    certificate = (str(folder / "tls.crt"), str(folder / "tls.key")) if own else (None, None)
    return PodTLS(str(folder / "ca.crt"), NAME, *certificate)


@contextmanager
def pod(settings: ssl.SSLContext | PodTLS) -> Iterator[Server]:
    """An HTTPS server; with PodTLS it demands a certificate."""
    with serving(lambda exchange: exchange.answer(200, b"done")) as server:
        context = settings.server() if isinstance(settings, PodTLS) else settings
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        yield server


def showing(folder: Path) -> ssl.SSLContext:
    """As queue-proxy: a certificate for clients, none asked of them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return context


def asked(server: Server, tls: PodTLS) -> bytes:
    with closing(Sender(connect_timeout_seconds=5, tls=tls)) as sender:
        return bytes(sender.send(server.url.replace("http:", "https:"), {}, [b"body"], 5).body)


@pytest.fixture
def authority() -> CertificateAuthority:
    return CertificateAuthority()


def test_a_pod_is_reached_by_its_address_and_known_by_the_shared_name(authority: CertificateAuthority, tmp_path: Path) -> None:
    """queue-proxy's certificate names the namespace, and a name for older ingresses (knative/serving certificate.go)."""
    folder = write(authority.secret(NAME, "data-plane.knative.dev"), tmp_path / "pod")
    with pod(showing(folder)) as server:
        assert asked(server, tls_of(folder)) == b"done"


@pytest.mark.parametrize(
    ("names", "until", "same_ca", "words"),
    [
        ((NAME,), timedelta(hours=1), False, "not of the CA in LAMINA_TLS_CA"),
        ((NAME,), timedelta(hours=-1), True, "has expired: renew it"),
        (("kn-user-other",), timedelta(hours=1), True, "does not have the name of the pipeline's pods"),
    ],
)
def test_a_certificate_that_is_not_accepted_is_said_with_its_remedy(
    authority: CertificateAuthority, tmp_path: Path, names: tuple[str, ...], until: timedelta, same_ca: bool, words: str
) -> None:
    folder = write(authority.secret(*names, until=until), tmp_path / "pod")
    trusted = write({"ca.crt": (authority if same_ca else CertificateAuthority()).pem}, tmp_path / "trusted")
    with pod(showing(folder)) as server, pytest.raises(Unreachable, match=words):
        asked(server, tls_of(trusted))
    assert server.requests == []


def test_renewed_files_are_used_without_a_restart(
    authority: CertificateAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("eventing.http.pod_tls._CHECK_SECONDS", 0)
    folder = write(authority.secret(NAME), tmp_path / "own")
    tls = tls_of(folder, own=True)
    renewed = CertificateAuthority()
    other = write(renewed.secret(NAME), tmp_path / "renewed")
    with pod(tls_of(other, own=True)) as server:
        with pytest.raises(Unreachable, match="not of the CA"):
            asked(server, tls)
        write({"ca.crt": "nonsense"}, folder)
        with pytest.raises(Unreachable, match="not of the CA"):
            asked(server, tls)
        assert f"{folder}/ca.crt: no CA certificates in PEM" in caplog.text
        write(renewed.secret(NAME), folder)
        assert asked(server, tls) == b"done"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"ca.crt": None}, "ca.crt: No such file or directory; is the Secret with it mounted?"),
        ({"ca.crt": "x"}, "ca.crt: no CA certificates in PEM"),
        ({"tls.crt": "x"}, "no certificate with its key in PEM"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    authority: CertificateAuthority, tmp_path: Path, broken: dict[str, str | None], words: str
) -> None:
    folder = write(authority.secret(NAME), tmp_path / "own")
    for key, value in broken.items():
        (folder / key).unlink() if value is None else (folder / key).write_text(value)
    with pytest.raises(UnusableTLSFiles, match=words):
        tls_of(folder, own=True)


def test_a_key_of_another_certificate_is_refused(authority: CertificateAuthority, tmp_path: Path) -> None:
    folder = write(authority.secret(NAME) | {"tls.key": authority.secret(NAME)["tls.key"]}, tmp_path / "own")
    with pytest.raises(UnusableTLSFiles, match="no certificate with its key"):
        tls_of(folder, own=True)
