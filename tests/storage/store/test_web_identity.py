"""Keys for a token: a real S3 server that knows one pair of keys, and a token service that hands them out."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from storage.errors import AccessDenied, StoreUnreachable
from storage.store.object_reader import ObjectReader
from storage.store.payload_store import PayloadStore
from storage.store.settings import StoreSettings
from storage.store.web_identity import keys_of
from tests.support.http_server import Exchange, serving

ROLE = "arn:aws:iam::1:role/chat"


class TokenService:
    """Hands out `keys` for `seconds`, or answers `failure`."""

    def __init__(self, keys: StoreSettings) -> None:
        self.keys = keys
        self.url = ""
        self.asked: list[dict[str, str]] = []
        self.seconds = 3600.0
        self.failure: tuple[int, str] | None = None

    def respond(self, exchange: Exchange) -> None:
        self.asked.append(dict(parse_qsl(exchange.body.decode())))
        status, text = self.answer()
        exchange.answer(status, text.encode())

    def answer(self) -> tuple[int, str]:
        if self.failure is not None:
            return self.failure[0], f"<ErrorResponse><Error><Code>{self.failure[1]}</Code></Error></ErrorResponse>"
        until = (datetime.now(UTC) + timedelta(seconds=self.seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
        return 200, (
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
            f"<SessionToken>session</SessionToken><SecretAccessKey>{self.keys.secret_access_key}</SecretAccessKey>"
            f"<Expiration>{until}</Expiration><AccessKeyId>{self.keys.access_key_id}</AccessKeyId>"
            "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )


@pytest.fixture
def service(settings: StoreSettings) -> Iterator[TokenService]:
    service = TokenService(settings)
    with serving(service.respond) as server:
        service.url = server.origin
        yield service


@pytest.fixture
def keyless(settings: StoreSettings, service: TokenService, tmp_path: Path) -> StoreSettings:
    (tmp_path / "token").write_text("first\n")
    nobody = replace(settings, access_key_id=None, secret_access_key=None)
    return replace(nobody, web_identity_token_file=str(tmp_path / "token"), role_arn=ROLE, sts_endpoint=service.url)


@pytest.mark.slow
def test_a_pod_without_keys_reads_and_writes_the_store(keyless: StoreSettings, service: TokenService) -> None:
    with PayloadStore(keyless) as store:
        store.put("models/one", b"weights")
        assert store.get("models/one") == b"weights"
    with ObjectReader(keyless) as reader:
        memory = bytearray(4)
        reader.read_range_into("models/one", 3, memoryview(memory))
        assert memory == b"ghts"
    asked = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "RoleSessionName": "lamina",
        "WebIdentityToken": "first",
        "RoleArn": ROLE,
    }
    assert service.asked == [asked, asked], "once for each reader, not for each request"


@pytest.mark.slow
def test_keys_are_renewed_before_they_end_with_the_token_of_that_time(keyless: StoreSettings, service: TokenService) -> None:
    service.seconds = 2.0
    keys = keys_of(keyless)
    keys()
    Path(keyless.web_identity_token_file or "").write_text("second")
    deadline = time.monotonic() + 10
    while len(service.asked) < 2 and time.monotonic() < deadline:
        keys()
        time.sleep(0.02)
    assert [asked["WebIdentityToken"] for asked in service.asked[:2]] == ["first", "second"]


@pytest.mark.slow
def test_keys_that_are_good_still_are_used_while_the_service_is_away(keyless: StoreSettings, service: TokenService) -> None:
    service.seconds = 4.0
    keys = keys_of(keyless)
    known = keys()
    service.failure = (503, "SlowDown")
    deadline = time.monotonic() + 10
    while len(service.asked) < 2 and time.monotonic() < deadline:
        assert keys() == known
        time.sleep(0.02)
    assert len(service.asked) >= 2

    def use_until_expiry() -> None:
        while time.monotonic() < deadline:
            keys()
            time.sleep(0.05)

    with pytest.raises(OSError, match="HTTP 503 SlowDown"):
        use_until_expiry()


@pytest.mark.slow
def test_a_service_that_comes_back_is_waited_for(keyless: StoreSettings, service: TokenService) -> None:
    service.failure = (500, "InternalError")
    threading.Timer(0.5, lambda: setattr(service, "failure", None)).start()
    with PayloadStore(keyless) as store:
        store.put("models/two", b"x")
    assert len(service.asked) > 1


def test_refused_keys_are_reported_at_once(keyless: StoreSettings, service: TokenService) -> None:
    service.failure = (403, "AccessDenied")
    with ObjectReader(keyless) as reader, pytest.raises(AccessDenied, match=f"let this pod be {ROLE} .HTTP 403 AccessDenied"):
        reader.get("models/one")
    assert len(service.asked) == 1
    gone = replace(keyless, web_identity_token_file="/nowhere/token")
    with ObjectReader(gone) as reader, pytest.raises(AccessDenied, match=r"/nowhere/token cannot be read .* mounted"):
        reader.get("models/one")
    nobody = replace(keyless, sts_endpoint="http://127.0.0.1:1")
    with ObjectReader(nobody, retry_seconds=0.2) as reader, pytest.raises(StoreUnreachable, match="Connection refused"):
        reader.get("models/one")


def test_settings_with_keys_are_used_unchanged(settings: StoreSettings) -> None:
    assert keys_of(settings)() is settings
