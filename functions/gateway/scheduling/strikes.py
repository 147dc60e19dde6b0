"""What speaks against one sequence: how often it was at a stage when the stage failed. What is done about it: `failures`."""

import random
import time
from dataclasses import dataclass, field
from typing import Final

from functions.gateway.scheduling.progress import Piece

MOST_STRIKES: Final = 3
"""Attempts of a sequence that may break its route at the same place, one after the other, before it ends with an error."""
MOST_BREAKS: Final = 9
"""The same at whatever place: stages that are killed every few seconds break a sequence here and there, poison in one place."""
ON_TRIAL_AT: Final = 2
"""From so many on it goes on only while nothing else is in flight, so that it can take nobody with it."""
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 5.0


@dataclass(slots=True)
class Strikes:
    count: int = 0
    """Times that the sequence broke its route at the same place since it last came further, as far as anybody can tell."""
    breaks: int = 0
    """The same at whatever place."""
    last: tuple[int, Piece] | None = None
    """Stage and piece of the last break."""
    lost_at: set[int] = field(default_factory=set)
    """Stages that lost it since it last came further: the first time is forgiven, each further one is a strike."""
    replay_at: float = 0.0
    """Earliest start of a replay, in time.monotonic()."""

    @property
    def exhausted(self) -> bool:
        return self.count >= MOST_STRIKES or self.breaks >= MOST_BREAKS

    def came_further(self) -> None:
        """The sequence has a new token: whatever broke before was not its fault."""
        self.count = self.breaks = 0
        self.lost_at.clear()

    def strike_at(self, stage: int, piece: Piece) -> None:
        """`stage` failed with `piece` in hand: what tokens do to a stage they do again, accidents happen anywhere."""
        if self.last is None or self.last[0] != stage or not piece.overlaps(self.last[1]):
            self.count = 0
        self.last = (stage, piece)
        self.strike()

    def strike(self) -> None:
        """The sequence may have done it: its next attempt comes later each time."""
        self.count += 1
        self.breaks += 1
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 4 ** (self.count - 1))
        self.replay_at = time.monotonic() + pause * random.uniform(0.75, 1.25)
