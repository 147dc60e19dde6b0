"""Claim check: large event data is put into the object store, and the event carries a reference to it (`dataref`).

It is for events that pass Brokers and channels, which pass on 64 KiB and may drop larger events. Gateway and stages talk to
each other directly and do not use it.

A payload's key is the payload's expiry, rounded up to the hour, and its SHA-256. So a repeated delivery writes the same object,
and `sweep` finds expired payloads by their names. Reading a payload does not delete it, because the same event may be delivered
again.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from cloudevents.core.v1.event import CloudEvent

from eventing.problems import EventExpired, EventTooLarge, MalformedEvent, NotReady
from eventing.wire.cloud_event import attribute_text, checked_event, data_buffers
from eventing.wire.events import SAFE_EVENT_BYTES, Attribute
from eventing.wire.framing import expiry_time, integer_attribute, required_attribute
from storage.errors import ObjectNotFound, StorageError
from storage.store.payload_store import MAX_PAYLOAD_BYTES, PayloadStore

if TYPE_CHECKING:
    from storage.store.object_store import ObjectStore  # imports boto3

CLAIMS_PREFIX: Final = "claims/"  # in the models' bucket; a lifecycle rule may delete objects older than a few days there
DEFAULT_LIFETIME: Final = timedelta(hours=24)  # of the payload of an event without `expirytime`

_PIECE_BYTES: Final = 2**20
_HOUR: Final = "%Y%m%dT%HZ"
_DIGEST: Final = re.compile("[0-9a-f]{64}")
_REFERENCE: Final = (Attribute.DATAREF, Attribute.DATAREF_BYTES, Attribute.DATAREF_SHA256)


class ClaimCheck:
    """Stores payloads of events under one prefix of one bucket and fetches them. Refuses references to any other place."""

    def __init__(self, store: PayloadStore, bucket: str, prefix: str = CLAIMS_PREFIX) -> None:
        """Uses the objects of `bucket` whose keys begin with `prefix`, which must end in `/`."""
        if not prefix.endswith("/"):
            raise ValueError(f"the prefix {prefix!r} must end in '/'")
        self._store = store
        self._prefix = prefix
        self._root = f"s3://{bucket}/{prefix}"

    def check_in(self, event: CloudEvent, now: datetime) -> CloudEvent:
        """Returns the event itself if it has at most SAFE_EVENT_BYTES.

        Otherwise stores its data and returns an event that refers to it. `now` has a time zone. Raises NotReady if the store
        fails.
        """
        if event_bytes(event) <= SAFE_EVENT_BYTES:
            return event
        data = b"".join(data_buffers(event))
        digest = hashlib.sha256(data).hexdigest()
        return self._stored(event.get_attributes(), len(data), digest, now, lambda key: self._store.put(key, data))

    def redeem(self, event: CloudEvent) -> CloudEvent:
        """Fetches and verifies the data of an event with a reference, and returns the event with it.

        Returns any other event unchanged. Raises MalformedEvent, EventTooLarge, EventExpired (the payload was deleted),
        NotReady (the store failed).
        """
        reference = event.get_extension(Attribute.DATAREF)
        if reference is None:
            return event
        name, expected_bytes, expected_digest = self._expected(event, str(reference))
        with _store_errors(str(reference)):
            data = self._store.get(self._prefix + name)
        if len(data) != expected_bytes:
            raise MalformedEvent(f"the payload {reference} has {len(data)} bytes, the event says {expected_bytes}")
        if hashlib.sha256(data).hexdigest() != expected_digest:
            raise MalformedEvent(f"the payload {reference} is not the one that was checked in: its SHA-256 differs")
        attributes = {name: value for name, value in event.get_attributes().items() if name not in _REFERENCE}
        return checked_event(attributes, data)

    def pieces(self, event: CloudEvent) -> Iterator[bytes]:
        """Yields the event's data piece by piece. Data behind a reference is fetched in bounded memory.

        Raises the errors of `redeem`. A wrong digest is found, and raised, only after the last piece.
        """
        reference = event.get_extension(Attribute.DATAREF)
        if reference is None:
            yield from map(bytes, data_buffers(event))
            return
        name, expected_bytes, expected_digest = self._expected(event, str(reference))
        digest, view = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        for start in range(0, expected_bytes, _PIECE_BYTES):
            piece = view[: expected_bytes - start]
            with _store_errors(str(reference)):
                self._store.read_range_into(self._prefix + name, start, piece, total_bytes=expected_bytes)
            digest.update(piece)
            yield bytes(piece)
        if digest.hexdigest() != expected_digest:
            raise MalformedEvent(f"the payload {reference} is not the one that was checked in: its SHA-256 differs")

    def check_in_pieces(
        self, event: CloudEvent, content_type: str, pieces: Callable[[], Iterator[bytes]], now: datetime
    ) -> CloudEvent:
        """Adds the data of `pieces` to an event without data, and returns the event.

        The returned event carries up to SAFE_EVENT_BYTES itself; otherwise the data is stored and the event refers to it.
        `pieces` must return the same bytes at each call; they are never in memory together when they are stored. `now` has a
        time zone. Raises NotReady if the store fails.
        """
        attributes = dict(event.get_attributes()) | {"datacontenttype": content_type}
        size, digest = event_bytes(event), hashlib.sha256()
        for piece in pieces():
            size += len(piece)
            digest.update(piece)
        if size <= SAFE_EVENT_BYTES:
            return checked_event(attributes, b"".join(pieces()))
        size -= event_bytes(event)
        return self._stored(attributes, size, digest.hexdigest(), now, lambda key: self._store.put_pieces(key, pieces()))

    def _stored(
        self, attributes: Mapping[str, Any], size: int, digest: str, now: datetime, put: Callable[[str], object]
    ) -> CloudEvent:
        """Stores a payload and returns the event that refers to it. `put` is called with the payload's key. Raises NotReady."""
        name = f"{_hour_after(expiry_time(attributes) or now + DEFAULT_LIFETIME)}/{digest}"
        with _store_errors():
            put(self._prefix + name)
        reference = (self._root + name, str(size), digest)
        return checked_event({**attributes, **dict(zip(_REFERENCE, reference, strict=True))}, None)

    def _expected(self, event: CloudEvent, reference: str) -> tuple[str, int, str]:
        """Returns the payload's name, and the length and digest that the event says it has.

        Raises MalformedEvent or EventTooLarge.
        """
        name = reference.removeprefix(self._root)
        hour, _, digest = name.partition("/")
        if name == reference or _end_of_hour(hour) is None or not _DIGEST.fullmatch(digest):
            raise MalformedEvent(f"the attribute dataref is {reference[:200]!r}, followed is only {self._root}<hour>/<sha256>")
        expected_bytes = integer_attribute(event.get_attributes(), Attribute.DATAREF_BYTES)
        expected_digest = required_attribute(event.get_attributes(), Attribute.DATAREF_SHA256)
        if expected_bytes > MAX_PAYLOAD_BYTES:
            raise EventTooLarge(f"the payload {reference} has {expected_bytes} bytes, the most is {MAX_PAYLOAD_BYTES}")
        return name, expected_bytes, expected_digest


def sweep(store: "ObjectStore", now: datetime, prefix: str = CLAIMS_PREFIX) -> int:
    """Deletes expired payloads under `prefix` and returns how many it deleted. `now` has a time zone."""
    over = []
    for info in store.list(prefix):
        end = _end_of_hour(info.key.removeprefix(prefix).partition("/")[0])
        if end is not None and end <= now:
            over.append(info.key)
    for key in over:
        store.delete(key)
    return len(over)


def event_bytes(event: CloudEvent) -> int:
    """Returns the approximate size of an event on the wire, in bytes: data and attributes, in binary or structured mode."""
    attributes = event.get_attributes().items()
    return sum(memoryview(buffer).nbytes for buffer in data_buffers(event)) + sum(
        len(name) + len(attribute_text(value) or "") + len("ce-: \r\n") for name, value in attributes
    )


@contextmanager
def _store_errors(reference: str | None = None) -> Iterator[None]:
    """Context manager that turns errors of the store into NotReady, so that the event is delivered again.

    While a payload is read, `reference` names it, and a missing object raises EventExpired instead. While one is written,
    `reference` is None.
    """
    try:
        yield
    except StorageError as error:
        if reference is not None and isinstance(error, ObjectNotFound):
            raise EventExpired(f"the payload {reference} is not in the store any more") from error
        raise NotReady(f"the store of large payloads failed: {error}") from error


def _hour_after(moment: datetime) -> str:
    """Names the next full hour after `moment`, at which a payload that expires at `moment` may be deleted.

    For a moment in the last hour of the calendar, returns the name of that hour.
    """
    latest = datetime.max.replace(tzinfo=UTC) - timedelta(hours=1)
    return (min(moment.astimezone(UTC), latest) + timedelta(hours=1)).strftime(_HOUR)


def _end_of_hour(hour: str) -> datetime | None:
    try:
        return datetime.strptime(hour, _HOUR).replace(tzinfo=UTC)
    except ValueError:
        return None
