"""One event's way through the stages: request, reply, next stage.

The relay is pass-through: while every row is ok, the body of a stage's reply is the body of the next request, byte for byte.
Only the table is read on the way. Rows that are not ok are taken out of what goes on; the others are unharmed.
"""

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from eventing.wire.batch_codec import encode_batch, select_rows
from eventing.wire.cloud_event import Buffer
from eventing.wire.events import Batch, Row, Want
from functions.gateway.scheduling.job import Job
from functions.gateway.scheduling.micro_batch import MicroBatch
from functions.gateway.scheduling.progress import Piece
from functions.gateway.scheduling.sequence import traces_of
from functions.gateway.stages.client import ForwardReply, StageClient
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Instance, Turnstile

Body = Sequence[Buffer]


@dataclass(eq=False, slots=True)
class Trip:
    """Pieces of several sequences on the same route, as deep as they all go."""

    instances: tuple[Instance, ...]
    pieces: list[tuple[Job, Piece]]
    depth: int
    micro_batch: MicroBatch | None
    """Whose decode step it is. None: prompt chunks, whose turn at the first stage is taken already."""
    deadline: float
    """When nobody awaits it any more, in time.monotonic()."""


class TripLog(Protocol):
    """Who is told how a trip goes on; called from the trip's thread."""

    def answered(self, trip: Trip, stage: int, reply: ForwardReply, seconds: float) -> list[int]:
        """`stage` answered after `seconds`; its rows are in the order of `trip.pieces`.

        Returns the indices of those that go on, and takes the others out of `trip.pieces`.
        """

    def broke(self, trip: Trip, failure: StageFailed) -> None:
        """The trip ended at `failure.instance`."""

    def first_stage_free(self) -> None:
        """A trip with prompt chunks has left its first stage: the next one may enter it."""


def walk(trip: Trip, pipeline: StageClient, log: TripLog) -> None:
    """Sends the trip round its stages and returns when it is over, whatever became of it."""
    turn = trip.instances[0].prompts if trip.micro_batch is None else None
    try:
        body: Body = encode_batch(first_batch(trip))
        for stage, instance in enumerate(trip.instances[: trip.depth + 1]):
            if turn is not None and stage > 0:
                turn = _next_turn(turn, instance.prompts)
                if stage == 1:
                    log.first_stage_free()
            body = _step(trip, stage, body, pipeline, log)
            if not body:
                break
    except StageFailed as failure:
        log.broke(trip, failure)
    finally:
        if turn is not None:
            turn.leave()


def _step(trip: Trip, stage: int, body: Body, pipeline: StageClient, log: TripLog) -> Body:
    """The body for the next stage; empty where no row goes on."""
    sent = time.monotonic()
    jobs = [job for job, _ in trip.pieces]
    traces = traces_of(job.sequence for job in jobs)
    reply = pipeline.forward(trip.instances[stage], body, [job.id for job in jobs], trip.deadline, traces)
    goes_on = log.answered(trip, stage, reply, time.monotonic() - sent)
    if len(goes_on) == len(reply.batch.rows):
        return [reply.body]
    return encode_batch(select_rows(reply.batch, goes_on)) if goes_on else []


def _next_turn(left: Turnstile, entered: Turnstile) -> Turnstile:
    """Queues for the next stage before it leaves the last one, so that chunks of one prompt stay in order."""
    turn = entered.queue()
    left.leave()
    turn.wait()
    return entered


def first_batch(trip: Trip) -> Batch:
    """What the first stage is sent: token ids and no tensor."""
    token_ids = array("i")
    for job, piece in trip.pieces:
        token_ids.extend(job.sequence.tokens[piece.position : piece.end])
    rows = tuple(_row(job, piece, len(trip.instances)) for job, piece in trip.pieces)
    return Batch(rows, memoryview(token_ids))


def _row(job: Job, piece: Piece, num_stages: int) -> Row:
    wants = piece.depth == num_stages - 1 and piece.end == job.total_tokens
    return Row(
        id=job.id,
        attempt=job.progress.attempt,
        position=piece.position,
        length=piece.length,
        want=Want.TOKEN if wants else Want.NONE,
        sampling=job.sequence.sampling if wants else None,
        reserve_tokens=job.reserve_tokens if piece.position == 0 else None,
    )
