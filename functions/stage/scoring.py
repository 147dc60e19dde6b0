"""Scoring a text in a single pass: what an Eventing Sequence of all stages does, each stage's reply the next one's event.

The first stage takes a ScoreRequest and begins a Batch of one row, the last one answers with a ScoreResponse. Nothing is
kept between events: the row's memory is reserved and freed within one. What is too large for a channel waits in the store.
"""

import secrets
from array import array
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import msgspec
from cloudevents.core.v1.event import CloudEvent

from eventing.claim_check import ClaimCheck
from eventing.cloud_event import batch_data, batch_event, expiry_time, json_data, json_event, reply_id
from eventing.events import BATCH_CONTENT_TYPE, Attribute, Batch, EventType, Row, Status, Want
from eventing.generation import ReleaseRow, ScoreRequest, ScoreResponse
from eventing.problems import InvalidRequest, MalformedEvent, NotReady, WrongLayer
from functions.config import StageConfig
from functions.publication import read_publication
from functions.stage.identity import StageIdentity
from functions.stage.stage_engine import Readiness, StageEngine
from storage.errors import StorageError
from storage.model_repository import read_file
from storage.object_reader import ObjectReader

CLAIMS_PREFIX: Final = "claims/"
"""In the bucket of the models: payloads that wait between two stages."""


class Scorer:
    """encode: a text's token ids, with the special tokens that the model's tokenizer puts around it."""

    def __init__(
        self,
        identity: StageIdentity,
        readiness: Readiness,
        encode: Callable[[str], list[int]],
        claims: Callable[[], ClaimCheck],
    ) -> None:
        self._identity = identity
        self._readiness = readiness
        self._encode = encode
        self._claims = claims

    def answer(self, event: CloudEvent) -> CloudEvent:
        """The next stage's event, or the response. Raises a Problem."""
        try:
            event = self._redeemed(event)
            batch = self._batch(event)
            engine = self._readiness.engine()
            expiry = expiry_time(event)
            reply = self._run(engine, batch, None if expiry is None else expiry.timestamp())
            return self._reply(event, batch, reply, engine.free_tokens)
        except StorageError as error:
            raise NotReady(str(error)) from error

    def _redeemed(self, event: CloudEvent) -> CloudEvent:
        return event if event.get_extension(Attribute.DATAREF) is None else self._claims().redeem(event)

    def _batch(self, event: CloudEvent) -> Batch:
        """One row with all the text's tokens."""
        if event.get_datacontenttype() != BATCH_CONTENT_TYPE:
            if not self._identity.is_first_stage:
                raise WrongLayer(f"a text is scored from layer 0 on, and this stage begins with {self._identity.first}")
            return self._first_batch(json_data(event, ScoreRequest))
        self._identity.check_layer(event)
        batch = batch_data(event)
        if len(batch.rows) != 1 or len(batch.token_ids) < 2:
            raise MalformedEvent(
                f"{len(batch.rows)} rows with {len(batch.token_ids)} tokens; to be scored is one text at a time"
            )
        return msgspec.structs.replace(batch, rows=(_row(batch.rows[0].id, len(batch.token_ids)),))

    def _first_batch(self, request: ScoreRequest) -> Batch:
        token_ids = self._encode(request.text) if request.text is not None else request.token_ids or ()
        if len(token_ids) < 2:
            raise InvalidRequest("a text of one token has nothing to score: each token is scored by those before it")
        return Batch((_row(secrets.token_hex(12), len(token_ids)),), memoryview(array("i", token_ids)))

    def _run(self, engine: StageEngine, batch: Batch, expires_at: float | None) -> Batch:
        """The engine's reply, whose only row is ok. Raises NotReady where trying again helps, else InvalidRequest."""
        source = f"{self._identity.source}/scores"
        try:
            reply = engine.handle(batch, source=source, expires_at=expires_at)
        finally:
            engine.release([ReleaseRow(batch.rows[0].id, 0)], source=source)
        (row,) = reply.rows
        if row.status is Status.INVALID:
            raise InvalidRequest(row.reason or "the text cannot be scored")
        if row.status is not Status.OK:
            raise NotReady(f"the text was not scored now: {row.status}, {row.reason or 'no reason given'}")
        return reply

    def _reply(self, cause: CloudEvent, asked: Batch, reply: Batch, free_tokens: int) -> CloudEvent:
        """Has the same id at every stage: that of the one reply to the request."""
        attributes = self._identity.reply_attributes(free_tokens) | {
            name: cause.get_extension(name) for name in (Attribute.EXPIRY_TIME, Attribute.TRACEPARENT)
        }
        id_ = cause.get_id() if cause.get_datacontenttype() == BATCH_CONTENT_TYPE else reply_id(cause)
        if self._identity.is_last_stage:
            return json_event(EventType.SCORE_RESPONSE, self._identity.source, _response(asked, reply), id=id_, **attributes)
        attributes[Attribute.LAYER] = self._identity.last
        following = batch_event(EventType.SCORE_REQUEST, self._identity.source, reply, id=id_, **attributes)
        return self._claims().check_in(following, datetime.now(UTC))


def scorer_of(config: StageConfig, identity: StageIdentity, readiness: Readiness) -> Scorer:
    """Tokenizer and store are read when they are first needed: most stages never score a text."""

    @lru_cache(maxsize=1)
    def tokenizer() -> Any:
        from tokenizers import Tokenizer

        reader = ObjectReader(config.store)
        found = Tokenizer.from_str(read_file(reader, read_publication(config, reader), "tokenizer.json").decode())
        found.no_truncation()
        found.no_padding()
        return found

    @lru_cache(maxsize=1)
    def claims() -> ClaimCheck:
        from storage.object_store import ObjectStore  # boto3, which would cost every stage 0.3 s of its start

        return ClaimCheck(ObjectStore(config.store), config.store.bucket, CLAIMS_PREFIX)

    return Scorer(identity, readiness, lambda text: tokenizer().encode(text).ids, claims)


def _row(id_: str, tokens: int) -> Row:
    return Row(id_, attempt=0, position=0, length=tokens, want=Want.LOGPROBS, reserve_tokens=tokens)


def _response(asked: Batch, reply: Batch) -> ScoreResponse:
    result = reply.rows[0].result
    logprobs = () if result is None else result.logprobs or ()
    return ScoreResponse(tuple(asked.token_ids), logprobs, sum(logprobs))
