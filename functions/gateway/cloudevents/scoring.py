"""The first step of scoring a text: makes the event for the first stage. It runs no layers and waits for no stage."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cloudevents.core.v1.event import CloudEvent

from eventing.claim_check import ClaimCheck
from eventing.problems import InvalidRequest
from eventing.wire.cloud_event import AttributeValue, batch_event, json_data, reply_id
from eventing.wire.events import Attribute, Batch, EventType
from eventing.wire.framing import expiry_time
from eventing.wire.score import ScoreRequest, score_row
from eventing.wire.signature import sign
from functions.gateway.answers.service import AnswerService
from functions.gateway.text.tokenizer import ModelText

SCORE_LIFETIME: Final = timedelta(hours=1)
"""How long the signed events of a score are valid, unless its request expires sooner. It is several times what all retries of
every step and a cold start take."""


@dataclass(frozen=True, slots=True)
class ScoreEntry:
    """Turns score requests into signed events for the first stage."""

    service: Callable[[], AnswerService]  # raises NotReady before the tokenizer is loaded
    claims: ClaimCheck
    pipeline: str  # its fingerprint
    source: str  # the events' attribute `source`
    token: str  # the pipeline's, which signs the events

    def begin(self, request: CloudEvent, client_id: str) -> CloudEvent:
        """Returns the signed event for layer 0. It has the id of the reply to `request`.

        Large data goes to the store (claim check). Raises a Problem if the request cannot be read or scored, or exceeds the
        client's limits, or if the store fails.
        """
        data = json_data(request, ScoreRequest)
        token_ids = self.service().use_text(client_id, lambda text: _token_ids(data, text), len)
        id_, now = reply_id(request), datetime.now(UTC)
        latest = now + SCORE_LIFETIME
        batch = Batch((score_row(id_, len(token_ids)),), memoryview(array("i", token_ids)))
        attributes: dict[str, AttributeValue] = {
            Attribute.PIPELINE: self.pipeline,
            Attribute.LAYER: 0,
            Attribute.EXPIRY_TIME: min(expiry_time(request.get_attributes()) or latest, latest),
            Attribute.TRACEPARENT: request.get_extension(Attribute.TRACEPARENT),
        }
        event = batch_event(EventType.FORWARD, self.source, batch, id=id_, **attributes)
        return self.claims.check_in(sign(event, self.token), now)


def _token_ids(request: ScoreRequest, text: ModelText) -> list[int]:
    """Returns the tokens to score. Raises InvalidRequest for a single token or an unknown one, ContextExceeded for too many."""
    token_ids = text.encoder.encode(request.text) if request.text is not None else list(request.token_ids or ())
    if len(token_ids) < 2:
        raise InvalidRequest("a text of one token has nothing to score: each token is scored by those before it")
    text.check_ids(token_ids)
    return token_ids
