"""Memory for sequences at every stage of a route, before anything of them is computed."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from eventing.wire.control import ReserveReply, ReserveRow
from eventing.wire.events import Status
from functions.gateway.stages.client import ReplyOrigin, StageClient, Traces
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.instances import Instance

_WORST_FIRST: Final = (Status.INVALID, Status.STALE, Status.MISS, Status.FULL, Status.OK)

Peers = Mapping[Instance, tuple[str, ...]]
"""By who may ask them."""
Said = tuple[ReplyOrigin, ReserveReply] | StageFailed
"""By one stage."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What became of one for several sequences on all stages of a route."""

    statuses: Sequence[Status]
    """Per sequence, the worst of all stages."""
    origins: Sequence[ReplyOrigin]
    held: Sequence[Sequence[int]]
    """Per sequence and stage, tokens of its chain that are there already."""
    remembers: bool = False
    """All stages remember, so that what one sequence computes others find."""
    failure: StageFailed | None = None
    """A stage gave no usable reply: then no status counts."""


def reserve_at_once(
    client: StageClient,
    instances: Sequence[Instance],
    rows: Sequence[ReserveRow],
    deadline: float,
    traces: Traces,
    peers: Peers,
    calls: Executor,
) -> Reservation:
    """Asks all stages together, and returns when the last has replied: what is released then comes behind all of it."""
    futures = [
        calls.submit(_ask, client, instance, _with_peers(rows, peers, instance), deadline, traces) for instance in instances
    ]
    wait(futures)
    return _combined([future.result() for future in futures], len(rows))


def reserve_in_order(
    client: StageClient,
    instances: Sequence[Instance],
    rows: Sequence[ReserveRow],
    deadline: float,
    traces: Traces,
    peers: Peers,
) -> Reservation:
    """Asks stage after stage, and stops at the first that has no room.

    Two gateways that ask all stages together may each get a part and both give it back, again and again. In order, whoever
    gets the first stage meets nobody at the others who did not get it before.
    """
    said: list[Said] = []
    for instance in instances:
        said.append(_ask(client, instance, _with_peers(rows, peers, instance), deadline, traces))
        reservation = _combined(said, len(rows))
        if reservation.failure is not None or any(status is not Status.OK for status in reservation.statuses):
            break
    return reservation


def _with_peers(rows: Sequence[ReserveRow], peers: Peers, instance: Instance) -> Sequence[ReserveRow]:
    own = peers.get(instance, ())
    return [replace(row, peers=own) for row in rows] if own else rows


def _ask(client: StageClient, instance: Instance, rows: Sequence[ReserveRow], deadline: float, traces: Traces) -> Said:
    try:
        return client.reserve(instance, rows, deadline, traces)
    except StageFailed as failure:
        return failure


def _combined(said: Sequence[Said], num_rows: int) -> Reservation:
    statuses = [Status.OK] * num_rows
    held: list[list[int]] = [[] for _ in range(num_rows)]
    origins: list[ReplyOrigin] = []
    remembers = True
    for of_stage in said:
        if isinstance(of_stage, StageFailed):
            return Reservation(statuses, origins, held, failure=of_stage)
        origin, reply = of_stage
        origins.append(origin)
        remembers = remembers and reply.remembers
        for number, row in enumerate(reply.rows):
            statuses[number] = min(statuses[number], row.status, key=_WORST_FIRST.index)
            held[number].append(row.held)
    return Reservation(statuses, origins, held, remembers)
