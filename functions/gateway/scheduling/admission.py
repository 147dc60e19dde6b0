"""Admits waiting sequences to micro-batches, as far as capacity and memory allow, and asks stages for their memory."""

import math
from collections.abc import Sequence as Items
from collections.abc import Set

from eventing.wire.control import MAX_PEERS
from functions.gateway.scheduling.micro_batch import MicroBatch
from functions.gateway.scheduling.prefix_sharing import leader_is_done
from functions.gateway.scheduling.reservations import Reserve, reserve
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.scheduling.state import SchedulerState
from functions.gateway.stages.routes import Instance


def admit(state: SchedulerState, now: float) -> list[Reserve]:
    """Moves waiting sequences into micro-batches as far as capacity and memory allow. Returns the reservations to ask for.

    The memory backlog comes before the queue. The queue decides the order of clients.
    """
    backlog, queue = state.waiting.backlog, state.waiting.queue
    pending = [sequence for batch in state.micro_batches for sequence in batch.sequences if not sequence.has_memory]
    if any(sequence.reserves_in_order for sequence in pending):
        return []  # a sequence from the backlog asks stage after stage; others would take its memory
    if backlog.sequences and (reservation := _admit_from_backlog(state, now)) is not None:
        return [reservation]
    # One reservation at a time for each micro-batch: sequences that come meanwhile share the next one. Otherwise a burst of
    # requests would be as many events at every stage, which its autoscaler takes for load.
    reserving = {batch for batch in state.micro_batches if not all(sequence.has_memory for sequence in batch.sequences)}
    admitted: dict[MicroBatch, list[Sequence]] = {}
    free_tokens = state.placement.free_tokens() if backlog.sequences else math.inf
    while (sequence := queue.peek(min(free_tokens, backlog.overtaking_tokens()))) is not None:
        batch = _choose_micro_batch(state, sequence, now, reserving)
        if batch is None:
            break
        queue.take(sequence)
        _join(state, batch, sequence)
        backlog.overtaken(sequence)
        admitted.setdefault(batch, []).append(sequence)
    return [_reserve(state, batch, sequences) for batch, sequences in admitted.items()]


def reserve_again(state: SchedulerState, batch: MicroBatch, waiting: Items[Sequence]) -> list[Reserve]:
    """Repeats the reservations of sequences of `batch` that wait for KV. Returns the reservations to ask for.

    They wait for KV that is restored, computed by their leader, or handed over. The stages may hold more of their tokens now,
    and the replies say so.

    Sequences that have migrated ask only the new instance. The other stages hold tokens drawn since the first reservation. A
    longer chain would make them drop these tokens, which could be rejected draft tokens.
    """
    again: dict[Instance | None, list[Sequence]] = {}  # by the instance that they migrated from
    for sequence in waiting:
        left = sequence.handing_over
        asks = left is not None or (batch.target is None and (sequence.restoring or leader_is_done(sequence, state)))
        if asks and sequence.at_rest:
            sequence.reserved = False
            again.setdefault(left, []).append(sequence)
    reservations = []
    for left, sequences in again.items():
        if left is None:
            reservations.append(_reserve(state, batch, sequences))
        else:
            target = batch.route.instances[left.stage]
            reservations.append(reserve((target,), sequences, peers={target: (left.url,)}, migrates=True))
    return reservations


def _admit_from_backlog(state: SchedulerState, now: float) -> Reserve | None:
    """Admits the oldest sequence of the memory backlog. Returns its reservation, or None if no sequence can be admitted.

    During the back-off, admits a younger sequence instead, if that may overtake the oldest and seems to fit.
    """
    backlog = state.waiting.backlog
    sequence = backlog.sequences[0]
    if now < backlog.retry_at:
        free_tokens = state.placement.free_tokens()
        others = [
            each
            for each in backlog.sequences[1:]
            if each.reserve_tokens <= min(free_tokens, backlog.overtaking_tokens(besides=each))
        ]
        if not others:
            return None
        sequence = others[0]
    batch = _choose_micro_batch(state, sequence, now, set())
    if batch is None:
        return None
    overtakes = sequence is not backlog.sequences[0]
    backlog.sequences.remove(sequence)
    if overtakes:
        backlog.overtaken(sequence)
    _join(state, batch, sequence)
    return _reserve(state, batch, [sequence], in_order=True)


def _join(state: SchedulerState, batch: MicroBatch, sequence: Sequence) -> None:
    batch.join(sequence)
    sequence.last_chunk_step = state.steps_begun


def _choose_micro_batch(state: SchedulerState, sequence: Sequence, now: float, excluded: Set[MicroBatch]) -> MicroBatch | None:
    """Returns the micro-batch that `sequence` shall join, or None if the sequence has to wait.

    Makes a new micro-batch if one more is wanted. `excluded` are existing micro-batches that the sequence must not join.
    """
    placement, limits = state.placement, state.limits
    # Sequences stay on their revision, but new ones join only the newest. Otherwise an old one would never scale to zero.
    current = [batch for batch in state.micro_batches if not placement.outdated(batch.route)]
    arriving = len(state.waiting.queue) + len(state.waiting.backlog.sequences)
    held = state.where_held.find(sequence.prefix_chain())
    wanted = state.micro_batches_wanted(state.running + arriving)
    if len(current) < wanted or _needs_other_instances(state, current, sequence):
        route = placement.place(sequence.reserve_tokens, held)
        if route is None:
            state.no_route_since = state.no_route_since or now
            return None
        state.micro_batches.append(MicroBatch(route))
        return state.micro_batches[-1]

    def load(batch: MicroBatch) -> tuple[bool, float]:
        """Returns a sort key: micro-batches whose route has memory for the sequence come first, then those with few sequences.

        Computing a prompt chunk delays the others about as much as one more sequence. So each chunk that the prefix cache saves
        counts as one sequence fewer. On a route with a slow instance, the number of sequences is multiplied by the slowness.
        """
        instances = batch.route.instances
        saved_chunks = sum(map(held.at, instances)) / len(instances) / limits.chunk_tokens
        sequences = (len(batch.sequences) + 1) * placement.slowness(batch.route)
        return any(each.lacks(sequence.reserve_tokens) for each in instances), sequences - saved_chunks

    open_batches = [
        batch
        for batch in current
        if len(batch.sequences) < limits.micro_batch_sequences
        and batch not in excluded
        and batch.target is None
        and all(instance.usable(now) for instance in batch.route.instances)
    ]
    return min(open_batches, key=load, default=None)


def _needs_other_instances(state: SchedulerState, current: Items[MicroBatch], sequence: Sequence) -> bool:
    """Returns whether the sequence needs a new micro-batch on other instances, because all routes in use lack memory for it.

    A few long sequences may fill a pod before they fill a micro-batch. False if no more micro-batches are allowed.
    """
    tokens = sequence.reserve_tokens
    if not all(any(instance.lacks(tokens) for instance in batch.route.instances) for batch in current):
        return False
    return tokens <= state.placement.free_tokens() and len(current) < state.micro_batches_allowed()


def _reserve(state: SchedulerState, batch: MicroBatch, sequences: Items[Sequence], *, in_order: bool = False) -> Reserve:
    instances = batch.route.instances
    peers = {instance: urls for instance in instances if (urls := _peers(state, instance, sequences))}
    return reserve(instances, sequences, in_order=in_order, peers=peers)


def _peers(state: SchedulerState, instance: Instance, sequences: Items[Sequence]) -> tuple[str, ...]:
    """Returns the URLs of other instances from which `instance` may fetch KV of the sequences, at most MAX_PEERS.

    Much of a sequence was computed last at such a peer, or at least some of it if the peer terminates. A terminating instance
    is asked for nothing else. Each request makes its queue-proxy wait for another 30 s before the pod ends.
    """
    known, urls = state.placement.stages[instance.stage], dict[str, None]()
    for sequence in sequences:
        tokens, holder = state.where_held.holder(sequence.prefix_chain(), instance.stage)
        if holder is None or holder is instance or holder.is_service or known.get(holder.url) is not holder:
            continue  # the last: it is gone
        if holder.terminating or (holder.ready and tokens >= state.limits.chunk_tokens):
            urls[holder.url] = None
    return tuple(urls)[:MAX_PEERS]
