"""Stages that sleep are woken: all at once the first time, then those that are still cold."""

import time
from collections.abc import Iterator
from typing import Final

from functions.gateway.scheduling.actions import Wake
from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.cold_starts import ColdStarts

PAUSE_SECONDS: Final = 0.5
"""Between two rounds of warm-up events; also how long the watch may lag behind a stage that has answered one."""


class WakeUps:
    def __init__(self, board: Board, cold_starts: ColdStarts) -> None:
        self._board = board
        self._cold_starts = cold_starts
        self._under_way = False
        self._next_at = 0.0

    def next(self, now: float) -> list[Wake]:
        """A round of warm-up events, where somebody waits for a stage that is cold."""
        board = self._board
        stranded = any(board.placement.strands(batch.route) for batch in board.micro_batches)
        if now < self._next_at or not (board.waiting or stranded):
            return []
        first = board.no_route_since is None or now - board.no_route_since < PAUSE_SECONDS
        return self.begin(everything=first)

    def begin(self, *, everything: bool) -> list[Wake]:
        """Where any stage is cold, and no round is under way. everything: all stages, not only those that are known to be."""
        cold = self._board.placement.cold()
        if not cold or self._under_way:
            return []
        self._under_way = True
        for stage in cold:
            self._cold_starts.begins(stage)
        self._board.stats.wakes += 1
        return [Wake(range(self._board.placement.num_stages) if everything else cold)]

    def over(self) -> None:
        """All warm-up events of a round were answered, or failed."""
        self._under_way = False
        self._next_at = time.monotonic() + PAUSE_SECONDS

    def due(self) -> Iterator[float]:
        """When the next round may begin, in time.monotonic()."""
        if self._board.waiting and not self._under_way:
            yield self._next_at
