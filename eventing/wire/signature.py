"""Signs events and verifies them: the attribute `signature` proves that the sender knows the pipeline token.

It is for events that travel without our headers. A Sequence of Knative Eventing passes events from stage to stage and sends no
Authorization header. So the gateway signs the event that begins a score, and each stage signs its reply. A stage accepts a
signed event without a bearer token. The signature is HMAC-SHA256 with the pipeline token over the event's identity, data and
expiry. Intermediaries may add other attributes, which are ignored. A signed event can be replayed until it expires, without
harm: the same tokens have the same answer.
"""

import hashlib
import hmac
from datetime import UTC, datetime
from typing import Final

import msgspec
from cloudevents.core.v1.event import CloudEvent

from eventing.problems import Unauthorized
from eventing.wire.cloud_event import checked_event, data_buffers
from eventing.wire.events import Attribute
from eventing.wire.framing import check_not_expired

_PURPOSE: Final = "lamina signed event 1"  # signed too, so that no other use of the token can be passed off as an event
_SIGNED: Final = (Attribute.PIPELINE, Attribute.LAYER, Attribute.EXPIRY_TIME)


def sign(event: CloudEvent, token: str) -> CloudEvent:
    """Returns the event with the attribute `signature`.

    Raises ValueError if the event has no `expirytime`, because the signature would be valid for ever.
    """
    if event.get_extension(Attribute.EXPIRY_TIME) is None:
        raise ValueError(f"{event.get_type()} {event.get_id()} has no {Attribute.EXPIRY_TIME}, so it cannot be signed")
    return checked_event({**event.get_attributes(), Attribute.SIGNATURE.value: _signature(event, token)}, event.get_data())


def verify(event: CloudEvent, *tokens: str) -> None:
    """Checks the signature of an event, made with any of `tokens`.

    Raises Unauthorized if none of them made it, and EventExpired if the event has expired. If the data is in the store
    (`dataref`), the signature covers the SHA-256 that the event names, and `ClaimCheck.redeem` then checks the data against
    that.
    """
    given = str(event.get_extension(Attribute.SIGNATURE) or "").encode()
    known = [hmac.compare_digest(given, _signature(event, token).encode()) for token in tokens]
    if event.get_extension(Attribute.EXPIRY_TIME) is None or not any(known):
        raise Unauthorized(
            f"the signature of {event.get_type()} {event.get_id()} is not this pipeline's: it was altered on its way, "
            "or signed with another token"
        )
    check_not_expired(event.get_attributes(), datetime.now(UTC))


def _signature(event: CloudEvent, token: str) -> str:
    attributes = [event.get_extension(name) for name in _SIGNED]
    # A JSON array separates its elements unambiguously.
    signed = msgspec.json.encode(
        [_PURPOSE, event.get_type(), event.get_source(), event.get_id(), *attributes, _data_sha256(event)]
    )
    return hmac.new(token.encode(), signed, hashlib.sha256).hexdigest()


def _data_sha256(event: CloudEvent) -> str:
    if event.get_extension(Attribute.DATAREF) is not None:
        return str(event.get_extension(Attribute.DATAREF_SHA256))
    digest = hashlib.sha256()
    for buffer in data_buffers(event):
        digest.update(buffer)
    return digest.hexdigest()
