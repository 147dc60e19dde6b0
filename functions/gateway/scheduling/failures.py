"""Everything that is done when something breaks, or takes too long (docs/scheduling.md, "When something breaks").

What a failure of one event means is `stages.failures`; what speaks against a sequence is counted in `strikes`; instances that
broke are left alone by `stages.instances`.
"""

import logging
import time
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as Items
from typing import Final

import msgspec

from eventing.problems import DeadlineExceeded, InvalidRequest, PipelineUnavailable, Problem, ReplaysExhausted
from eventing.wire.events import Row, Status
from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.progress import Piece
from functions.gateway.scheduling.sequence import Sequence, named
from functions.gateway.scheduling.step import Step
from functions.gateway.scheduling.strikes import ON_TRIAL_AT
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.instances import Instance

_log: Final = logging.getLogger(__name__)


class Failures:
    def __init__(self, board: Board) -> None:
        self._board = board
        self._trial: Sequence | None = None

    # What broke.

    def trip_failed(self, step: Step, ids: Items[str], failure: StageFailed) -> None:
        """The event got no usable reply; `ids` were its rows. They begin again on another route."""
        self._failed_at(step.trip.instances[failure.stage], failure)
        for id_ in ids:
            sequence, piece = step.pieces[id_]
            if (failure.blames or failure.final) and not (sequence.must_restart or sequence.over):
                sequence.strikes.strike_at(failure.stage, piece)
                self._suspect(sequence, str(failure), PipelineUnavailable if failure.final else ReplaysExhausted)
            sequence.progress.failed()
            sequence.must_restart = True
            sequence.progress.settle()
            self.settle(sequence, failure.cause)

    def row_failed(self, sequence: Sequence, piece: Piece, stage: int, row: Row) -> None:
        """The event came back, but one row of it was not computed: it alone has failed."""
        if row.status is Status.INVALID and piece.draft_tokens and not piece.scores and sequence.drafter is not None:
            # Perhaps for what was drafted, which is not the client's fault: it is asked again without.
            sequence.drafter.given_up = True
            row = msgspec.structs.replace(row, status=Status.MISS, held=piece.position)
        elif row.status is Status.INVALID:
            _log.info("%s: stage %d refuses it: %s", named([sequence]), stage, row.reason)
            sequence.stream.fail(InvalidRequest(row.reason or f"stage {stage} refuses the sequence"))
        elif row.status in (Status.MISS, Status.STALE):
            self._lost(sequence, stage, row.status)
        if row.status is Status.MISS:
            sequence.progress.missed(stage, row.held or 0)
        else:
            sequence.progress.failed()
            sequence.must_restart = True
        sequence.progress.settle()
        self.settle(sequence, str(row.status))

    def reservation_failed(self, sequences: Items[Sequence], failure: StageFailed) -> None:
        """A stage gave no answer when it was asked for their memory, which counts against none of them."""
        if sequences and sequences[0].route is not None:
            self._failed_at(sequences[0].route.instances[failure.stage], failure)
        for sequence in sequences:
            self.start_again(sequence)

    def broke_inside(self, sequences: Iterable[Sequence]) -> None:
        """The gateway itself failed with them in hand, so that nobody knows how they stand: they end, and others go on."""
        for sequence in list(sequences):
            self._board.abandon(sequence, Problem("the gateway failed; its log has the traceback"))

    def _failed_at(self, instance: Instance, failure: StageFailed) -> None:
        """It is left alone for a while; but a client that did not wait says nothing of it, and only ends."""
        if failure.expired:
            self.expire(time.monotonic())
        else:
            self._board.placement.avoid(instance)

    def rebooted(self, instance: Instance, excepted: Collection[Sequence]) -> None:
        """All that `instance` held is lost. `excepted`: whose rows say so themselves."""
        for sequence in self._board.sequences_at(instance):
            if sequence.reserved and sequence not in excepted:
                sequence.progress.missed(instance.stage, 0)
                self._replayed(sequence, "rebooted")

    def _lost(self, sequence: Sequence, stage: int, cause: str) -> None:
        """`stage` has lost what it held: forgiven the first time. Chunks behind the first one say the same again."""
        if sequence.progress.failing or sequence.over:
            return
        if stage in sequence.strikes.lost_at:
            sequence.strikes.strike()
            self._suspect(sequence, f"stage {stage} answered {cause} again")
        sequence.strikes.lost_at.add(stage)
        if cause == Status.MISS:
            self._replayed(sequence, cause)

    # What took too long.

    def expire(self, now: float) -> None:
        """Ends what nobody awaits any more, and who has waited too long for a stage that does not start."""
        for sequence in [one for one in self._board.sequences.values() if one.deadline <= now and not one.over]:
            seconds = sequence.prompt.deadline_seconds
            why = f"no complete answer within {seconds:g} seconds; ask for fewer tokens, or later"
            self._board.end(sequence, DeadlineExceeded(why))
        timeout = self._board.limits.cold_start_timeout_seconds
        for sequence in [sequence for since, sequence in self._without_route() if now - since >= timeout]:
            cold = ", ".join(map(str, self._board.placement.cold())) or "none"
            why = f"no route for {timeout:g} seconds; stages without an instance: {cold}"
            self._board.end(sequence, PipelineUnavailable(why))

    def end_waiting(self, problem: Problem) -> None:
        """Nobody who waits can be served."""
        for sequence in list(self._board.waiting):
            self._board.end(sequence, problem)

    def due(self) -> Iterator[float]:
        """When something will have taken too long, in time.monotonic()."""
        yield from (sequence.deadline for sequence in self._board.sequences.values())
        timeout = self._board.limits.cold_start_timeout_seconds
        yield from (since + timeout for since, _ in self._without_route())

    def _without_route(self) -> list[tuple[float, Sequence]]:
        """Who waits for a stage that has no instance, and since when."""
        since = self._board.no_route_since
        return [] if since is None else [(max(since, one.waiting_since), one) for one in self._board.waiting]

    # Beginning again.

    def settle(self, sequence: Sequence, cause: str | None = None) -> None:
        """Once nothing of `sequence` is on its way: dismisses it if it has ended, starts it again if its route broke."""
        if not sequence.at_rest:
            return
        if sequence.over:
            self._board.dismiss(sequence)
        elif sequence.must_restart:
            self.start_again(sequence, cause)

    def start_again(self, sequence: Sequence, cause: str | None = None) -> None:
        """On another route, when its time has come. `cause` None: it had computed nothing yet."""
        if cause is not None and not sequence.over:
            sequence.waiting_since = time.monotonic()
            self._replayed(sequence, cause)
        self._board.put_back(sequence)

    def _replayed(self, sequence: Sequence, cause: str) -> None:
        sequence.stream.replayed()
        self._board.stats.replays[cause] += 1

    # Suspects.

    def came_further(self, sequence: Sequence) -> None:
        """It has a new token."""
        sequence.strikes.came_further()
        self._board.suspects.discard(sequence)

    def _suspect(self, sequence: Sequence, why: str, problem: type[Problem] = ReplaysExhausted) -> None:
        self._board.suspects.add(sequence)
        if sequence.strikes.exhausted:
            breaks = sequence.strikes.breaks
            _log.warning("%s: given up: %s", named([sequence]), why)
            sequence.stream.fail(problem(f"gave up after {breaks} attempts that came no further; the last: {why}"))

    def choose_trial(self) -> None:
        """A suspect at its last chance goes on alone: nothing else of this gateway is in flight meanwhile."""
        suspects = self._board.suspects
        if self._trial is not None and (self._trial not in suspects or self._trial.route is None):
            self._trial = None
        if self._trial is None:
            ready = (one for one in suspects if one.strikes.count >= ON_TRIAL_AT and one.at_rest)
            self._trial = next((one for one in ready if not one.over), None)

    def may_send(self, sequence: Sequence) -> bool:
        if self._trial is None:
            return sequence.strikes.count < ON_TRIAL_AT
        return sequence is self._trial and len(self._board.steps) == sequence.progress.in_flight
