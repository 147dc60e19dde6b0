"""Scoring: answers events of a Sequence of Knative Eventing, which passes each reply on to the next stage."""

import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec
from cloudevents.core.v1.event import CloudEvent

from eventing.claim_check import ClaimCheck
from eventing.problems import InvalidRequest, MalformedEvent, NotReady
from eventing.wire.cloud_event import batch_data, batch_event, json_event
from eventing.wire.control import ReleaseRow
from eventing.wire.events import Attribute, Batch, EventType, Status
from eventing.wire.framing import expiry_time, integer_attribute, required_attribute
from eventing.wire.score import ScoreResponse, score_row
from eventing.wire.signature import sign
from functions.stage.serving.handlers import EngineSource, StageIdentity

if TYPE_CHECKING:
    from functions.stage.engine.engine import Engine  # imports numpy, which a start must not wait for


class Scorer:
    """Scores a text in a single pass. In the Sequence, each reply is the event for the next stage.

    The gateway makes a Batch of one row, each stage runs its layers over the row, and the last stage answers with a
    ScoreResponse. Stages keep nothing between events: each stage reserves and frees the memory of the row within one event. It
    uses a new id for the row each time, so that repeated deliveries do not interfere. All events of one score have the same
    id. Data that is too large for a channel goes by claim check.
    """

    def __init__(self, identity: StageIdentity, engine: EngineSource, claims: ClaimCheck, token: str) -> None:
        self._identity = identity
        self._engine = engine
        self._claims = claims
        self._token = token
        self._source = f"{identity.source}/scores"

    def answer(self, event: CloudEvent) -> CloudEvent:
        """Runs the layers over the single row of an event. Returns the event for the next stage, or the final response.

        Raises a Problem.
        """
        self._identity.check_layer(integer_attribute(event.get_attributes(), Attribute.LAYER))
        required_attribute(event.get_attributes(), Attribute.EXPIRY_TIME)  # what follows is signed, too
        engine = self._engine(0.0)
        batch = batch_data(self._claims.redeem(event))
        if len(batch.rows) != 1 or len(batch.token_ids) < 2:
            raise MalformedEvent(f"{len(batch.rows)} rows with {len(batch.token_ids)} tokens; send one text at a time")
        reply = self._run(engine, batch, event)
        return self._claims.check_in(self._reply(event, batch, reply, engine.cache.free_tokens), datetime.now(UTC))

    def _run(self, engine: "Engine", batch: Batch, event: CloudEvent) -> Batch:
        """Runs the layers over the batch and returns the reply, whose row has status ok.

        Raises NotReady if a retry may help, otherwise InvalidRequest.
        """
        expiry = expiry_time(event.get_attributes())
        own = score_row(secrets.token_hex(12), len(batch.token_ids))
        try:
            reply = engine.handle(
                msgspec.structs.replace(batch, rows=(own,)),
                source=self._source,
                expires_at=None if expiry is None else expiry.timestamp(),
            )
        finally:
            engine.release([ReleaseRow(own.id, own.attempt)], source=self._source)
        row = reply.rows[0]
        if row.status is Status.INVALID:
            raise InvalidRequest(row.reason or "the text cannot be scored")
        if row.status is not Status.OK:
            raise NotReady(f"the text was not scored now: {row.status}, {row.reason or 'no reason given'}")
        return reply

    def _reply(self, cause: CloudEvent, asked: Batch, reply: Batch, free_tokens: int) -> CloudEvent:
        source, id_ = self._identity.source, cause.get_id()
        attributes: dict[str, str | int | None] = {
            Attribute.PIPELINE: self._identity.pipeline,
            Attribute.INSTANCE: self._identity.instance,
            Attribute.FREE_TOKENS: free_tokens,
            **{name: cause.get_extension(name) for name in (Attribute.EXPIRY_TIME, Attribute.TRACEPARENT)},
        }
        if self._identity.is_last_stage:
            result = reply.rows[0].result
            logprobs = () if result is None else result.logprobs or ()
            response = ScoreResponse(tuple(asked.token_ids), logprobs, sum(logprobs))
            return json_event(EventType.SCORE_RESPONSE, source, response, id=id_, **attributes)
        attributes[Attribute.LAYER] = self._identity.last
        onward = msgspec.structs.replace(reply, rows=asked.rows)
        return sign(batch_event(EventType.FORWARD, source, onward, id=id_, **attributes), self._token)
