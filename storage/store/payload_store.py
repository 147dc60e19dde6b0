"""Writes, lists and deletes whole objects from a pod (event payloads, keys and values) by signed requests without boto3."""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final

from storage.errors import StorageError, UnexpectedAnswer
from storage.store.object_reader import ObjectInfo, ObjectReader
from storage.store.settings import StoreSettings
from storage.store.signing import canonical_query, object_path, signed_headers

_PART_BYTES: Final = 8 * 2**20  # of an object that is written piece by piece; stores want at least 5 MiB
_UPLOAD_ID: Final = re.compile(b"<UploadId>([^<]+)</UploadId>")
_ETAG: Final = re.compile(b"<ETag>([^<]+)</ETag>")
MAX_PAYLOAD_BYTES: Final = 2**30
_RETRY_SECONDS: Final = 20.0  # if that is not enough, the sender delivers the event again


class PayloadStore(ObjectReader):
    """An ObjectReader that can write, list and delete, too. Thread-safe.

    Every method raises a StorageError subclass that names the key.
    """

    def __init__(self, settings: StoreSettings, *, stall_seconds: float = 10.0, retry_seconds: float = _RETRY_SECONDS) -> None:
        super().__init__(settings, stall_seconds=stall_seconds, retry_seconds=retry_seconds)

    def get(self, key: str, *, max_bytes: int = MAX_PAYLOAD_BYTES) -> bytes:
        return super().get(key, max_bytes=max_bytes)

    def put(self, key: str, data: bytes) -> None:
        """Writes or replaces an object in one request."""
        self._request("PUT", key, body=data)

    def put_pieces(self, key: str, pieces: Iterable[bytes]) -> None:
        """Writes or replaces an object of any length, piece by piece, in bounded memory.

        The object becomes visible when it is complete.
        """
        parts: list[str] = []
        upload, held = "", bytearray()
        try:
            for piece in pieces:
                held += piece
                if len(held) >= _PART_BYTES:
                    upload = upload or self._text_of(_UPLOAD_ID, "POST", key, "uploads=")
                    parts.append(self._put_part(key, upload, len(parts) + 1, bytes(held)))
                    held.clear()
            if not upload:
                self.put(key, bytes(held))
                return
            if held:
                parts.append(self._put_part(key, upload, len(parts) + 1, bytes(held)))
            listed = "".join(
                f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>" for number, etag in enumerate(parts, 1)
            )
            body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
            self._text_of(_ETAG, "POST", key, canonical_query({"uploadId": upload}), body)
        except BaseException:
            if upload:
                with contextlib.suppress(StorageError):
                    self._request("DELETE", key, canonical_query({"uploadId": upload}))
            raise

    def _put_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        """Writes one part of a multipart upload and returns its ETag."""
        query = canonical_query({"partNumber": str(number), "uploadId": upload})
        return self._request("PUT", key, query, data)[0]

    def _text_of(self, element: "re.Pattern[bytes]", method: str, key: str, query: str, body: bytes = b"") -> str:
        """Sends a request, and returns the text of one XML element of the answer.

        Raises UnexpectedAnswer if the answer lacks the element, because errors may come with status 200.
        """
        answer = self._request(method, key, query, body)[1]
        found = element.search(answer)
        if found is None:
            raise UnexpectedAnswer(f"{self.settings.place} answers an upload of {key!r} with {answer[:200]!r}")
        return found[1].decode()

    def _request(self, method: str, key: str, query: str = "", body: bytes = b"", *, named: str = "") -> tuple[str, bytes]:
        """Sends a signed request. Returns the answer's ETag and body.

        named: what errors name if the request has no key.
        """
        path, digest = object_path(self.settings, key), hashlib.sha256(body).hexdigest()
        for attempt in self._attempts(key or named):
            with attempt:
                headers = signed_headers(self._keyed(), method, path, digest, query=query)
                with self._exchange(method, key, headers, body, query) as response:
                    return response.headers.get("ETag", ""), response.read()
        raise AssertionError("tenacity either returns or raises")

    def delete(self, key: str) -> None:
        """Deletes an object. Does nothing if there is no such object."""
        self._request("DELETE", key)

    def list(self, prefix: str, *, after: str = "", at_once: int = 1000) -> Iterator[ObjectInfo]:
        """Yields all objects whose keys begin with `prefix` (ListObjectsV2), in the order of their keys.

        after: if it is set, only objects with greater keys. at_once: how many objects one request asks for, at most 1000.
        """
        from xml.etree import ElementTree  # only listings need it, no start of a function

        parameters = {"list-type": "2", "prefix": prefix, "max-keys": str(at_once)}
        if after:
            parameters["start-after"] = after
        while True:
            _, answer = self._request("GET", "", canonical_query(parameters), named=prefix)
            try:
                page = ElementTree.fromstring(answer)
            except ElementTree.ParseError as error:
                raise UnexpectedAnswer(f"{self.settings.place} answers a listing with what is no XML: {error}") from error
            for item in page.iterfind("{*}Contents"):
                modified = item.findtext("{*}LastModified") or "1970-01-01T00:00:00Z"
                key, size = item.findtext("{*}Key") or "", item.findtext("{*}Size") or "0"
                yield ObjectInfo(key, int(size), datetime.fromisoformat(modified))
            following = page.findtext("{*}NextContinuationToken")
            if page.findtext("{*}IsTruncated") != "true" or not following:
                return
            parameters["continuation-token"] = following
