"""What the scheduler counts. Plain numbers: the application turns them into metrics when they are read."""

import copy
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from functions.gateway.scheduling.row_costs import RowCosts

_FALL: Final = 0.3
_RISE: Final = 0.01
"""Shares of a quicker and of a slower step in what a step is taken to last: waits make steps slow, nothing makes them quick."""


@dataclass(slots=True)
class StageStats:
    """Of one stage, as the gateway sees it: wait, compute and transport together."""

    steps: int = 0
    seconds: float = 0.0
    service_seconds: float = 0.0
    """What a decode step takes without waiting, as the quick ones of late say; 0: not known."""
    costs: RowCosts = field(default_factory=RowCosts)
    """At the stage, without its network."""

    exchange_seconds: float = 0.0
    """Of `seconds`, those between an event's first byte and its reply's last."""

    network_seconds: float = 0.0
    """Of an event's way to the stage and back, as the quick ones of late say."""

    def step(
        self, seconds: float, decode_tokens: int, exchange_seconds: float = 0.0, engine_seconds: float | None = None
    ) -> None:
        """decode_tokens: of a decode step; 0: prompt chunks. engine_seconds: of those, at the stage; None: not known."""
        self.steps += 1
        self.seconds += seconds
        self.exchange_seconds += exchange_seconds
        if decode_tokens:
            at_stage = seconds if engine_seconds is None else engine_seconds
            self.costs.step(decode_tokens, at_stage)
            self.service_seconds = _followed(self.service_seconds, seconds)
            self.network_seconds = _followed(self.network_seconds, max(0.0, seconds - at_stage))


def _followed(taken: float, seconds: float) -> float:
    share = 1.0 if not taken else _FALL if seconds < taken else _RISE
    return taken + share * (seconds - taken)


@dataclass(slots=True)
class Stats:
    """Counters since the start, but for `waiting` to `trips`, which say how it stands now."""

    stages: list[StageStats]
    steps_seconds: float = 0.0
    """Of the threads that walk trips: all of it, deciding what is next included."""
    deciding_seconds: float = 0.0
    """Of those: with the lock, or waiting for it."""
    waiting: int = 0
    hungry: int = 0
    """Of those, told by a stage that it has no memory for them."""
    running: int = 0
    micro_batches: int = 0
    trips: int = 0
    """Events on their way."""
    tokens: int = 0
    prompt_tokens: int = 0
    """Sent into the first stage, replays included."""
    cached_tokens: int = 0
    """Of prompts, that every stage held already when the first chunk was sent."""
    sequences: Counter[str] = field(default_factory=Counter)
    """Ended, by finish reason or problem name."""
    draft_tokens_accepted: int = 0
    draft_tokens_rejected: int = 0
    """Of tokens, see `speculation`."""
    replays: Counter[str] = field(default_factory=Counter)
    """Sequences whose keys and values were computed anew, by cause."""
    grown: int = 0
    """Answers that came to the end of their memory, and went on with more."""
    moves: Counter[str] = field(default_factory=Counter)
    """Micro-batches that went over to another instance: leaving or balance."""
    wakes: int = 0

    def step_over(self, began: float, walked: float) -> float:
        """The step that began and was walked then, in time.perf_counter(), is over now, which is when the next one begins."""
        now = time.perf_counter()
        self.deciding_seconds += now - walked
        self.steps_seconds += now - began
        return now

    def parts(self) -> dict[str, float]:
        """What steps took, seconds, by what it was for."""
        hops = sum(stage.seconds for stage in self.stages)
        exchange = sum(stage.exchange_seconds for stage in self.stages)
        rows = max(0.0, self.steps_seconds - hops - self.deciding_seconds)
        return {"exchange": exchange, "events": hops - exchange, "deciding": self.deciding_seconds, "rows": rows}

    def snapshot(self) -> "Stats":
        return copy.deepcopy(self)
