"""Signed events: who has the pipeline token says so in the event itself, where nobody can add a header on the way.

A Sequence of Knative Eventing passes events on from stage to stage and sends no Authorization header. So the gateway signs
the event that begins a score, each stage signs its reply, and a stage takes a signed event without a bearer token. The
signature is HMAC-SHA256 with the pipeline token over what the event is and until when it is good; intermediaries may add
other attributes, which count for nothing. Until it expires a signed event can be sent again, which does no harm: a pass over
the same tokens has the same answer, and keeps nothing.
"""

import hashlib
import hmac
from datetime import UTC, datetime
from typing import Final

import msgspec
from cloudevents.core.v1.event import CloudEvent

from eventing.problems import Unauthorized
from eventing.wire.cloud_event import check_not_expired, checked_event, data_buffers
from eventing.wire.events import Attribute

_PURPOSE: Final = "lamina signed event 1"
"""First of what is signed: the token signs nothing else that could be taken for an event."""
_SIGNED: Final = (Attribute.PIPELINE, Attribute.LAYER, Attribute.EXPIRY_TIME)


def sign(event: CloudEvent, token: str) -> CloudEvent:
    """The event with its signature. It must have `expirytime`: a signature without an end would be good for ever."""
    if event.get_extension(Attribute.EXPIRY_TIME) is None:
        raise ValueError(f"{event.get_type()} {event.get_id()} has no {Attribute.EXPIRY_TIME}, so it cannot be signed")
    return checked_event({**event.get_attributes(), Attribute.SIGNATURE.value: _signature(event, token)}, event.get_data())


def is_signed(event: CloudEvent) -> bool:
    """Whether it carries a signature, right or wrong."""
    return event.get_extension(Attribute.SIGNATURE) is not None


def verify(event: CloudEvent, *tokens: str) -> None:
    """Raises Unauthorized where the signature is of none of the tokens, EventExpired where it is no longer good.

    An event whose data waits in the store (`dataref`) is held to the SHA-256 that it names; `ClaimCheck.redeem` then holds
    the data to the same.
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
    # A JSON array keeps its elements apart, whatever they contain.
    said = msgspec.json.encode(
        [_PURPOSE, event.get_type(), event.get_source(), event.get_id(), *attributes, _data_sha256(event)]
    )
    return hmac.new(token.encode(), said, hashlib.sha256).hexdigest()


def _data_sha256(event: CloudEvent) -> str:
    if event.get_extension(Attribute.DATAREF) is not None:
        return str(event.get_extension(Attribute.DATAREF_SHA256))
    digest = hashlib.sha256()
    for buffer in data_buffers(event):
        digest.update(buffer)
    return digest.hexdigest()
