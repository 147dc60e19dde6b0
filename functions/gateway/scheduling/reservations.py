"""Reservations: memory for sequences at all stages, which the gateway asks for before it sends their tokens.

`reserve` makes the action. Threads carry it out without the scheduler's lock. `reservation_over` applies the replies.
"""

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Items
from concurrent.futures import Executor, wait
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from eventing.problems import AdapterUnusable, InvalidRequest
from eventing.wire.control import ReleaseRow, ReserveReply, ReserveRow
from eventing.wire.events import Status
from eventing.wire.prefix_chain import BLOCK_TOKENS, packed
from functions.gateway.scheduling.apply import note_origin
from functions.gateway.scheduling.prefix_sharing import follow, stop_following
from functions.gateway.scheduling.replays import settle, stage_failed, start_again
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.scheduling.state import SchedulerState
from functions.gateway.stages.client import ReplyOrigin, StageClient, Traces
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Instance, Route

_WORST_FIRST: Final = (Status.INVALID, Status.STALE, Status.MISS, Status.FULL, Status.OK)


@dataclass(frozen=True, slots=True)
class Reserve:
    """Action: asks instances for the memory of a micro-batch's sequences, before any of their tokens is computed there."""

    sequences: Items[Sequence]
    instances: tuple[Instance, ...]  # of consecutive stages
    rows: Items[ReserveRow]  # of `sequences`, in their order
    traces: Traces
    deadline: float  # in time.monotonic()
    lineages: tuple[str | None, ...]  # of the input of each of `instances`; empty for the first stage; None: not known yet
    in_order: bool = False  # see `reserve_in_order`
    peers: Mapping[Instance, tuple[str, ...]] = field(default_factory=dict)  # URLs from which an instance may fetch KV
    migrates: bool = False  # it asks one new instance for sequences that hold memory at the other stages


def reserve(
    instances: tuple[Instance, ...],
    sequences: Items[Sequence],
    *,
    in_order: bool = False,
    peers: Mapping[Instance, tuple[str, ...]] | None = None,
    migrates: bool = False,
) -> Reserve:
    """Makes the action that asks `instances`, one for each of consecutive stages, for the memory of `sequences`.

    The other parameters are fields of Reserve. Stores in each sequence the prefix chain that its row names.
    """
    rows = []
    for sequence in sequences:
        scores = sequence.prompt.scored and not sequence.has_drawn  # needs every token computed, so it uses no prefix cache
        chain = sequence.reserved_chain = () if scores else sequence.prefix_chain()
        # A grammar and penalties look at all earlier tokens, also at those whose computation the prefix cache saves.
        sampling = sequence.prompt.sampling
        looks_back = sampling.grammar is not None or sampling.adjusts
        token_ids = array("i", sequence.tokens[: BLOCK_TOKENS * len(chain)]).tobytes() if looks_back else b""
        rows.append(
            ReserveRow(
                sequence.id,
                sequence.progress.attempt,
                sequence.reserve_tokens,
                packed(chain),
                token_ids,
                adapter=sequence.prompt.adapter,
            )
        )
    traces = [sequence.prompt.trace for sequence in sequences if sequence.prompt.trace is not None]
    deadline = max(sequence.deadline for sequence in sequences)
    lineages = _lineages(sequences[0].route, instances[0].stage)[: len(instances)]
    in_order = in_order or None in lineages  # each stage's reply then says the lineage for the next
    return Reserve(sequences, instances, rows, traces, deadline, lineages, in_order, peers or {}, migrates)


def _lineages(route: Route | None, first_stage: int) -> tuple[str | None, ...]:
    """Returns the lineage of the input of each instance on the route, from `first_stage` on.

    The instances' earlier replies state the lineages. An item is empty for the first stage and None if it is not known yet.
    """
    assert route is not None
    lineages: list[str | None] = []
    lineage: str | None = ""
    for instance in route.instances:
        lineages.append(lineage)
        lineage = None if lineage is None else instance.lineages.get(lineage)
    return tuple(lineages[first_stage:])


@dataclass(frozen=True, slots=True)
class Reservation:
    """The combined replies of all stages to a Reserve."""

    statuses: Items[Status]  # per sequence, the worst of all stages
    origins: Items[ReplyOrigin]
    held: Items[Items[int]]  # per sequence and stage, tokens of its chain that the stage holds
    restoring: Items[bool]  # per sequence, whether a stage is still loading its adapter or restoring its KV
    reasons: Items[str]  # per sequence, why a stage cannot use its adapter; empty: all can
    caches_prefixes: bool = False  # every stage has a prefix cache, so sequences find what others computed
    failure: StageFailed | None = None  # a stage gave no usable reply: the statuses mean nothing


def reserve_at_once(client: StageClient, wanted: Reserve, calls: Executor) -> Reservation:
    """Asks all instances of `wanted` at the same time, in threads of `calls`.

    Returns after the last reply. So a later release cannot arrive before the reservation that it releases.
    """
    futures = [
        calls.submit(_ask, client, instance, wanted, lineage or "")
        for instance, lineage in zip(wanted.instances, wanted.lineages, strict=True)
    ]
    wait(futures)
    return combined([future.result() for future in futures], len(wanted.rows))


def reserve_in_order(client: StageClient, wanted: Reserve) -> Reservation:
    """Asks the stages one after the other, and stops at the first stage that grants no memory.

    If two gateways ask all stages at once, each may get a part and give it back, again and again. In order, a gateway that gets
    the first stage competes at later stages only with gateways that got the first stage before.
    """
    replies: list[tuple[ReplyOrigin, ReserveReply] | StageFailed] = []
    lineage = wanted.lineages[0] or ""
    for instance in wanted.instances:
        replies.append(_ask(client, instance, wanted, lineage))
        reservation = combined(replies, len(wanted.rows))
        if reservation.failure is not None or all(status is not Status.OK for status in reservation.statuses):
            break
        lineage = reservation.origins[-1].lineage
    return reservation


def _ask(
    client: StageClient, instance: Instance, wanted: Reserve, lineage: str
) -> tuple[ReplyOrigin, ReserveReply] | StageFailed:
    """Asks one instance for memory. A StageFailed is returned, not raised."""
    peers = wanted.peers.get(instance, ())
    rows = [replace(row, peers=peers) for row in wanted.rows] if peers else wanted.rows
    try:
        return client.reserve(instance, rows, wanted.deadline, wanted.traces, lineage)
    except StageFailed as failure:
        return failure


def combined(replies: Items[tuple[ReplyOrigin, ReserveReply] | StageFailed], num_rows: int) -> Reservation:
    """Combines the stages' replies: each row gets the worst of its statuses. One StageFailed makes the whole a failure.

    A stage may have been asked with another lineage than the reply of the stage before it states. Then the tokens that it holds
    are of no use and count as 0.
    """
    statuses = [Status.OK] * num_rows
    held: list[list[int]] = [[] for _ in range(num_rows)]
    restoring, reasons = [False] * num_rows, [""] * num_rows
    origins: list[ReplyOrigin] = []
    caches_prefixes = True
    for each in replies:
        if isinstance(each, StageFailed):
            return Reservation(statuses, origins, held, restoring, reasons, failure=each)
        origin, reply = each
        outdated = bool(origins) and origin.before != origins[-1].lineage
        origins.append(origin)
        caches_prefixes = caches_prefixes and reply.remembers
        for number, row in enumerate(reply.rows):
            statuses[number] = min(statuses[number], row.status, key=_WORST_FIRST.index)
            held[number].append(0 if outdated else row.held)
            restoring[number] |= row.restoring
            reasons[number] = reasons[number] or (row.reason if row.status is Status.INVALID else "")
    return Reservation(statuses, origins, held, restoring, reasons, caches_prefixes)


def reservation_over(state: SchedulerState, wanted: Reserve, reservation: Reservation) -> None:
    """Applies the replies to a reservation. Its sequences can then be computed, join the memory backlog, queue again, or end.

    All of the sequences are in one micro-batch. The memory of sequences that have ended meanwhile is released.
    """
    for origin in reservation.origins:
        note_origin(state, origin)
    present, reasons = [], dict(zip(wanted.sequences, reservation.reasons, strict=True))
    for index, (sequence, row) in enumerate(zip(wanted.sequences, wanted.rows, strict=True)):
        if sequence.id in state.sequences:
            present.append((sequence, reservation.statuses[index], reservation.held[index], reservation.restoring[index]))
        else:
            state.release_row(wanted.instances, ReleaseRow(row.id, row.attempt))
    if reservation.failure is not None:
        # Nothing was computed yet, so it counts against no sequence.
        if present and present[0][0].route is not None:
            stage_failed(state, present[0][0].route.instances[reservation.failure.stage], reservation.failure)
        for sequence, *_ in present:
            start_again(state, sequence)
        return
    state.no_route_since = state.last_failure = None
    if Status.FULL in reservation.statuses:
        state.waiting.backlog.refused()
    for sequence, status, held, restoring in present:
        if status is not Status.OK:
            _reservation_refused(state, sequence, status, reasons[sequence])
            continue
        sequence.reserved = True
        sequence.overtook = ()
        sequence.restoring = restoring
        if sequence.handing_over is not None and not restoring:
            state.release_at((sequence.handing_over,), sequence)
            sequence.handing_over = None
        held_before = min(sequence.progress.held)
        for stage, tokens in enumerate(held, wanted.instances[0].stage):
            sequence.progress.found(stage, min(tokens, len(sequence.tokens) - 1))
        if sequence.leader is not None:
            stop_following(sequence, held_before)
        state.waiting.backlog.granted()
        settle(state, sequence)
        if sequence.reserved and sequence.route is not None and reservation.caches_prefixes:
            state.where_held.put(sequence.reserved_chain, sequence.route.instances)
            if not wanted.migrates and not sequence.restoring:
                follow(sequence, state)


def _reservation_refused(state: SchedulerState, sequence: Sequence, status: Status, reason: str) -> None:
    """Applies a refused reservation to its sequence, which then joins the memory backlog, queues again or ends.

    `reason` says why a stage cannot use the sequence's adapter. It is empty if the adapter is not the reason.
    """
    if sequence.stream.over:
        state.dismiss(sequence)
    elif reason:
        state.dismiss(sequence, AdapterUnusable(reason))
    elif status is Status.FULL:
        state.take_out(sequence, had_memory=False)
        sequence.reserves_in_order = True
        state.waiting.backlog.add(sequence)
    elif status is Status.STALE:
        start_again(state, sequence)
    elif sequence.shrink():
        state.put_back(sequence)
    elif sequence.has_drawn:
        sequence.stream.finish("length")
        state.dismiss(sequence)
    else:
        wanted = f"prompt and answer of {sequence.impossible_tokens} tokens"
        state.dismiss(sequence, InvalidRequest(f"{wanted} are more than a stage can ever hold; ask for fewer"))
