"""Micro-batches move to other instances: away from those that leave, at once; for balance, one micro-batch at a time."""

from functions.gateway.scheduling.actions import Reserve
from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.micro_batch import MicroBatch
from functions.gateway.scheduling.reserve import reserve
from functions.gateway.stages.instances import Instance


class Moves:
    def __init__(self, board: Board) -> None:
        self._board = board
        self._settling: MicroBatch | None = None
        """Moved for balance and not caught up yet."""

    def make(self, now: float) -> list[Reserve]:
        """Says who must move where, and moves those that are at rest; what has to be asked of where they go."""
        asking: list[Reserve] = []
        placement = self._board.placement
        self._rebalance()
        for batch in self._board.micro_batches:
            if batch.target is not None and not batch.target.usable(now):
                batch.target = None
            leaving = placement.must_leave(batch.route)
            if leaving is not None and batch.target is None:
                self._board.stats.moves["leaving"] += 1
            batch.target = leaving or batch.target
            while batch.target is not None and batch.at_rest:
                asking += self._carry_over(batch, batch.target)
                batch.target = placement.must_leave(batch.route)
        return asking

    def _rebalance(self) -> None:
        batches = self._board.micro_batches
        settling = self._settling
        if settling is not None and settling in batches and (settling.target or not settling.caught_up):
            return
        self._settling = None
        uneven = self._board.placement.unbalanced()
        if uneven is None:
            return
        most, least = uneven
        movable = [b for b in batches if most in b.route.instances and b.target is None and b.caught_up]
        if movable:
            self._settling = min(movable, key=lambda batch: batch.tokens)
            self._settling.target = least
            self._board.stats.moves["balance"] += 1

    def _carry_over(self, batch: MicroBatch, target: Instance) -> list[Reserve]:
        """What the sequences held is taken along where the new instance can read it from the old one; else it is computed."""
        left = batch.move(target)
        for sequence in batch.sequences:
            sequence.stream.replayed()
            self._board.stats.replays["moved"] += 1
        taken = [] if left.is_service or target.is_service else [one for one in batch.sequences if one.known()]
        for sequence in batch.sequences:
            if sequence in taken:
                sequence.reserved = False
            else:
                self._board.release_at(left, sequence)
        return [reserve((target,), taken, peers={target: (left.url,)}, moved_from=left)] if taken else []
