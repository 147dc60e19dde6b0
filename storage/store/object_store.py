"""Objects in an S3-compatible store through boto3, for publishing, listing and deleting. Pods read with `object_reader`.

Only this file imports boto3. It uses path-style addresses and signature version 4, which all such stores accept.
"""

import io
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from http.client import HTTPException
from typing import Any, BinaryIO, Final, NoReturn, TypeVar, cast
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
    SSLError,
)
from botocore.httpsession import get_cert_path

from storage.errors import BucketNotFound, ObjectNotFound, StoreUnreachable
from storage.store.object_reader import ObjectInfo
from storage.store.paced import CONNECT_SECONDS, TooSlow, connect
from storage.store.refusals import refusal
from storage.store.settings import StoreSettings

_PART_BYTES: Final = 8 * 2**20
_READ_BYTES: Final = 2**20
_BODY_READ_BYTES: Final = 2**16
_CONNECTIONS: Final = 3
_STALL_SECONDS: Final = 60.0
_ATTEMPTS: Final = 4
_MAKING_A_CLIENT: Final = threading.Lock()

_Returned = TypeVar("_Returned")


@cache
def _session() -> boto3.session.Session:
    """The boto3 session that all stores with explicit access keys share."""
    return boto3.session.Session()


class ObjectStore:
    """Reads and writes objects of one bucket. Thread-safe.

    Every method raises a StorageError subclass, whose message names endpoint, bucket and key.
    """

    def __init__(self, settings: StoreSettings, *, stall_seconds: float = _STALL_SECONDS) -> None:
        """Creates a client; it makes up to four attempts for a request.

        stall_seconds: an attempt fails after this time without a byte, or if it is slower than `paced.LEAST_BYTES_PER_SECOND`.
        """
        self.settings = settings
        self._bucket = settings.bucket
        # When the checksums were on by default, stores without trailing checksums refused uploads and answered reads that
        # boto3 then rejected.
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=CONNECT_SECONDS,
            read_timeout=stall_seconds,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        )
        # A session parses the descriptions of all AWS services, which takes 60 ms. Making a client is not thread-safe.
        with _MAKING_A_CLIENT:
            session = _session() if settings.access_key_id else boto3.session.Session()  # which looks for keys now
            self._client = session.client(
                "s3",
                endpoint_url=settings.endpoint_url,
                region_name=settings.region,
                aws_access_key_id=settings.access_key_id,
                aws_secret_access_key=settings.secret_access_key,
                aws_session_token=settings.session_token,
                config=config,
            )
        self._client.meta.events.register("before-send.s3", cast("Any", _PacedSender(settings.endpoint_url, stall_seconds)))
        self._transfer = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            io_chunksize=_READ_BYTES,
            max_concurrency=_CONNECTIONS,
        )
        self._transfer.max_in_memory_upload_chunks = _CONNECTIONS  # else ten

    def get(self, key: str) -> bytes:
        """Reads a whole object into memory. Use it for small objects."""
        return self._call(key, lambda: bytes(self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()))

    def put(self, key: str, data: bytes) -> None:
        """Writes or replaces an object atomically."""
        self._call(key, lambda: self._client.put_object(Bucket=self._bucket, Key=key, Body=data))

    def put_stream(self, key: str, stream: BinaryIO) -> None:
        """Writes an object of any length from a stream, in parts, with a few parts of 8 MiB in memory.

        The object becomes visible when the last part is written. Exceptions of the stream pass through unchanged.
        """
        self._call(key, lambda: self._client.upload_fileobj(stream, self._bucket, key, Config=self._transfer))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yields every object whose key begins with `prefix`, in the store's order."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        iterator = iter(pages)
        while page := self._call(prefix, lambda: next(iterator, None)):
            for item in page.get("Contents", []):
                yield ObjectInfo(item["Key"], item["Size"], item["LastModified"])

    def delete(self, key: str) -> None:
        """Deletes an object. Does nothing if there is no such object."""
        try:
            self._call(key, lambda: self._client.delete_object(Bucket=self._bucket, Key=key))
        except ObjectNotFound:
            return

    def ensure_bucket(self) -> None:
        """Creates the bucket if it does not exist."""
        try:
            self._call("", lambda: self._client.head_bucket(Bucket=self._bucket))
        except BucketNotFound:
            options: dict[str, Any] = {}
            # Amazon refuses its oldest region as a constraint, and a request without one everywhere else.
            if self.settings.region != "us-east-1":
                options["CreateBucketConfiguration"] = {"LocationConstraint": self.settings.region}
            self._call("", lambda: self._client.create_bucket(Bucket=self._bucket, **options))

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


class _PacedSender:
    """Sends boto3's requests over the connections of `storage.store.paced`, which fail if a transfer stalls or is too slow.

    boto3's own connections only limit the wait for each byte. This is a handler of botocore's event `before-send`. If it
    returns None, as it does if a proxy is configured, botocore sends the request itself.
    """

    def __init__(self, endpoint_url: str, stall_seconds: float) -> None:
        parts = urlsplit(endpoint_url)
        proxies = urllib.request.getproxies()
        self._proxied = parts.scheme in proxies and not urllib.request.proxy_bypass(parts.hostname or "")
        self._endpoint_url = endpoint_url
        self._stall_seconds = stall_seconds
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https" and not self._proxied:
            self._tls = ssl.create_default_context(cafile=get_cert_path(True))
            self._tls.load_default_certs()  # SSL_CERT_FILE, too

    def __call__(self, request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        if self._proxied:
            return None
        try:
            return self._send(request)
        except ssl.SSLError as error:
            raise SSLError(endpoint_url=request.url, error=error) from error
        except TooSlow as error:
            raise HTTPClientError(error=error) from error
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=request.url, error=error) from error
        except (ConnectionRefusedError, ConnectionAbortedError) as error:
            raise EndpointConnectionError(endpoint_url=request.url, error=error) from error
        except (HTTPException, OSError) as error:
            raise ConnectionClosedError(error=error, request=request, endpoint_url=request.url) from error

    def _send(self, request: AWSPreparedRequest) -> AWSResponse:
        connection = connect(self._endpoint_url, self._stall_seconds, self._tls)
        try:
            url = urlsplit(request.url)
            # Without Expect the body is sent at once. A store that refuses it answers and closes the connection.
            headers = {name: value for name, value in request.headers.items() if name.lower() != "expect"}
            target = f"{url.path}?{url.query}" if url.query else url.path
            # A store that refuses the body, such as one whose disk is full, may answer and close before it has read all.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(request.method, target, cast("Any", request.body), headers)
            with connection.getresponse() as response:
                body = _BufferedBody(response.read())
                return AWSResponse(request.url, response.status, cast("Any", response.headers), body)
        finally:
            connection.close()


class _BufferedBody(io.BytesIO):
    """The body of an answer, with the method `stream` that botocore reads it with."""

    def stream(self, amount: int = _BODY_READ_BYTES, **_: Any) -> Iterator[bytes]:
        while piece := self.read(amount):
            yield piece
