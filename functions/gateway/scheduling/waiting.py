"""Sequences that hold nothing anywhere: in the queue, until the time of their replay, or until a stage has room for them."""

import bisect
import random
import time
from collections.abc import Iterator
from typing import Final

from functions.gateway.scheduling.fair_queue import FairQueue
from functions.gateway.scheduling.sequence import Sequence

_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 1.0
_OVERTAKEN_TIMES: Final = 4
"""What others may be given while one waits, as multiples of what it waits for."""


class Hungry:
    """Sequences that were told that a stage is full: one after the other, the first one first.

    Their own clients wait with them. Others may overtake them, but only so far that the memory which those get meanwhile comes
    to a few times what the overtaken wants: then all wait until it has been given.
    """

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        """In the order in which they came to the gateway."""
        self.retry_at = 0.0
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.sequences, sequence, key=lambda other: other.number)

    @property
    def clients(self) -> set[str]:
        return {sequence.client_id for sequence in self.sequences}

    def may_be_overtaken(self, by: Sequence) -> bool:
        """By a sequence of another client, which came later or not."""
        return all(
            one.client_id != by.client_id and one.overtaken_tokens + by.reserve_tokens <= _OVERTAKEN_TIMES * one.reserve_tokens
            for one in self.sequences
            if one is not by
        )

    def overtaken(self, by: Sequence) -> None:
        for one in self.sequences:
            one.overtaken_tokens += by.reserve_tokens

    def still_full(self) -> None:
        """The next try comes later each time, and not at the moment when another gateway comes too."""
        self.retry_at = time.monotonic() + self._pause_seconds * random.uniform(0.5, 1.5)
        self._pause_seconds = min(_LONGEST_PAUSE_SECONDS, 2 * self._pause_seconds)

    def was_given(self) -> None:
        """A sequence got its memory: whoever is told no next waits no longer than the first."""
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def was_freed(self) -> None:
        """A sequence gave its memory back: there may be room now."""
        self.retry_at = 0.0
        self._pause_seconds = _FIRST_PAUSE_SECONDS


class Waiting:
    def __init__(self) -> None:
        self.queue: FairQueue[Sequence] = FairQueue()
        self.paced: list[Sequence] = []
        """Replays that wait for their time."""
        self.hungry = Hungry()

    def __len__(self) -> int:
        return len(self.queue) + len(self.paced) + len(self.hungry.sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no particular order."""
        yield from self.queue
        yield from self.paced
        yield from self.hungry.sequences

    def put_back(self, sequence: Sequence) -> None:
        """Ahead of all that are new, at once or when its replay may start."""
        if sequence.strikes.replay_at > time.monotonic():
            self.paced.append(sequence)
        else:
            self.queue.push_returned(sequence)

    def resume(self, now: float) -> None:
        """Replays whose time has come return to the queue."""
        for sequence in [sequence for sequence in self.paced if sequence.strikes.replay_at <= now]:
            self.paced.remove(sequence)
            self.queue.push_returned(sequence)

    def remove(self, sequence: Sequence) -> None:
        if not self.queue.remove(sequence):
            for waiting in (self.paced, self.hungry.sequences):
                if sequence in waiting:
                    waiting.remove(sequence)

    def due(self) -> Iterator[float]:
        """When somebody may go on although nothing has happened, in time.monotonic()."""
        yield from (sequence.strikes.replay_at for sequence in self.paced)
        if self.hungry.sequences:
            yield self.hungry.retry_at
