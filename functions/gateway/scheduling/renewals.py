"""What the gateway holds at stages stays its own only while they hear of it (`eventing.wire.control.LEASE_SECONDS`)."""

from collections.abc import Iterator
from collections.abc import Sequence as Items

from eventing.wire.control import RENEWAL_SECONDS, ReleaseRow
from functions.gateway.scheduling.actions import Release
from functions.gateway.scheduling.board import Board
from functions.gateway.stages.instances import Instance


class Renewals:
    """A release, mostly without rows, to every instance of a route: a step at another stage may take longer than the lease.

    It carries what could not be released there before. A gateway that holds nothing sends nothing, and what it could not
    release is freed by the stage when it hears no more of it.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._next_at = 0.0
        self._lost: dict[Instance, list[ReleaseRow]] = {}

    def next(self, now: float) -> list[Release]:
        """Those that are due."""
        held = self._held()
        if held and now < self._next_at:
            return []
        self._next_at = now + RENEWAL_SECONDS
        lost, self._lost = self._lost, {}
        return [Release(one, [row for row in lost.get(one, ()) if self._over(one, row)]) for one in held]

    def lost(self, instance: Instance, rows: Items[ReleaseRow]) -> None:
        """A release failed; whether it arrived is not known."""
        if rows:
            self._lost.setdefault(instance, []).extend(rows)

    def due(self) -> Iterator[float]:
        """In time.monotonic()."""
        if self._held():
            yield self._next_at

    def _held(self) -> dict[Instance, None]:
        return dict.fromkeys(one for batch in self._board.micro_batches for one in batch.route.instances)

    def _over(self, instance: Instance, row: ReleaseRow) -> bool:
        """False for a sequence that has come back to where it was."""
        sequence = self._board.sequences.get(row.id)
        here = sequence is not None and sequence.route is not None and instance in sequence.route.instances
        return not (here and sequence is not None and sequence.progress.attempt == row.attempt)
