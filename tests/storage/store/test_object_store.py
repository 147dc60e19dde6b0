"""The object store against a real S3 server: objects, listings, and errors."""

import io
from collections.abc import Callable
from dataclasses import replace

import pytest

from storage.errors import AccessDenied, BucketNotFound, ObjectNotFound, StorageError, StoreUnreachable
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings
from tests.support.storage.storage import refusing_every_put


@pytest.mark.slow
def test_objects_are_read_as_they_were_put(store: ObjectStore) -> None:
    store.put("folder/with space/ü+%25&=.bin", b"\0\1\2")
    assert store.get("folder/with space/ü+%25&=.bin") == b"\0\1\2"
    (listed,) = store.list("folder/with space/")
    assert (listed.key, listed.bytes) == ("folder/with space/ü+%25&=.bin", 3)


def test_streams_of_many_parts_are_stored_whole(store: ObjectStore) -> None:
    content = bytes(range(256)) * (40 * 2**20 // 256) + b"end"
    store.put_stream("streams/large", io.BytesIO(content))
    assert store.get("streams/large") == content


@pytest.mark.slow
def test_a_stream_that_breaks_leaves_nothing_and_says_why(store: ObjectStore) -> None:
    class Breaking(io.RawIOBase):
        left = 20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            self.left -= 1
            if not self.left:
                raise ValueError("the source ended")
            return len(buffer)

    with pytest.raises(ValueError, match="the source ended"):
        store.put_stream("streams/broken", io.BufferedReader(Breaking(), buffer_size=2**20))
    assert list(store.list("streams/broken")) == []


def test_list_gives_everything_below_a_prefix(store: ObjectStore) -> None:
    for name in ("a/1", "a/b/2", "ab/3"):
        store.put(f"listed/{name}", name.encode())
    assert [item.key for item in store.list("listed/a/")] == ["listed/a/1", "listed/a/b/2"]
    assert list(store.list("listed/none/")) == []


def test_deleting_twice_is_no_error(store: ObjectStore) -> None:
    store.put("deleted", b"x")
    store.delete("deleted")
    store.delete("deleted")
    with pytest.raises(ObjectNotFound, match="'deleted'"):
        store.get("deleted")


def test_ensure_bucket_creates_it_once(settings: StoreSettings) -> None:
    other = ObjectStore(replace(settings, bucket="another"))
    with pytest.raises(BucketNotFound, match="'another'"):
        other.put("key", b"x")
    other.ensure_bucket()
    other.ensure_bucket()
    other.put("key", b"x")
    assert other.get("key") == b"x"


CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda store: store.get("key"),
    "put": lambda store: store.put("key", b"x"),
    "put_stream": lambda store: store.put_stream("key", io.BytesIO(b"x")),
    "list": lambda store: list(store.list("")),
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"secret_access_key": "wrong"}, AccessDenied, "refuses access key"),
        ({"access_key_id": "nobody"}, AccessDenied, "'nobody'"),
        ({"bucket": "missing"}, BucketNotFound, "'missing'"),
        ({"endpoint_url": "http://127.0.0.1:9"}, StoreUnreachable, "127.0.0.1:9"),
    ],
)
def test_errors_name_their_cause(
    settings: StoreSettings,
    changes: dict[str, str],
    error: type[StorageError],
    words: str,
    call: Callable[[ObjectStore], object],
) -> None:
    with pytest.raises(error, match=words):
        call(ObjectStore(replace(settings, **changes)))


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (403, "AccessDenied", AccessDenied, "check the keys"),
        (404, "NoSuchUpload", StoreUnreachable, "if its disk is full"),
        (400, "InvalidPart", StoreUnreachable, "if its disk is full or too slow"),
    ],
)
def test_an_answer_before_the_end_of_the_body_is_read(
    status: int, code: str, error: type[StorageError], words: str, settings: StoreSettings
) -> None:
    with refusing_every_put(status, code) as url, pytest.raises(error, match=words):
        ObjectStore(replace(settings, endpoint_url=url)).put("key", bytes(2**25))


def read_with_reader(settings: StoreSettings) -> bytes:
    with ObjectReader(settings) as reader:
        return reader.get("nothing")


@pytest.mark.parametrize("read", [lambda s: ObjectStore(s).get("nothing"), read_with_reader])
def test_a_missing_object_is_named(settings: StoreSettings, read: object) -> None:
    with pytest.raises(ObjectNotFound, match=f"'nothing' in bucket 'lamina' at {settings.endpoint_url}"):
        read(settings)  # type: ignore[operator]


def test_settings_hide_their_secrets(settings: StoreSettings) -> None:
    shown = repr(replace(settings, session_token="token-of-mine"))
    assert settings.secret_access_key not in shown
    assert "token-of-mine" not in shown
    assert settings.bucket in shown


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "s3://bucket", "http://", "http://host?x=1", "http://user:pw@host"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="store endpoint"):
        StoreSettings(endpoint_url=endpoint, bucket="bucket", access_key_id="id", secret_access_key="key")
