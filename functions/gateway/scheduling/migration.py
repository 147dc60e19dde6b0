"""Micro-batches migrate to other instances: at once from instances that leave, and one at a time for balance."""

from functions.gateway.scheduling.actions import Reserve, reserve
from functions.gateway.scheduling.micro_batch import MicroBatch
from functions.gateway.scheduling.state import SchedulerState
from functions.gateway.stages.instances import Instance


def migrate(state: SchedulerState, now: float) -> list[Reserve]:
    """Chooses which micro-batches migrate and moves those that are at rest. Returns the reservations at their new instances."""
    reservations: list[Reserve] = []
    placement = state.placement
    _rebalance(state)
    for batch in state.micro_batches:
        if batch.target is not None and not batch.target.usable(now):
            batch.target = None
        leaving = placement.must_leave(batch.route)
        if leaving is not None and batch.target is None:
            state.stats.migrations["leaving"] += 1
        batch.target = leaving or batch.target
        while batch.target is not None and batch.at_rest:
            reservations += _move(state, batch, batch.target)
            batch.target = placement.must_leave(batch.route)
    return reservations


def _rebalance(state: SchedulerState) -> None:
    """Chooses one micro-batch to migrate if an instance carries too many routes, once the last one has caught up."""
    settling = state.settling
    if settling is not None and settling in state.micro_batches and (settling.target or not settling.caught_up):
        return
    state.settling = None
    unbalanced = state.placement.unbalanced()
    if unbalanced is None:
        return
    most, least = unbalanced
    movable = [
        batch for batch in state.micro_batches if most in batch.route.instances and batch.target is None and batch.caught_up
    ]
    if movable:
        # The one with the fewest tokens, which may have to be computed again.
        state.settling = min(movable, key=lambda batch: sum(len(sequence.tokens) for sequence in batch.sequences))
        state.settling.target = least
        state.stats.migrations["balance"] += 1


def _move(state: SchedulerState, batch: MicroBatch, target: Instance) -> list[Reserve]:
    """Moves a micro-batch at rest. The new instance fetches the KV from the old one if it can; otherwise it is computed."""
    batch.target = None
    left = batch.route.replace(target)
    fetched = []
    for sequence in batch.sequences:
        sequence.progress.missed(target.stage, 0)
        sequence.stream.replayed()
        state.stats.replays["moved"] += 1
        if sequence.prefix_chain() and not (left.is_service or target.is_service):
            sequence.reserved = False
            fetched.append(sequence)
        else:
            state.release_at(left, sequence)
    return [reserve((target,), fetched, peers={target: (left.url,)}, moved_from=left)] if fetched else []
