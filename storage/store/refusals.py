"""Maps a store's error answer (HTTP status and S3 error code) to the exception to raise."""

import re
from typing import Final

from storage.errors import (
    AccessDenied,
    BucketNotFound,
    ObjectAltered,
    ObjectNotFound,
    StorageError,
    StoreUnreachable,
    UnexpectedAnswer,
)
from storage.store.settings import StoreSettings

_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9]+)</Code>")


def error_code(body: bytes) -> str:
    """The S3 error code in the XML body of an answer; "" if the body has none."""
    found = _CODE.search(body)
    return found.group(1).decode() if found else ""


def is_transient(status: int) -> bool:
    """Whether a retry may help: server failures, time-outs and throttling."""
    return status >= 500 or status in (408, 429)


def refusal(settings: StoreSettings, key: str, status: int, code: str) -> StorageError:
    """Makes the exception for an error answer; the caller raises it. key: "" for a request about the bucket itself."""
    seen = f"HTTP {status}" + (f" {code}" if code and code != str(status) else "")
    if code == "NoSuchBucket" or (status == 404 and not key):
        return BucketNotFound(f"there is no {settings.place}; create it, or correct its name")
    if code in ("NoSuchUpload", "InvalidPart"):
        return StoreUnreachable(
            f"{settings.place} has given up the upload of {key!r} ({seen}), as it does if its disk is full or too slow; "
            "look at the store"
        )
    if status == 404:
        return ObjectNotFound(f"there is no object {key!r} in {settings.place}")
    if status in (401, 403):
        return AccessDenied(
            f"{settings.place} refuses access key {settings.access_key_id!r} for {key!r} ({seen}); check the keys, "
            "the session token, the bucket's policy and this machine's clock"
        )
    if status == 416:
        return ObjectAltered(f"{key!r} in {settings.place} is shorter than what was published; publish the model again")
    if is_transient(status):
        return StoreUnreachable(
            f"{settings.place} fails at {key!r} ({seen}), also when asked again; look at the store and its disk"
        )
    subject = f"a request for {key!r}" if key else "a request about the bucket"
    return UnexpectedAnswer(
        f"{settings.place} answers {subject} with {seen}; is it an S3 store, and is the bucket's name right?"
    )
