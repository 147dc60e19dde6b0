"""What the replies of stages do to sequences, as long as they say that all is well; what else they say is for `failures`."""

from collections.abc import Iterable

from eventing.wire.events import Row, Status
from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.failures import Failures
from functions.gateway.scheduling.progress import Piece
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.scheduling.step import Step
from functions.gateway.stages.client import ForwardReply, Origin
from functions.gateway.stages.failures import StageFailed


class Replies:
    def __init__(self, board: Board, failures: Failures) -> None:
        self._board = board
        self._failures = failures

    def heard(self, origin: Origin, in_trip: Iterable[Sequence] = ()) -> None:
        """Notes who replied. After a new boot all held there is lost; the rows of those `in_trip` say so themselves."""
        instance = origin.instance
        if instance.boot not in ("", origin.boot):
            self._failures.rebooted(instance, set(in_trip))
        instance.replied(origin.boot, origin.free_tokens)

    def replied(self, step: Step, stage: int, reply: ForwardReply, seconds: float) -> None:
        """`stage` replied after `seconds`. Raises StageFailed where the last one owes a token."""
        rows = reply.batch.rows
        pieces = [step.pieces[row.id] for row in rows]
        self.heard(reply.origin, (sequence for sequence, _ in pieces))
        self._board.stats.stages[stage].step(seconds, step.micro_batch is not None)
        last = stage == self._board.placement.num_stages - 1
        if last and any(_owes_token(row, sequence, piece) for row, (sequence, piece) in zip(rows, pieces, strict=True)):
            raise StageFailed(stage, "malformed", "its reply lacks a token that was wanted", blames=True)
        for row, (sequence, piece) in zip(rows, pieces, strict=True):
            if row.status is not Status.OK:
                self._failures.row_failed(sequence, stage, row)
                continue
            sequence.progress.computed(stage, piece)
            if stage == step.trip.depth:
                self._arrived(sequence, row)

    def _arrived(self, sequence: Sequence, row: Row) -> None:
        sequence.progress.settle()
        if row.result is not None and row.result.token is not None:
            self._board.stats.tokens += 1
            self._failures.came_further(sequence)
            sequence.put(row.result.token)
        self._failures.settle(sequence)


def _owes_token(row: Row, sequence: Sequence, piece: Piece) -> bool:
    wanted = row.status is Status.OK and piece.end == sequence.total_tokens
    return wanted and (row.result is None or row.result.token is None)
