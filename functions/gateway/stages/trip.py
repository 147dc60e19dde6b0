"""A trip: one step's way through the stages, request after reply.

While every row is ok, the body of a stage's reply is the body of the next request, byte for byte; only its table is read. Rows
that are not ok are left out of the next request, without harm to the others.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from eventing.wire.batch_codec import encode_batch, select_rows
from eventing.wire.cloud_event import Buffer
from eventing.wire.events import Batch, Status
from functions.gateway.stages.client import ForwardReply, StageClient
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.instances import Instance, Turnstile
from functions.observing.tracing import TraceContext


@dataclass(frozen=True, eq=False, slots=True)
class Trip:
    """What is sent, and along which instances. Immutable: the walking thread knows which rows are still under way."""

    instances: tuple[Instance, ...]
    batch: Batch  # for the first stage: token ids and no tensor
    traces: Mapping[str, TraceContext]  # by row id
    depth: int  # index of the last stage of the trip
    chunks: bool  # it carries prompt chunks, and has queued at the first stage's turnstile
    deadline: float  # of the clients, in time.monotonic()


class TripLog(Protocol):
    """Receives the events of a trip, in the trip's thread."""

    def replied(self, trip: Trip, stage: int, reply: ForwardReply, seconds: float) -> None:
        """`stage` replied after `seconds`. Rows that are ok go on to the next stage. Raises StageFailed to end the trip."""

    def failed(self, trip: Trip, ids: Sequence[str], failure: StageFailed) -> None:
        """The trip ended at `failure.stage` with the rows `ids`."""

    def first_stage_free(self) -> None:
        """A trip with prompt chunks has left its first stage, so that another may enter it."""


def walk(trip: Trip, client: StageClient, log: TripLog) -> None:
    """Sends the trip to its stages and returns when it is over. Unexpected errors are raised and not reported to `log`."""
    turn = trip.instances[0].prompts if trip.chunks else None
    ids = [row.id for row in trip.batch.rows]
    try:
        body: Sequence[Buffer] = encode_batch(trip.batch)
        for stage, instance in enumerate(trip.instances[: trip.depth + 1]):
            if turn is not None and stage > 0:
                turn = _next_turn(turn, instance.prompts)
                if stage == 1:
                    log.first_stage_free()
            reply = _hop(trip, stage, body, ids, client, log)
            rows = reply.batch.rows
            going = [index for index, row in enumerate(rows) if row.status is Status.OK]
            if len(going) == len(rows):
                body = [reply.body]
                continue
            ids = [rows[index].id for index in going]
            if not ids or stage == trip.depth:
                break
            body = encode_batch(select_rows(reply.batch, going))
    except StageFailed as failure:
        log.failed(trip, ids, failure)
    finally:
        if turn is not None:
            turn.leave()


def _hop(trip: Trip, stage: int, body: Sequence[Buffer], ids: Sequence[str], client: StageClient, log: TripLog) -> ForwardReply:
    traces = [trip.traces[id_] for id_ in ids if id_ in trip.traces]
    sent = time.monotonic()
    reply = client.forward(trip.instances[stage], body, ids, trip.deadline, traces)
    log.replied(trip, stage, reply, time.monotonic() - sent)
    return reply


def _next_turn(left: Turnstile, entered: Turnstile) -> Turnstile:
    """Queues at the next stage before it leaves the last, so that chunks of one prompt stay in order."""
    turn = entered.queue()
    left.leave()
    turn.wait()
    return entered
