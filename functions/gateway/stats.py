"""What the scheduler counts. Plain numbers: the application turns them into metrics when they are read."""

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

_SMOOTHING: Final = 0.1
"""Share of the newest value in a moving average."""


@dataclass(slots=True)
class StageStats:
    """Of one stage, as the gateway sees it: wait, compute and transport together."""

    steps: int = 0
    seconds: float = 0.0
    recent_seconds: float = 0.0
    """Moving average over decode steps."""

    def step(self, seconds: float, decode: bool) -> None:
        self.steps += 1
        self.seconds += seconds
        if decode:
            self.recent_seconds += (seconds - self.recent_seconds) * (_SMOOTHING if self.recent_seconds else 1.0)


@dataclass(slots=True)
class Stats:
    """Counters since the start, but for the first four, which say how it stands now."""

    stages: list[StageStats]
    waiting: int = 0
    running: int = 0
    micro_batches: int = 0
    trips: int = 0
    """Events on their way."""
    tokens: int = 0
    prompt_tokens: int = 0
    """Sent into the first stage, replays included."""
    sequences: Counter[str] = field(default_factory=Counter)
    """Ended, by finish reason or problem name."""
    replays: Counter[str] = field(default_factory=Counter)
    """Sequences whose keys and values were computed anew, by cause."""
    moves: Counter[str] = field(default_factory=Counter)
    """Micro-batches that went over to another instance: leaving or balance."""
    wakes: int = 0

    def snapshot(self) -> "Stats":
        return copy.deepcopy(self)
