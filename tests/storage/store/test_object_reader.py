"""Reading in pods: the signature compared with botocore's, ranges into memory, and every fault of a store."""

import hashlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from storage.errors import AccessDenied, BucketNotFound, ObjectAltered, StorageError, StoreUnreachable, UnexpectedAnswer
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings
from storage.store.signing import object_path, signed_headers
from tests.support.storage.storage import Fault, FaultProxy, answering_every_get_with

CONTENT = bytes(range(251)) * 20_000


@pytest.fixture(scope="module", autouse=True)
def content(store: ObjectStore) -> None:
    store.put("content", CONTENT)


def read(settings: StoreSettings, start: int, length: int, **options: Any) -> bytes:
    buffer = bytearray(length)
    with ObjectReader(settings, **({"retry_seconds": 10.0} | options)) as reader:
        reader.read_range_into("content", start, memoryview(buffer), total_bytes=len(CONTENT))
    return bytes(buffer)


@pytest.mark.parametrize("token", [None, "a/session+token=="])
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9000", "https://s3.example.com:443/base", "http://s3.example.com:80"])
@pytest.mark.parametrize("key", ["models/a/b.safetensors", "with space/ü+%25&=~.bin"])
@pytest.mark.parametrize(("method", "body"), [("GET", b""), ("PUT", b"payload")])
def test_the_signature_is_botocores(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, key: str, token: str | None, method: str, body: bytes
) -> None:
    settings = StoreSettings(
        endpoint_url=endpoint,
        bucket="bucket",
        region="eu-central-1",
        access_key_id="AKID",
        secret_access_key="se/cret",
        session_token=token,
    )
    now = datetime(2026, 11, 24, 9, 30, 1, tzinfo=UTC)
    path = object_path(settings, key)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: now.replace(tzinfo=None))
    request = AWSRequest(method, endpoint.removesuffix("/base") + path, data=body)
    S3SigV4Auth(Credentials("AKID", "se/cret", token), "s3", "eu-central-1").add_auth(request)
    ours = signed_headers(settings, method, path, hashlib.sha256(body).hexdigest(), now)
    assert ours["authorization"] == request.headers["Authorization"]
    assert ours.get("x-amz-security-token") == request.headers.get("X-Amz-Security-Token")


def test_ranges_land_in_the_given_memory(settings: StoreSettings) -> None:
    assert read(settings, 0, len(CONTENT)) == CONTENT
    assert read(settings, 1_234_567, 100_000) == CONTENT[1_234_567:1_334_567]
    assert read(settings, len(CONTENT) - 3, 3) == CONTENT[-3:]


def test_connections_are_reused_by_many_threads(proxy: FaultProxy) -> None:
    reader = ObjectReader(proxy.settings)
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda _: reader.get("content"), range(15)))
    reader.close()
    assert results == [CONTENT] * 15
    assert proxy.connections <= 3


@pytest.mark.parametrize(
    "fault",
    [
        Fault(times=2, reset_after=0),
        Fault(times=2, reset_after=1_000_000),
        Fault(times=2, end_after=1_000_000),
        Fault(times=1, stall_after=500_000),
        Fault(times=3, status=500),
        Fault(times=1, status=503),
        Fault(times=1, status=429),
    ],
    ids=str,
)
def test_transient_faults_are_survived(proxy: FaultProxy, fault: Fault) -> None:
    proxy.faults.append(fault)
    assert read(proxy.settings, 7, len(CONTENT) - 7, stall_seconds=0.3) == CONTENT[7:]
    assert fault.times == 0


def test_a_broken_read_resumes(proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(end_after=3_000_000))
    assert read(proxy.settings, 0, len(CONTENT)) == CONTENT
    assert proxy.sent_bytes < len(CONTENT) + 2**20, "the first two MiB were not sent again"


def test_on_bytes_gets_every_piece_once_and_in_order(proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(times=2, end_after=1_500_000))
    view, told = memoryview(bytearray(len(CONTENT))), bytearray()
    with ObjectReader(proxy.settings) as reader:
        reader.read_range_into("content", 0, view, on_bytes=told.extend)
    assert told == CONTENT


@pytest.mark.slow
def test_a_store_that_is_away_for_a_while_is_survived(proxy: FaultProxy) -> None:
    settings = proxy.settings
    proxy.down()
    timer = threading.Timer(1.0, proxy.up)
    timer.start()
    assert read(settings, 0, 1000) == CONTENT[:1000]
    timer.join()


@pytest.fixture
def slow(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """A proxy before which every request takes half a minute, by the clock that the reader sees."""
    clock = SimpleNamespace(monotonic=lambda: 30.0 * proxy.count("GET"))
    monkeypatch.setattr("storage.store.object_reader.time", clock)
    return proxy


@pytest.mark.slow
def test_retries_count_from_the_last_progress(slow: FaultProxy) -> None:
    slow.faults.append(Fault(times=4, end_after=1_000_000))
    assert read(slow.settings, 0, len(CONTENT), retry_seconds=40.0) == CONTENT
    assert slow.count("GET") == 5


@pytest.mark.parametrize("delivered", [0, 1000])
def test_a_few_bytes_do_not_count_as_progress(slow: FaultProxy, delivered: int) -> None:
    slow.faults.append(Fault(times=99, end_after=delivered))
    with pytest.raises(StoreUnreachable, match="in 2 attempts"):
        read(slow.settings, 0, len(CONTENT), retry_seconds=40.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault(times=99, status=503), "HTTP 503"),
        (Fault(times=99, stall_after=10), "timed out"),
        (Fault(times=99, reset_after=0), "10|Reset|Disconnected|Incomplete"),
    ],
    ids=["failing", "stalling", "dropping"],
)
def test_permanent_faults_are_named(proxy: FaultProxy, fault: Fault, cause: str) -> None:
    proxy.faults.append(fault)
    with pytest.raises(StoreUnreachable, match=f"'content' in .* attempts .*{cause}"):
        read(proxy.settings, 0, 1000, stall_seconds=0.2, retry_seconds=0.5)


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer_is_named(settings: StoreSettings) -> None:
    with pytest.raises(StoreUnreachable, match=r"127\.0\.0\.1:9 did not deliver 'content' .*ConnectionRefused"):
        read(replace(settings, endpoint_url="http://127.0.0.1:9"), 0, 10, retry_seconds=0.3)


@pytest.mark.parametrize(
    ("changes", "error"), [({"secret_access_key": "wrong"}, AccessDenied), ({"bucket": "missing"}, BucketNotFound)]
)
def test_refusals_are_named_at_once(settings: StoreSettings, changes: dict[str, str], error: type[StorageError]) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=settings.endpoint_url):
        read(replace(settings, **changes), 0, 10)
    assert time.monotonic() - started < 30


def test_another_length_than_published_is_named(settings: StoreSettings) -> None:
    view = memoryview(bytearray(10))
    with (
        ObjectReader(settings) as reader,
        pytest.raises(ObjectAltered, match=f"has {len(CONTENT)} bytes, {len(CONTENT) + 5} were published"),
    ):
        reader.read_range_into("content", 0, view, total_bytes=len(CONTENT) + 5)
    with ObjectReader(settings) as reader, pytest.raises(ObjectAltered, match="shorter"):
        reader.read_range_into("content", len(CONTENT), view)


def test_a_server_that_ignores_ranges_is_named() -> None:
    with answering_every_get_with(b"0123456789") as url:
        settings = StoreSettings(endpoint_url=url, bucket="bucket", access_key_id="id", secret_access_key="key")
        whole_object = bytearray(10)
        with ObjectReader(settings) as reader:
            reader.read_range_into("key", 0, memoryview(whole_object), total_bytes=10)
        assert whole_object == b"0123456789"
        with ObjectReader(settings) as reader, pytest.raises(UnexpectedAnswer, match="asked for 2 to 4"):
            reader.read_range_into("key", 2, memoryview(bytearray(3)), total_bytes=10)


def test_reading_imports_neither_boto3_nor_torch() -> None:
    code = (
        "import sys, storage.loading.weight_loader, storage.loading.weight_cache\n"
        "import storage.store.object_reader, storage.models.model_repository\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for library in ("boto3", "botocore", "torch", "numpy", "transformers", "gguf", "urllib3"):
        assert f"'{library}'" not in loaded
