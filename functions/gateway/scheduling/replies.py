"""What the replies of stages do to sequences, as long as they say that all is well; what else they say is for `failures`."""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Final

from eventing.wire.events import Result, Row, Status
from eventing.wire.generation import TokenLogprob
from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.failures import Failures
from functions.gateway.scheduling.progress import Piece
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.scheduling.step import Step
from functions.gateway.stages.client import ForwardReply, ReplyOrigin
from functions.gateway.stages.failures import StageFailed

_OWED: Final = "its reply lacks a token or a log-probability that was wanted, or has others than were drafted"


class Replies:
    def __init__(self, board: Board, failures: Failures) -> None:
        self._board = board
        self._failures = failures

    def heard(self, origin: ReplyOrigin, in_trip: Iterable[Sequence] = ()) -> None:
        """Notes who replied. After a new boot all held there is lost; the rows of those `in_trip` say so themselves."""
        instance = origin.instance
        if instance.boot not in ("", origin.boot):
            self._failures.rebooted(instance, set(in_trip))
        instance.replied(origin.boot, origin.free_tokens)

    def replied(self, step: Step, stage: int, reply: ForwardReply, seconds: float) -> None:
        """`stage` replied after `seconds`. Raises StageFailed where the last one owes something."""
        rows = reply.batch.rows
        pieces = [step.pieces[row.id] for row in rows]
        self.heard(reply.origin, (sequence for sequence, _ in pieces))
        decode_tokens = step.tokens if step.micro_batch is not None else 0
        self._board.stats.stages[stage].step(seconds, decode_tokens, reply.exchange_seconds, reply.engine_seconds)
        last = stage == self._board.placement.num_stages - 1
        if last and any(_owes(row, sequence, piece) for row, (sequence, piece) in zip(rows, pieces, strict=True)):
            raise StageFailed(stage, "malformed", _OWED, blames=True)
        for row, (sequence, piece) in zip(rows, pieces, strict=True):
            if row.status is not Status.OK:
                self._failures.row_failed(sequence, piece, stage, row)
                continue
            sequence.progress.computed(stage, piece)
            if stage == step.trip.depth:
                self._arrived(sequence, piece, row)

    def _arrived(self, sequence: Sequence, piece: Piece, row: Row) -> None:
        sequence.progress.settle()
        if row.result is not None and piece.scores:
            self._scored(sequence, piece, row.result)
        elif row.result is not None and row.result.tokens:
            self._drawn(sequence, len(piece.draft_tokens), row.result.tokens, row.result)
            if sequence.outgrown:
                self._outgrown(sequence)
        self._failures.settle(sequence)

    def _scored(self, sequence: Sequence, piece: Piece, result: Result) -> None:
        tokens = sequence.tokens[piece.position + 1 : piece.end + 1]
        scored = sequence.stream.scored(piece.position + 1, logprobs_of(tokens, result))
        if not sequence.prompt.max_tokens and scored == len(sequence.prompt.token_ids) - 1:
            sequence.stream.finish("length")

    def _outgrown(self, sequence: Sequence) -> None:
        """It goes back to where it waits, without what it holds, until it can have more: nobody waits for memory while holding
        some that others wait for."""
        if sequence.grow():
            self._board.stats.grown += 1
            sequence.must_restart = True
        else:
            sequence.stream.finish("length")

    def _drawn(self, sequence: Sequence, drafted: int, tokens: Items[int], result: Result) -> None:
        came_true = len(tokens) - 1
        stats = self._board.stats
        stats.tokens += len(tokens)
        stats.draft_tokens_accepted += came_true
        stats.draft_tokens_rejected += drafted - came_true
        self._failures.came_further(sequence)
        sequence.progress.introduced = True
        sequence.progress.came_true(came_true)
        if sequence.drafter is not None:
            sequence.drafter.came(tokens)
        sequence.stream.drafted(came_true, drafted - came_true)
        sequence.put(tokens, None if sequence.prompt.top_logprobs is None else logprobs_of(tokens, result))


def logprobs_of(tokens: Items[int], result: Result) -> list[TokenLogprob]:
    logprobs = result.logprobs or ()
    tops = result.top_logprobs or ((),) * len(logprobs)
    return [TokenLogprob(token, logprob, top) for token, logprob, top in zip(tokens, logprobs, tops, strict=True)]


def _owes(row: Row, sequence: Sequence, piece: Piece) -> bool:
    """Also where it says that other draft tokens came true than were sent."""
    if row.status is not Status.OK or not (piece.scores or piece.end == sequence.total_tokens):
        return False
    result = row.result or Result()
    top, logprobs = sequence.prompt.top_logprobs, result.logprobs or ()
    if top and len(result.top_logprobs or ()) != len(logprobs):
        return True
    if piece.scores:
        return len(logprobs) != piece.length
    tokens = result.tokens or ()
    if top is not None and len(logprobs) != len(tokens):
        return True
    return not tokens or tokens[:-1] != piece.draft_tokens[: len(tokens) - 1]
