"""What the gateway holds at stages stays its own only while they hear of it (`eventing.wire.control.LEASE_SECONDS`)."""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final

from eventing.wire.control import LEASE_SECONDS, RENEWAL_SECONDS, ReleaseRow
from functions.gateway.scheduling.actions import Release
from functions.gateway.scheduling.board import Board
from functions.gateway.stages.instances import Instance

_FREED_SECONDS: Final = 2 * LEASE_SECONDS
"""A stage that heard nothing meanwhile has freed all that was this gateway's."""


@dataclass(frozen=True, slots=True)
class _Lost:
    instance: Instance
    row: ReleaseRow
    until: float
    """In time.monotonic()."""


class Renewals:
    """A release, mostly without rows, to every instance of a route: a step at another stage may take longer than the lease.

    It carries what could not be released there before. A gateway that holds nothing sends nothing, and what it could not
    release is freed by the stage when it hears no more of it; until then it is kept here, for the gateway may come back sooner.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._next_at = 0.0
        self._lost: list[_Lost] = []

    def next(self, now: float) -> list[Release]:
        """Those that are due."""
        held = self._held()
        if held and now < self._next_at:
            return []
        self._next_at = now + RENEWAL_SECONDS
        lost, self._lost = self._lost, [each for each in self._lost if each.instance not in held and now < each.until]
        return [Release(one, [each.row for each in lost if each.instance is one and self._over(each)]) for one in held]

    def lost(self, instance: Instance, rows: Items[ReleaseRow]) -> None:
        """A release failed; whether it arrived is not known."""
        until = time.monotonic() + _FREED_SECONDS
        self._lost += [_Lost(instance, row, until) for row in rows]

    def due(self) -> Iterator[float]:
        """In time.monotonic()."""
        if self._held():
            yield self._next_at

    def _held(self) -> dict[Instance, None]:
        return dict.fromkeys(one for batch in self._board.micro_batches for one in batch.route.instances)

    def _over(self, lost: _Lost) -> bool:
        """False for a sequence that has come back to where it was."""
        sequence = self._board.sequences.get(lost.row.id)
        here = sequence is not None and sequence.route is not None and lost.instance in sequence.route.instances
        return not (here and sequence is not None and sequence.progress.attempt == lost.row.attempt)
