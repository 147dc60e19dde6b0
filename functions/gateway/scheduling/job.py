"""A sequence at work: what the scheduler knows of it beyond what the door sees."""

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from functions.gateway.scheduling.progress import Piece, Progress
from functions.gateway.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from functions.gateway.scheduling.micro_batch import MicroBatch

MOST_STRIKES: Final = 3
"""Attempts of a sequence that may break its route at the same place, one after the other, before it ends with an error."""
MOST_BREAKS: Final = 9
"""The same at whatever place: stages that are killed every few seconds break a sequence here and there, poison in one place."""
ON_TRIAL_AT: Final = 2
"""From so many on it goes on only while nothing else is in flight, so that it can take nobody with it."""
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 5.0


@dataclass(eq=False, slots=True)
class Job:
    """Waits in the queue (no micro_batch), is given memory (not yet reserved), then computes."""

    sequence: Sequence
    id: str
    """What stages know it by: unique over all gateways and their restarts."""
    progress: Progress
    reserve_tokens: int
    number: int
    """Who came first."""
    waiting_since: float = field(default_factory=time.monotonic)
    micro_batch: "MicroBatch | None" = None
    reserved: bool = False
    one_by_one: bool = False
    """Its reservation did not fit once: from then on it asks one stage after the other, in order."""
    strikes: int = 0
    """Times that it broke its route at the same place since it last came further, as far as anybody can tell."""
    breaks: int = 0
    """The same at whatever place."""
    broke_at: tuple[int, Piece] | None = None
    """Stage and piece of its last break."""
    missed_at: set[int] = field(default_factory=set)
    """Stages that lost it since it last came further: the first time is forgiven, each further one is a strike."""
    replay_at: float = 0.0
    """Earliest start of a replay, in time.monotonic()."""
    must_restart: bool = False
    """Its route is broken; it leaves when all its pieces are back."""
    served: int = 0
    """When its last prompt chunk was sent, counted in trips: who waits longest is next."""

    @property
    def client_id(self) -> str:
        return self.sequence.client_id

    @property
    def total_tokens(self) -> int:
        return len(self.sequence.tokens)

    @property
    def at_rest(self) -> bool:
        """Nothing of it is on its way, neither tokens nor a reservation that has begun."""
        return self.progress.in_flight == 0 and self.reserved

    @property
    def decodes(self) -> bool:
        return self.at_rest and not self.must_restart and self.progress.decodes(self.total_tokens)

    @property
    def exhausted(self) -> bool:
        return self.strikes >= MOST_STRIKES or self.breaks >= MOST_BREAKS

    def came_further(self) -> None:
        """It has a new token: whatever broke before was not its fault."""
        self.strikes = self.breaks = 0
        self.missed_at.clear()

    def strike_at(self, stage: int, piece: Piece) -> None:
        """`stage` failed with `piece` in hand: what tokens do to a stage they do again, accidents happen anywhere."""
        last = self.broke_at
        if last is None or last[0] != stage or not piece.overlaps(last[1]):
            self.strikes = 0
        self.broke_at = (stage, piece)
        self.strike()

    def strike(self) -> None:
        """The sequence may have done it: its next attempt comes later each time."""
        self.strikes += 1
        self.breaks += 1
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 4 ** (self.strikes - 1))
        self.replay_at = time.monotonic() + pause * random.uniform(0.75, 1.25)

    def leave(self) -> None:
        """Back to where it holds nothing anywhere, ready to be queued."""
        if self.micro_batch is not None:
            self.micro_batch.jobs.remove(self)
        self.micro_batch = None
        self.reserved = False
        self.must_restart = False
        self.progress.restart()
