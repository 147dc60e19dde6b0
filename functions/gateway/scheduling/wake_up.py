"""Wakes stages without instances by warm-up events, and records how long each cold start took as this gateway saw it."""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final

from eventing.wire.control import WarmupReply
from functions.gateway.stages.routes import Instance, Placement

ASK_SECONDS: Final = 0.5  # between two questions to an instance how far its start is
PAUSE_SECONDS: Final = 0.5  # between two rounds of warm-up events; the watch may see a new pod that much later than its reply


@dataclass(frozen=True, slots=True)
class Wake:
    """Action: send warm-up events to these stages, all at once."""

    stages: Items[int]  # their indexes


@dataclass(frozen=True, slots=True)
class AskStart:
    """Action: ask an instance that is not ready how far it has started."""

    instance: Instance


@dataclass(frozen=True, slots=True)
class ColdStart:
    """One start of a stage from zero. It is under way if `ended` is None, failed if `cause` is set, and complete otherwise."""

    began: float  # when the warm-up event was sent, in time.monotonic()
    ended: float | None = None  # when it was answered or failed
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds from the pod's start to each phase's end (startup.py)
    cause: str = ""  # why it failed, in one word


class WakeUps:
    """Begins rounds of warm-up events to cold stages, one at a time, and records the cold starts."""

    def __init__(self) -> None:
        self.rounds = 0  # begun so far
        self.under_way = False
        self.next_at = 0.0  # when the next round may begin, in time.monotonic()
        self._starting: dict[int, ColdStart] = {}
        self._last: dict[int, ColdStart] = {}
        self._asked_at: dict[Instance, float] = {}  # instances that start; in time.monotonic()
        self.told: dict[Instance, WarmupReply] = {}  # their last answers to AskStart

    def begin(self, placement: Placement, *, all_stages: bool) -> list[Wake]:
        """Begins a round of warm-up events. Returns its action, or an empty list if no stage is cold or a round is under way.

        If `all_stages`, stages that are not cold get events too.
        """
        cold = placement.cold()
        if not cold or self.under_way:
            return []
        self.rounds += 1
        self.under_way = True
        for stage in cold:
            self._starting[stage] = ColdStart(time.monotonic())
        return [Wake(range(placement.num_stages) if all_stages else cold)]

    def ask(self, placement: Placement, now: float) -> list[AskStart]:
        """Returns actions that ask starting instances of cold stages for their progress, unless they were asked lately.

        `now` is in time.monotonic().
        """
        starting = [
            instance
            for stage in placement.cold()
            for instance in placement.stages[stage].values()
            if not (instance.ready or instance.terminating or instance.is_service)
        ]
        self._asked_at = {instance: self._asked_at.get(instance, 0.0) for instance in starting}
        self.told = {instance: reply for instance, reply in self.told.items() if instance in self._asked_at}
        due = [instance for instance, asked_at in self._asked_at.items() if now - asked_at >= ASK_SECONDS]
        self._asked_at |= dict.fromkeys(due, now)
        return [AskStart(instance) for instance in due]

    def loaded_percent(self, placement: Placement, stage: int) -> int:
        """Returns how many percent of a cold stage's weights its furthest instance has loaded.

        Returns -1 if that is unknown, or no instance is starting.
        """
        told = [self.told[instance] for instance in placement.stages[stage].values() if instance in self.told]
        return max((100 * reply.loaded_bytes // reply.total_bytes for reply in told if reply.total_bytes), default=-1)

    def round_over(self) -> None:
        """Ends the round. Call it when all its warm-up events were answered or have failed."""
        self.under_way = False
        self.next_at = time.monotonic() + PAUSE_SECONDS

    def stage_woke(self, stage: int, reply: WarmupReply) -> None:
        """Ends the cold start of `stage` after its warm-up reply, and records the cold start.

        A pod that began to start before the warm-up event was sent is not recorded, because the stage was not at zero then.
        """
        start = self._starting.pop(stage, None)
        now = time.monotonic()
        if start is not None and max(reply.start_up.values(), default=0.0) <= now - start.began:
            self._last[stage] = ColdStart(start.began, now, reply.start_up)

    def stage_failed(self, stage: int, cause: str) -> None:
        """Ends the cold start of `stage` with a failure. `cause` is one word, see StageFailed."""
        start = self._starting.pop(stage, None)
        if start is not None:
            self._last[stage] = ColdStart(start.began, time.monotonic(), cause=cause)

    def last_start(self, stage: int) -> ColdStart | None:
        """Returns the cold start of `stage` that is under way, else its last one. None if there was none."""
        return self._starting.get(stage) or self._last.get(stage)
