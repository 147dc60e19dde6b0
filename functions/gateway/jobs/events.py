"""Batches as CloudEvents: an event with JSON Lines begins a batch, and another event with all results reports its end."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Final

import msgspec
from cloudevents.core.v1.event import CloudEvent

from eventing.claim_check import ClaimCheck
from eventing.http.binding import to_binary_http
from eventing.http.delivery import Sender
from eventing.problems import InvalidRequest, UnknownEventType
from eventing.wire.cloud_event import AttributeValue, make_event, reply_id
from eventing.wire.events import Attribute, EventType
from eventing.wire.framing import JSONL_CONTENT_TYPE, expiry_time
from functions.gateway.jobs.batches import Batches, BatchJob, Cause
from functions.gateway.jobs.batches_api import MAX_WINDOW_SECONDS
from functions.gateway.jobs.files import MAX_LINE_BYTES, named_id, part_lines
from functions.gateway.jobs.lines import BATCH_ENDPOINTS

_DAY_SECONDS: Final = 86_400
_DELIVERY_SECONDS: Final = 60.0
_CLOCK_SECONDS: Final = 3600.0  # an event whose time differs more from the gateway's is taken to come now


@dataclass(frozen=True, slots=True)
class BatchEvents:
    """Begins batches that come as events, and sends events with their results. Thread-safe."""

    _batches: Batches
    _claims: ClaimCheck
    _sender: Sender
    _source: str  # attribute of events that tell of ends
    _sink: str | None  # the URL that gets them; None: no events are taken

    def begin(self, event: CloudEvent, owner: str, client_id: str) -> BatchJob:
        """Begins the batch of an event whose data are the batch's lines.

        For a repeated delivery, returns the batch that has begun. The endpoint is the `url` of all lines. The window ends at
        the event's `expirytime`, or after a day if there is none. Raises a Problem for an event that cannot be served, and a
        StorageError.
        """
        if self._sink is None:
            raise UnknownEventType(f"{event.get_type()} has an answer later, and this gateway has no sink for it; set K_SINK")
        identity = reply_id(event)
        id_ = named_id("batch_", owner, identity)
        found = self._batches.find(owner, id_)
        if found is not None:
            return found
        pieces = self._claims.pieces(event)
        begin = next(pieces, b"")
        first = next(iter(part_lines(begin[:MAX_LINE_BYTES])), b"")
        endpoint = _endpoint(first)
        file = self._batches.files.write(
            owner, f"{identity}.jsonl", chain((begin,), pieces), named_id("file-", owner, identity)
        )
        if not file.lines:
            raise InvalidRequest("the event has no lines")
        self._batches.files.add(owner, file)
        said, now = event.get_time(), time.time()
        at = said.timestamp() if said is not None and abs(said.timestamp() - now) < _CLOCK_SECONDS else now
        expires = expiry_time(event.get_attributes())
        seconds = _DAY_SECONDS if expires is None else min(MAX_WINDOW_SECONDS, max(1, int(expires.timestamp() - at)))
        traceparent = event.get_extension(Attribute.TRACEPARENT)
        cause = Cause(event.get_id(), event.get_source(), None if traceparent is None else str(traceparent))
        return self._batches.create(
            owner, client_id, file, endpoint, (f"{seconds}s", seconds), id_=id_, created_at=int(at), cause=cause
        )

    def tell(self, job: BatchJob) -> bool:
        """If an event began the batch, sends an event with the batch's results. Call it when the batch has ended.

        The data are the lines of the output file, then those of the error file. The event's id is the same at every call.
        Returns False if an event is due and this gateway has no sink for it. Raises a DeliveryError, a BadReply, a Problem or a
        StorageError.
        """
        if job.cause is None:
            return True
        if self._sink is None:
            return False

        def results() -> Iterator[bytes]:
            for file in self._batches.results_files(job):
                yield from self._batches.files.read(job.owner, file)

        attributes: dict[str, AttributeValue] = {
            "subject": job.id,
            Attribute.TRACEPARENT: job.cause.traceparent,
            Attribute.CAUSATION_ID: job.cause.id,
            Attribute.CAUSATION_SOURCE: job.cause.source,
        }
        event = make_event(EventType.BATCH_RESPONSE, self._source, None, JSONL_CONTENT_TYPE, id=job.id, **attributes)
        event = self._claims.check_in_pieces(event, JSONL_CONTENT_TYPE, results, datetime.now(UTC))
        headers, body = to_binary_http(event)
        self._sender.send(self._sink, headers, body, _DELIVERY_SECONDS)
        return True


def _endpoint(line: bytes) -> str:
    try:
        url = msgspec.json.decode(line)["url"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise InvalidRequest("the event's first line is no request with a `url`") from error
    if url not in BATCH_ENDPOINTS:
        raise InvalidRequest(f"the first line asks {str(url)[:80]!r}; batches may ask {', '.join(BATCH_ENDPOINTS)}")
    return str(url)
