"""The last start from zero of each stage, as the gateway that woke it saw it: how long it took, and the pod's own account."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from eventing.wire.control import WarmupReply


@dataclass(frozen=True, slots=True)
class ColdStart:
    began: float
    """When the warm-up event was sent, in time.monotonic()."""
    ended: float | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    """Phase → seconds from the start of the pod's process to its end (functions/hosting/startup.py)."""
    cause: str = ""
    """Why it failed."""


class ColdStarts:
    """The scheduler's lock is held around it."""

    def __init__(self) -> None:
        self._under_way: dict[int, ColdStart] = {}
        self._last: dict[int, ColdStart] = {}

    def begins(self, stage: int) -> None:
        """It is asleep and is sent a warm-up event."""
        self._under_way[stage] = ColdStart(time.monotonic())

    def ends(self, stage: int, reply: WarmupReply) -> None:
        """It replied. A pod that had begun to start before it was asked was not cold: that is no start from zero."""
        start = self._under_way.pop(stage, None)
        if start is None:
            return
        now = time.monotonic()
        if max(reply.start_up.values(), default=0.0) <= now - start.began:
            self._last[stage] = ColdStart(start.began, now, reply.start_up)

    def fails(self, stage: int, cause: str) -> None:
        start = self._under_way.pop(stage, None)
        if start is not None:
            self._last[stage] = ColdStart(start.began, time.monotonic(), cause=cause)

    def last(self, stage: int) -> ColdStart | None:
        """The one that is under way, else the last one; None where none was seen."""
        return self._under_way.get(stage) or self._last.get(stage)
