"""Objects in an S3-compatible store, through boto3, for whoever publishes, lists or deletes. Pods read with `object_reader`.

This is the only importer of boto3. Path-style addresses and signature version 4, which every S3-compatible store takes.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn, TypeVar, cast

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from storage.errors import BucketNotFound, ObjectNotFound, StoreUnreachable
from storage.store.object_info import ObjectInfo
from storage.store.paced import CONNECT_SECONDS
from storage.store.paced_boto import PacedSender
from storage.store.refusals import refusal
from storage.store.settings import StoreSettings

if TYPE_CHECKING:
    from types_boto3_s3.literals import BucketLocationConstraintType

_PART_BYTES: Final = 16 * 2**20
_READ_BYTES: Final = 2**20
_CONNECTIONS: Final = 3
_STALL_SECONDS: Final = 60.0
_ATTEMPTS: Final = 4

_Returned = TypeVar("_Returned")


class ObjectStore:
    """One bucket. Thread-safe. Every method raises a StorageError subclass that names endpoint, bucket and key."""

    def __init__(self, settings: StoreSettings, *, stall_seconds: float = _STALL_SECONDS) -> None:
        """`stall_seconds` without a byte, either way, or a rate that is hardly better (`paced`), end an attempt of four."""
        self.settings = settings
        session = boto3.session.Session(
            aws_access_key_id=settings.access_key_id,
            aws_secret_access_key=settings.secret_access_key,
            aws_session_token=settings.session_token,
            region_name=settings.region,
        )
        self._client = session.client("s3", endpoint_url=settings.endpoint_url, config=_client_config(stall_seconds))
        self._client.meta.events.register("before-send.s3", cast("Any", PacedSender(settings.endpoint_url, stall_seconds)))
        self._transfer = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            io_chunksize=_READ_BYTES,
            max_concurrency=_CONNECTIONS,
        )
        self._transfer.max_in_memory_upload_chunks = _CONNECTIONS  # else ten

    def get(self, key: str) -> bytes:
        """The whole object; for small ones."""
        return self._call(key, lambda: self._read(key))

    def put(self, key: str, data: bytes) -> None:
        """Writes or replaces an object, at once or not at all."""
        bucket = self.settings.bucket
        self._call(key, lambda: self._client.put_object(Bucket=bucket, Key=key, Body=data))

    def put_stream(self, key: str, stream: BinaryIO) -> None:
        """Writes an object of any length from something readable, in parts, holding a few parts of 16 MiB in memory.

        The object becomes visible when the last part is in. An exception of the stream's own goes through unchanged.
        """
        bucket = self.settings.bucket
        self._call(key, lambda: self._client.upload_fileobj(stream, bucket, key, Config=self._transfer))

    def head(self, key: str) -> ObjectInfo:
        """Length of an object. Raises ObjectNotFound."""
        bucket = self.settings.bucket
        try:
            answer = self._call(key, lambda: self._client.head_object(Bucket=bucket, Key=key))
        except ObjectNotFound:
            self._head_bucket()  # the answer to a HEAD has no body that could tell a missing bucket from a missing object
            raise
        return ObjectInfo(key, answer["ContentLength"])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the store's order."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.settings.bucket, Prefix=prefix)
        iterator = iter(pages)
        while page := self._call(prefix, lambda: next(iterator, None)):
            for item in page.get("Contents", []):
                yield ObjectInfo(item["Key"], item["Size"])

    def delete(self, key: str) -> None:
        """Deletes an object; one that is not there is no error."""
        bucket = self.settings.bucket
        try:
            self._call(key, lambda: self._client.delete_object(Bucket=bucket, Key=key))
        except ObjectNotFound:
            return

    def ensure_bucket(self) -> None:
        """Creates the bucket unless it is there."""
        try:
            self._head_bucket()
        except BucketNotFound:
            self._call("", self._create_bucket)

    def _read(self, key: str) -> bytes:
        return self._client.get_object(Bucket=self.settings.bucket, Key=key)["Body"].read()

    def _head_bucket(self) -> None:
        self._call("", lambda: self._client.head_bucket(Bucket=self.settings.bucket))

    def _create_bucket(self) -> None:
        # Amazon refuses its oldest region as a constraint, and a request without one everywhere else.
        if self.settings.region == "us-east-1":
            self._client.create_bucket(Bucket=self.settings.bucket)
        else:
            region = cast("BucketLocationConstraintType", self.settings.region)
            self._client.create_bucket(Bucket=self.settings.bucket, CreateBucketConfiguration={"LocationConstraint": region})

    def _call(self, key: str, action: Callable[[], _Returned]) -> _Returned:
        try:
            return action()
        except ClientError as error:
            self._raise(key, error)
        except S3UploadFailedError as error:
            if isinstance(error.__context__, ClientError):
                self._raise(key, error.__context__)
            raise StoreUnreachable(f"cannot upload {key!r} to {self.settings.place}: {error}") from error
        except BotoCoreError as error:
            raise StoreUnreachable(
                f"no answer from the store, {self.settings.place} ({error}); is it running and is the endpoint right?"
            ) from error

    def _raise(self, key: str, error: ClientError) -> NoReturn:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        raise refusal(self.settings, key, status, code) from error


def _client_config(stall_seconds: float) -> Config:
    # When the checksums were on by default, stores without trailing checksums refused uploads and answered reads that
    # boto3 then rejected.
    return Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=CONNECT_SECONDS,
        read_timeout=stall_seconds,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
    )
