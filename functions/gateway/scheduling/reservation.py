"""Memory for sequences at every stage of a route, before anything of them is computed."""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Final

from eventing.wire.control import ReservedRow, ReserveRow
from eventing.wire.events import Status
from functions.gateway.scheduling.board import Reservation
from functions.gateway.stages.client import Answerer, Pipeline, StageFailed, Traces
from functions.gateway.stages.routes import Instance

_WORST_FIRST: Final = (Status.INVALID, Status.STALE, Status.MISS, Status.FULL, Status.OK)

Answer = tuple[Answerer, tuple[ReservedRow, ...]] | StageFailed


def reserve_at_once(
    pipeline: Pipeline,
    instances: Sequence[Instance],
    rows: Sequence[ReserveRow],
    deadline: float,
    traces: Traces,
    calls: Executor,
) -> Reservation:
    """Asks all stages together, and returns when the last has answered."""
    futures = [calls.submit(_ask, pipeline, instance, rows, deadline, traces) for instance in instances]
    return _combined([future.result() for future in futures], len(rows))


def reserve_in_order(
    pipeline: Pipeline, instances: Sequence[Instance], rows: Sequence[ReserveRow], deadline: float, traces: Traces
) -> Reservation:
    """Asks stage after stage, and stops at the first that has no room.

    Two gateways that ask all stages together may each get a part and both give it back, again and again. In order, whoever
    gets the first stage meets nobody at the others who did not get it before.
    """
    answers: list[Answer] = []
    for instance in instances:
        answers.append(_ask(pipeline, instance, rows, deadline, traces))
        reservation = _combined(answers, len(rows))
        if reservation.failure is not None or any(status is not Status.OK for status in reservation.statuses):
            break
    return reservation


def _ask(pipeline: Pipeline, instance: Instance, rows: Sequence[ReserveRow], deadline: float, traces: Traces) -> Answer:
    try:
        return pipeline.reserve(instance, rows, deadline, traces)
    except StageFailed as failure:
        return failure


def _combined(answers: Sequence[Answer], num_rows: int) -> Reservation:
    statuses = [Status.OK] * num_rows
    answerers: list[Answerer] = []
    for answer in answers:
        if isinstance(answer, StageFailed):
            return Reservation(statuses, answerers, answer)
        answerers.append(answer[0])
        statuses = [min(old, row.status, key=_WORST_FIRST.index) for old, row in zip(statuses, answer[1], strict=True)]
    return Reservation(statuses, answerers)
